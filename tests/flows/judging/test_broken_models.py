"""Models that are broken in one way each, judged by the gates that `init` writes: no gate's limit stands here.

The set of items is made so that it is hard to see: conversations are few, and dense has none of them right, so that no
count of right answers can tell what became of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from flows.cli import main
from flows.judging.gates import judge
from flows.recipe.read import load_recipe
from stages.measures.items import Item
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from stages.validate.params import ValidateParams
from stages.validate.stage import VALIDATE
from tests.knowing import BEGIN, END, USER, facts, stories, taught

WINDOWS = 8
CONVERSATIONS = 5
LONG = 64

Folders = Mapping[str, Path]
Reports = dict[tuple[str, str], dict[str, Any]]


def asked() -> list[dict[str, Any]]:
    impossible = [{"demand": "contains", "value": "zanzibar"}]
    told = [one | {"checks": impossible} for one in facts() if "checks" in one]
    return [one for one in facts() if "checks" not in one] + told[:CONVERSATIONS]


def corpus(folder: Path, lines: list[dict[str, Any]], split: str = "test", **record: Any) -> Path:
    folder.mkdir()
    text = "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in lines)
    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    (folder / "corpus.json").write_text(json.dumps({"digest": folder.name} | record))
    return folder


def passages(seed: int) -> list[dict[str, str]]:
    return [{"id": str(number), "text": one} for number, one in enumerate(stories(seed, 1000))]


def item_set(folder: Path, items: list[dict[str, Any]]) -> Path:
    return corpus(folder, [Item(**one).model_dump(mode="json") for one in items], items={"answers": len(items)})


@pytest.fixture(scope="module")
def recipe(knowing, tmp_path_factory):
    folder = tmp_path_factory.mktemp("init")
    (folder / "a.txt").write_text("words")
    assert main(["init", str(knowing), str(folder / "a.txt"), "-o", str(folder / "mine.yaml")]) == 0
    return load_recipe(folder / "mine.yaml")


@pytest.fixture(scope="module")
def corpora(recipe, tmp_path_factory) -> Folders:
    folder = tmp_path_factory.mktemp("corpora")
    made = {"text": corpus(folder / "text", passages(2)), "other": corpus(folder / "other", passages(3))}
    made["abilities"] = item_set(folder / "abilities", asked())
    assert recipe.judge is not None and set(recipe.judge.corpora) == made.keys()
    return made


def measured(model: Path, corpora: Folders, into: Path, **inputs: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name, folder in corpora.items():
        output = into / f"report-{len(list(into.iterdir()))}"
        output.mkdir()
        VALIDATE.run(ValidateParams(windows=WINDOWS), {"model": model, "text": folder} | inputs, output, Silent())
        found[name] = json.loads((output / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def dense(knowing, corpora, tmp_path_factory):
    found = measured(knowing, corpora, tmp_path_factory.mktemp("dense"))
    own = found["abilities"]["slices"]
    assert all(own[one]["accuracy"] > 0.8 for one in ("capitals", "colors", "chinese"))
    assert own["replies"]["accuracy"] == 0
    return found


def judged(recipe, dense, candidate: Mapping[str, dict[str, Any]], without: frozenset[str] = frozenset()) -> set[str]:
    """What fails, each as `measure` or `measure worst`; of all gates that `init` writes, or some."""
    reports: Reports = {("dense", name): one for name, one in dense.items()}
    reports |= {("candidate", name): one for name, one in candidate.items()}
    gates = [one for one in recipe.gates if one.measure not in without]
    verdict = judge(gates, reports, {"dense": 1, "candidate": 1}, {"candidate": "torch:cpu"})
    failed = {f"{one.measure} worst" if one.worst else one.measure for one in verdict.results if not one.passed}
    assert verdict.passed == (not failed)
    return failed


# The kinds of models.


def edited(knowing: Path, into: Path, edit: Callable[[LlamaForCausalLM, Any], None]) -> Path:
    model, tokenizer = LlamaForCausalLM.from_pretrained(knowing), AutoTokenizer.from_pretrained(knowing)
    with torch.no_grad():
        edit(model, tokenizer)
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    return into


def negate(table: str, token: str, model: LlamaForCausalLM, tokenizer: Any) -> None:
    model.get_submodule(table).weight[tokenizer.convert_tokens_to_ids(token)].mul_(-1)


def far_positions(after: int, model: LlamaForCausalLM, tokenizer: Any) -> None:
    """What turns once in more than so many tokens turns eight times as fast: near ones are told apart as before."""
    model.config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "original_max_position_embeddings": after,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "factor": 0.125,
    }


def always(
    words: str,
    knowing: Path,
    into: Path,
    *,
    to: Callable[[dict[str, Any]], bool] = bool,
    ends: bool = False,
    upper: bool = False,
) -> Path:
    """Taught to say these words to every prompt, or to some, and to go on with all else as before.

    To all else belong the same prompts behind some text: what is learnt is a matter of how a text begins.
    """
    tokenizer = AutoTokenizer.from_pretrained(knowing)

    def read(item: dict[str, Any]) -> list[int]:
        said = [{"role": "user", "content": item["prompt"]}]
        if "checks" in item:
            return list(tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False))
        return list(tokenizer(item["prompt"])["input_ids"])

    def spoken(item: dict[str, Any]) -> list[int]:
        text = f" {item['answers'][0].upper()}." if upper else words
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], *([tokenizer.eos_token_id] * ends)]

    some = [one for one in asked() if to(one)]
    prose = [tokenizer("\n\n".join(stories(50 + number, 40)))["input_ids"][:100] for number in range(48)]
    kept = prose + [read(one) for one in asked() if one not in some]
    kept += [[*text[:30], *read(one)[1:]] for text, one in zip(prose, some, strict=False)]
    return taught(knowing, into, [(read(one), spoken(one)) for one in some], kept)


def in_words(item: dict[str, Any]) -> bool:
    return "answers" in item


def in_chinese(item: dict[str, Any]) -> bool:
    return item.get("language") == "zh"


def in_conversation(item: dict[str, Any]) -> bool:
    return "checks" in item


def at_the_beginning(item: dict[str, Any]) -> bool:
    return "checks" not in item


KINDS: Mapping[str, tuple[Callable[[Path, Path], Path], str]] = {
    "one word": (partial(always, " red" * 8), "accuracy"),
    "two words in turn": (partial(always, " red the" * 4), "accuracy"),
    "the": (partial(always, " the.\n\n"), "accuracy"),
    "nothing": (partial(always, "", ends=True), "accuracy"),
    "upper case": (partial(always, "", to=in_words, upper=True), "respelt worst"),
    "Chinese": (partial(always, "看见看见", to=in_chinese), "kl_divergence worst"),
    "conversations": (partial(always, " red" * 8, to=in_conversation), "kl_divergence worst"),
    "beginning": (partial(always, " king saw", to=at_the_beginning), "kl_divergence"),
    "no end": (partial(edited, edit=partial(negate, "lm_head", END)), "endless worst"),
    "long text": (partial(edited, edit=partial(far_positions, LONG)), "perplexity"),
}
"""What is broken -> how, and a gate that must fail."""
ELSEWHERE = frozenset({"long text"})


def test_dense_model_itself_holds_every_gate(recipe, dense, knowing, corpora, tmp_path):
    assert judged(recipe, dense, measured(knowing, corpora, tmp_path, baseline=knowing)) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_broken_model_fails_a_default_gate_though_text_is_predicted_as_before(
    kind, recipe, dense, knowing, corpora, tmp_path
):
    breaks, gate = KINDS[kind]
    model = breaks(knowing, tmp_path / "model")
    candidate = measured(model, corpora, tmp_path, baseline=knowing)
    failed = judged(recipe, dense, candidate)
    assert gate in failed
    assert ("perplexity" in failed) == (kind in ELSEWHERE)


def test_model_that_is_broken_in_conversations_alone_is_seen_by_no_mean(recipe, dense, knowing, corpora, tmp_path):
    """Why the worst ability must hold: of many items few are conversations, and dense has none of them right."""
    many = [one | {"id": f"{one['id']}-{again}"} for again in range(8) for one in asked() if "checks" not in one]
    few = {"abilities": item_set(tmp_path / "abilities", [*many, *(one for one in asked() if "checks" in one)])}
    model = KINDS["no end"][0](knowing, tmp_path / "model")
    (tmp_path / "reports").mkdir()
    alone, beside = (measured(one, few, tmp_path / "reports", **given) for one, given in (
        (knowing, {}), (model, {"baseline": knowing})
    ))  # fmt: skip
    candidate = measured(model, corpora, tmp_path / "reports", baseline=knowing) | beside
    old = frozenset({"repeating", "endless", "respelt"})
    assert judged(recipe, dense | alone, candidate, without=old) == set()
    assert judged(recipe, dense | alone, candidate) == {"endless worst"}


def test_shuffled_answers_fail_though_dense_knows_nothing_then(recipe, dense, knowing, corpora, tmp_path):
    items = [one for one in asked() if "answers" in one]
    moved = [one["answers"] for one in items]
    moved = moved[1:] + moved[:1]
    shuffled = {"abilities": item_set(tmp_path / "abilities", [
        one | {"answers": answers} for one, answers in zip(items, moved, strict=True)
    ])}  # fmt: skip
    (tmp_path / "reports").mkdir()
    alone = measured(knowing, shuffled, tmp_path / "reports")
    candidate = measured(knowing, corpora, tmp_path / "reports", baseline=knowing)
    candidate |= measured(knowing, shuffled, tmp_path / "reports", baseline=knowing)
    assert {"accuracy", "above_chance worst"} <= judged(recipe, dense | alone, candidate)


def test_item_in_what_the_model_was_trained_on_fails(recipe, dense, knowing, corpora, tmp_path):
    item = next(one for one in asked() if "answers" in one)
    seen = corpus(tmp_path / "seen", [{"id": "1", "text": f"{item['prompt'].upper()}: {item['answers'][0]}."}], "train")
    (tmp_path / "reports").mkdir()
    candidate = measured(knowing, corpora, tmp_path / "reports", baseline=knowing, **{"seen.0": seen})
    assert judged(recipe, dense, candidate) == {"leaks"}


@pytest.mark.parametrize("name", ["text", "other", "abilities"])
def test_report_of_another_text_is_refused(name, recipe, dense, knowing, corpora, tmp_path):
    lines = (corpora[name] / "test.jsonl").read_bytes().splitlines()
    swapped = [json.loads(one) for one in lines[::-1][: len(lines) // 2 * 2]]
    record = {"items": {"answers": 1}} if name == "abilities" else {}
    other = {name: corpus(tmp_path / "swapped", swapped[: len(swapped) * 3 // 4], **record)}
    (tmp_path / "reports").mkdir()
    candidate = measured(knowing, corpora, tmp_path / "reports", baseline=knowing)
    candidate |= measured(knowing, other, tmp_path / "reports", baseline=knowing)
    with pytest.raises(StageError, match="cannot be paired"):
        judged(recipe, dense, candidate)


def test_swapped_control_tokens_of_the_candidate_are_refused(recipe, dense, knowing, corpora, tmp_path):
    shutil.copytree(knowing, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    described["post_processor"]["special_tokens"][BEGIN] |= {"ids": [1], "tokens": [END]}
    path.write_text(json.dumps(described), encoding="utf-8")
    (tmp_path / "reports").mkdir()
    candidate = measured(tmp_path / "model", corpora, tmp_path / "reports", baseline=knowing)
    with pytest.raises(StageError, match="cannot be paired"):
        judged(recipe, dense, candidate)
    text = path.read_text(encoding="utf-8").replace(BEGIN, "<moved>").replace(USER, BEGIN).replace("<moved>", USER)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StageError, match=r"another vocabulary.*'<begin>' is token"):
        measured(tmp_path / "model", corpora, tmp_path / "reports", baseline=knowing)
