"""Items put to a tiny model, held against what transformers answers to each of them alone."""

import json
import math
import re
import shutil

import pytest
import torch
from scipy.special import log_softmax, rel_entr
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.measures.items import Item
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from stages.validate.params import ValidateParams
from stages.validate.stage import VALIDATE
from tests.stages.models.families import family

WORDS = (
    "The import statement is",
    "If the object",
    "is the same as",
    "The name of the",
    "Changed in",
    "A class definition is an",
)


@pytest.fixture(scope="module")
def theirs(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny)


def said(theirs, prompt, new=12):
    model, tokenizer = theirs
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens=new, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def logits(theirs, text):
    model, tokenizer = theirs
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return ids[0].numpy(), model(input_ids=ids).logits[0].double().numpy()


@pytest.fixture(scope="module")
def items(theirs):
    """Half of the answers are what the model says, half something else; choices of which one is likelier."""
    made = []
    for number, prompt in enumerate(WORDS):
        word = re.match(r"\w+", said(theirs, prompt).strip())[0]
        answers = (word,) if number % 2 else ("Zanzibar", "Ouagadougou")
        made.append(Item(id=f"a{number}", ability="odd" if number % 2 else "even", prompt=prompt, answers=answers))
        choices = (f" {word} of the", " Zanzibar", " xylophone quartz")
        made.append(
            Item(id=f"c{number}", ability="choice", task="choices", prompt=prompt, choices=choices, right=number % 3)
        )
    check = ({"demand": "words_at_least", "value": 1},)
    made.append(Item(id="i", ability="told", task="instructions", prompt="Say a word.", checks=check))
    return made


def folder_of(items, folder, split="test"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(f"{one.model_dump_json()}\n" for one in items), encoding="utf-8")
    (folder / "corpus.json").write_text(json.dumps({"digest": "d", "items": {"answers": len(items)}}))
    return folder


def asked(tmp_path, model, items, params=None, **given):
    output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    output.mkdir()
    inputs = {"model": model, "text": folder_of(items, tmp_path / "items")} | given
    VALIDATE.run(params or ValidateParams(), inputs, output, Silent())
    return json.loads((output / "report.json").read_text())


def test_answers_are_right_where_the_model_says_what_is_accepted(tiny, theirs, items, tmp_path):
    report = asked(tmp_path, tiny, items)
    documents = report["documents"]
    assert [one["id"].rpartition("-")[0] for one in documents] == [one.id for one in items], "in the set's order"
    for one, item in zip(documents, items, strict=True):
        assert (one["slice"], one["prompt"], one["chance"]) == (item.ability, item.prompt, item.chance)
        if item.task == "answers":
            assert one["right"] == (item.ability == "odd")
            assert said(theirs, item.prompt, 30).startswith(one["answer"]) and one["answer"].strip()
            assert one["expected"] == item.answers[0]
    found = report["slices"]["odd"]
    assert found == {"accuracy": 1, "accuracy_by_length": 1, "above_chance": 1, "leaks": 0, "repetition": 0}
    assert report["slices"]["even"]["accuracy"] == 0
    assert report["measures"]["accuracy"] == sum(one["right"] for one in documents) / len(items)
    chance = sum(one.chance for one in items) / len(items)
    assert report["measures"]["above_chance"] == pytest.approx(report["measures"]["accuracy"] - chance)


def test_answer_to_an_instruction_has_ended_where_the_model_ends_it(knowing, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(knowing), AutoTokenizer.from_pretrained(knowing)
    words = ("What of the king?", "The capital of", "What of the river?", "Tell me")
    check = ({"demand": "words_at_least", "value": 1},)
    items = [Item(id=one, ability="told", task="instructions", prompt=one, checks=check) for one in words]
    documents = asked(tmp_path, knowing, items)["documents"]
    for one, word in zip(documents, words, strict=True):
        said = [{"role": "user", "content": word}]
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        out = model.generate(ids, do_sample=False, max_new_tokens=32)[0, ids.shape[1] :].tolist()
        assert one["ended"] == (tokenizer.eos_token_id in out)
        assert one["answer"] == tokenizer.decode(out, skip_special_tokens=True)
        assert one["said"] == " ".join(map(str, out))
    shutil.copytree(knowing, tmp_path / "endless")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "endless" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
    assert sum(one["ended"] for one in documents) > 1
    assert not any(one["ended"] for one in asked(tmp_path, tmp_path / "endless", items)["documents"])


def test_answer_in_another_case_is_right_and_spelt_otherwise(tiny, theirs, tmp_path):
    word = re.match(r"\w+", said(theirs, WORDS[0]).strip())[0]
    items = [Item(id=one, ability="odd", prompt=WORDS[0], answers=(one,)) for one in (word, word.upper())]
    found = asked(tmp_path, tiny, items)["documents"]
    assert [(one["right"], one["spelt"]) for one in found] == [(1, 1), (1, 0)]


def test_choice_is_the_likeliest_continuation(tiny, theirs, items, tmp_path):
    found = {one["id"].rpartition("-")[0]: one for one in asked(tmp_path, tiny, items)["documents"]}
    by_length = set()
    for item in items:
        if item.task != "choices":
            continue
        start, sums, means = len(logits(theirs, item.prompt)[0]), [], []
        for choice in item.choices:
            ids, rows = logits(theirs, item.prompt + choice)
            each = [log_softmax(rows[at - 1])[ids[at]] for at in range(start, len(ids))]
            sums.append(sum(each))
            means.append(sum(each) / len(each))
        one = found[item.id]
        assert one["answer"] == item.choices[sums.index(max(sums))]
        assert one["right"] == (sums.index(max(sums)) == item.right)
        assert one["right_by_length"] == (means.index(max(means)) == item.right)
        assert one["said"] == str(sums.index(max(sums)))
        by_length.add((one["right"], one["right_by_length"]))
    assert len(by_length) > 1


def test_divergence_is_of_each_position_of_the_prompts(tiny, theirs, items, tmp_path):
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.3)
    model.save_pretrained(other)
    theirs[1].save_pretrained(other)
    report = asked(tmp_path, other, items[:4], baseline=tiny)
    total = 0
    for one, item in zip(report["documents"], items, strict=False):
        ids, p = logits(theirs, item.prompt)
        _, q = logits((model.eval(), theirs[1]), item.prompt)
        kl = rel_entr(*(math.e ** log_softmax(rows, axis=-1) for rows in (p, q))).sum()
        assert (one["kl"], one["tokens"]) == (pytest.approx(kl, rel=1e-3), len(ids))
        total += kl / sum(len(logits(theirs, item.prompt)[0]) for item in items[:4])
    assert report["measures"]["kl_divergence"] == pytest.approx(total, rel=1e-3)
    assert asked(tmp_path, tiny, items[:4], baseline=tiny)["measures"]["kl_divergence"] == 0


@pytest.mark.parametrize("variants", [(), ("case",)])
def test_report_has_the_same_bytes_in_parts_and_after_a_kill(tiny, items, tmp_path, variants):
    many = [one.model_copy(update={"id": f"{one.id}.{again}"}) for again in range(4) for one in items]
    inputs = {"model": tiny, "baseline": tiny, "text": folder_of(many, tmp_path / "items")}
    params, whole = ValidateParams(variants=variants), tmp_path / "whole"
    whole.mkdir()
    VALIDATE.run(params, inputs, whole, Silent())
    count = VALIDATE.divided.count(params, inputs)
    assert count == (4 if variants else 2), "52 items, 32 side by side"
    from stages.runtime.parts import FOLDER, keep

    for left in range(count):
        parted = tmp_path / f"parted{left}"
        keep(
            parted / FOLDER,
            range(left, left + 1),
            VALIDATE.divided.part(params, inputs, range(left, left + 1), Silent()),
        )
        VALIDATE.run(params, inputs, parted, Silent())
        assert (parted / "report.json").read_bytes() == (whole / "report.json").read_bytes()
    spoiled = tmp_path / "spoiled"
    keep(spoiled / FOLDER, range(0, 1), VALIDATE.divided.part(params, inputs, range(1, 2), Silent()))
    VALIDATE.run(params, inputs, spoiled, Silent())
    assert (spoiled / "report.json").read_bytes() == (whole / "report.json").read_bytes()


def test_first_items_are_asked_where_no_more_are_wanted(tiny, items, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    inputs = {"model": tiny, "text": folder_of(items, tmp_path / "items")}
    VALIDATE.run(ValidateParams(items=3), inputs, output, Silent())
    documents = json.loads((output / "report.json").read_text())["documents"]
    assert [one["id"].rpartition("-")[0] for one in documents] == [one.id for one in items[:3]]


def test_other_question_has_another_document(tiny, items, tmp_path):
    first = asked(tmp_path, tiny, items[:1])["documents"][0]["id"]
    changed = items[0].model_copy(update={"answers": ("Paris",)})
    assert asked(tmp_path, tiny, [changed])["documents"][0]["id"] != first


def test_item_that_is_longer_than_the_model_reads_is_left_out_and_said(tiny, items, tmp_path):
    long = Item(id="long", ability="a", prompt="word " * 5000, answers=("x",))
    report = asked(tmp_path, tiny, [items[0], long, items[1]])
    assert [one["id"].rpartition("-")[0] for one in report["documents"]] == [items[0].id, items[1].id]
    assert report["left_out"] == ["long"]
    with pytest.raises(StageError, match="can read none of the items"):
        asked(tmp_path, tiny, [long])


def test_model_that_continues_no_text_is_refused(items, tmp_path):
    with pytest.raises(StageError, match="no items can be put to such a model"):
        asked(tmp_path, family("bert_masked", tmp_path), items)


def test_item_that_the_model_was_trained_on_is_a_leak(tiny, items, tmp_path):
    seen = tmp_path / "seen"
    seen.mkdir()
    known = Item(id="k", ability="odd", prompt="The capital of the land of Oz is", answers=("Emerald City",))
    lines = [
        {"id": "1", "text": "Nothing of this."},
        {"id": "2", "messages": [{"role": "user", "content": "THE capital of the land of Oz, is: Emerald city!"}]},
    ]
    (seen / "train.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    report = asked(tmp_path, tiny, [*items[:3], known], **{"seen.0": seen})
    assert [one["leaked"] for one in report["documents"]] == [0, 0, 0, 1]
    assert report["measures"]["leaks"] == 0.25
    # Of two passages that follow each other windows make one text.
    parts = ["Of kings and rivers. The capital of the land of Oz", "is: Emerald City. It is far away."]
    rows = [{"id": f"a#{n}", "text": text, "source": "a"} for n, text in enumerate(parts)]
    for row, leaked in (({}, 1), ({"source": "b"}, 0)):
        (seen / "train.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in (rows[0], rows[1] | row)))
        report = asked(tmp_path, tiny, [known], **{"seen.0": seen})
        assert report["documents"][0]["leaked"] == leaked
    (seen / "train.jsonl").rename(seen / "test.jsonl")  # what it is judged by taught it nothing
    assert asked(tmp_path, tiny, [known], **{"seen.0": seen})["measures"]["leaks"] == 0
