"""corpus: what a model writes itself, held against transformers' own reading of it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stages.admission import Asked, admitted
from stages.corpus import self_written
from stages.corpus.stage import CORPUS
from stages.models.text import writing
from stages.models.text.openings import openings
from stages.runtime.artifacts import Store
from stages.runtime.contract import PARTIAL, Image, StageError
from stages.runtime.execute import work_of
from stages.runtime.parts import kept
from stages.runtime.progress import Silent
from tests.conftest import Seal
from tests.stages.corpus.test_stage import HALVES, read
from tests.stages.models.families import family
from tests.stages.models.text.test_writing import CHAT

PARAMS = {"source": "model://self", "splits": HALVES, "samples": 70, "sample_tokens": 32}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 on every processor, as transformers is asked, too."""
    monkeypatch.setattr(self_written, "SHORT", torch.float32)


@pytest.fixture(scope="module")
def speaker(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("speaker") / "model"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def run(folder: Path, output: Path, progress: Any = None, **params: Any) -> dict[str, bytes]:
    """The files that the stage writes."""
    output.mkdir(exist_ok=True)
    CORPUS.run(CORPUS.params.model_validate(PARAMS | params), {"model": folder}, output, progress or Silent())
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def lines(files: dict[str, bytes]) -> list[dict[str, Any]]:
    found = [io.BytesIO(files[name]) for name in sorted(files) if name.endswith(".jsonl")]
    return [json.loads(line) for some in found for line in some]


def test_corpus_of_a_model_s_own_text_is_sealed_and_bound_to_the_model(
    seal: Seal, store: Store, speaker: Path, tiny: Path
) -> None:
    dense = seal("fetch", {"source": speaker.as_uri()})
    outcome = seal("corpus", PARAMS, model=dense.identity)
    splits = read(store, outcome.identity)
    assert set(splits) == set(HALVES) and all(splits.values())
    assert outcome.manifest.work.inputs == {"model": dense.identity}
    assert {"torch", "pyarrow"} <= outcome.manifest.work.requires.keys()
    assert seal("corpus", PARAMS, model=dense.identity).cached
    other = seal("fetch", {"source": tiny.as_uri()})
    changed = [seal("corpus", PARAMS, model=other.identity)]
    changed += [seal("corpus", PARAMS | {"seed": 1}, model=dense.identity)]
    assert len({outcome.identity, *(one.identity for one in changed)}) == 3
    ids = [line["id"] for some in splits.values() for line in some]
    assert len(ids) == len(set(ids)) == outcome.manifest.metrics["passages"] > 50


def test_half_are_conversations_as_messages_and_all_are_read_from_their_beginning(
    speaker: Path, tmp_path: Path
) -> None:
    found = lines(run(speaker, tmp_path / "out"))
    said = [line["messages"] for line in found if "messages" in line]
    assert abs(len(said) - len(found) / 2) <= 3 and all(line["begins"] for line in found)
    assert all([one["role"] for one in messages] == ["user", "assistant"] for messages in said)
    texts = [one["content"] for messages in said for one in messages] + [x["text"] for x in found if "text" in x]
    assert all(text == text.strip() != "" and "\ufffd" not in text and "<end>" not in text for text in texts)


def test_same_seed_writes_the_same_bytes_and_another_one_other_text(speaker: Path, tmp_path: Path) -> None:
    first = run(speaker, tmp_path / "1")
    assert run(speaker, tmp_path / "2") == first
    other = {line.get("text") for line in lines(run(speaker, tmp_path / "3", seed=1)) if "text" in line}
    assert other.isdisjoint({line.get("text") for line in lines(first) if "text" in line})


class Ended(Exception):
    """The run was ended."""


class Stopping(Silent):
    """Ends the run once so much is done."""

    def __init__(self, at: float) -> None:
        self.at, self.heard = at, []

    def advanced(self, done: float, total: float) -> None:
        self.heard.append(done / total)
        if done >= self.at:
            raise Ended


def test_run_that_was_ended_goes_on_behind_the_last_batch_to_the_same_bytes(
    speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "MOST_TOGETHER", 32)
    whole = run(speaker, tmp_path / "whole")
    with pytest.raises(Ended):
        run(speaker, tmp_path / "ended", Stopping(at=40))
    spans = [span for span, _ in kept(tmp_path / "ended" / PARTIAL / "written-")]
    assert spans == [range(32), range(32, 35)]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "ended" / PARTIAL / "written-").iterdir()}
    heard = Stopping(at=1000)
    assert run(speaker, tmp_path / "ended", heard) == whole
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())
    assert heard.heard == sorted(heard.heard) and heard.heard[0] * 73 == 32 and heard.heard[-1] == 1


def test_least_likely_tenth_of_each_kind_and_duplicates_are_out(speaker: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    files = run(speaker, output)
    model = AutoModelForCausalLM.from_pretrained(speaker, dtype=torch.float32)
    kinds = openings(AutoTokenizer.from_pretrained(speaker), model.config)
    written = [one for _, data in kept(output / PARTIAL / "written-") for one in json.loads(data)]
    assert [one["number"] for one in written] == list(range(70))
    record = json.loads(files["corpus.json"])["written"]
    assert record["samples"] == 70 and record["duplicates"] == 0 and record["dtype"] == "float32"
    present = {int(line["id"].partition("#")[0]) for line in lines(files)}
    for opening, some in zip(kinds, (written[:35], written[35:]), strict=True):
        means: dict[int, float] = {}
        for one in some:
            parts = [*one["parts"]]
            if not all(parts) or len(parts) != (2 if opening.turn else 1):
                continue
            ids = [*opening.first]
            own: list[int] = []
            for part in parts:
                own += range(len(ids), len(ids) + len(part))
                ids += [*part, *(opening.turn if part is parts[0] else ())]
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            means[one["number"]] = sum(float(log_p[n - 1, ids[n]]) for n in own) / len(own)
        out = {number for number in means if number not in present}
        assert out == set(sorted(means, key=means.__getitem__)[: len(means) // 10]) and len(out) == 3
    assert record["least_likely"] == 6 and record["kept"] == len(present)


def test_sharp_model_that_repeats_itself_leaves_one_of_its_texts(speaker: Path, tmp_path: Path) -> None:
    files = run(speaker, tmp_path / "out", temperature=1e-4, nucleus=0.05, splits={"train": 1.0}, samples=20)
    record = json.loads(files["corpus.json"])
    assert record["written"]["kept"] == 2 and record["written"]["duplicates"] == 18 and len(lines(files)) == 2


def test_no_paragraph_of_own_text_stands_in_two_splits(speaker: Path, tmp_path: Path) -> None:
    files = run(speaker, tmp_path / "out", samples=200, sample_tokens=24, temperature=0.3)
    splits = [
        {part for line in lines({name: files[name]}) for part in line.get("text", "").lower().split("\n\n") if part}
        for name in ("validate.jsonl", "test.jsonl")
    ]
    assert all(splits) and splits[0].isdisjoint(splits[1])
    assert json.loads(files["corpus.json"])["duplicates_removed"] > 0


def test_model_of_random_weights_writes_text_that_is_sound(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "random")
    config = LlamaConfig.from_pretrained(tiny)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "random")
    found = lines(run(tmp_path / "random", tmp_path / "out"))
    assert len(found) > 50
    for line in found:
        assert "\ufffd" not in line["text"] and not any(ord(one) < 32 and one not in "\n\t" for one in line["text"])


def test_model_that_says_nothing_is_refused(tiny: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(tiny)
    silent = LlamaForCausalLM(config)
    with torch.no_grad():
        # Every state is one direction, and only the end's row of the table points there.
        silent.model.embed_tokens.weight.zero_()
        silent.model.embed_tokens.weight[:, 0] = -1
        silent.model.embed_tokens.weight[config.eos_token_id, 0] = 100
        for block in silent.model.layers:
            block.self_attn.o_proj.weight.zero_(), block.mlp.down_proj.weight.zero_()
    shutil.copytree(tiny, tmp_path / "silent")
    silent.save_pretrained(tmp_path / "silent")
    with pytest.raises(StageError, match=r"nothing that LlamaForCausalLM wrote is text.*Judge the checkpoint"):
        run(tmp_path / "silent", tmp_path / "out")


def asked(folder: Path, role: str = "model", **params: Any) -> dict[str, str | None] | None:
    dense = Asked(name="dense", stage="fetch", params={"source": folder.as_uri()}, inputs={})
    text = Asked(name="text", stage="corpus", params=PARAMS | params, inputs={role: "dense"} if role else {})
    return admitted([dense, text])[1].refusal


@pytest.mark.parametrize("name", ["bert_masked", "bert_classes", "t5"])
def test_model_that_does_not_go_on_with_a_text_is_refused_at_admission_and_by_the_work(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    folder = family(name, tmp_path)
    with pytest.raises(StageError, match=r"does not go on with a text.*in place of model://self"):
        run(folder, tmp_path / "out", sample_tokens=16)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / file, folder)
    refused = asked(folder, sample_tokens=16)
    assert refused and "does not go on with a text" in refused["what"] and "its task is" in refused["measured"]
    assert "in place of model://self" in refused["remedy"]


def test_samples_that_the_model_cannot_read_or_that_have_no_room_are_refused(speaker: Path, tmp_path: Path) -> None:
    assert asked(speaker) is None
    refused = asked(speaker, sample_tokens=513)
    assert refused and (refused["measured"], refused["limit"]) == ("513", "512")
    with pytest.raises(StageError, match=r"no room for text.*measured 8 tokens; limit \d+ tokens"):
        run(speaker, tmp_path / "out", sample_tokens=8)


def test_own_text_without_a_model_and_a_model_without_own_text_are_refused(speaker: Path, tmp_path: Path) -> None:
    missing = asked(speaker, role="")
    assert missing and "no model is given" in missing["what"]
    needless = asked(speaker, source="pydoc://topics")
    assert needless and "nothing to write" in needless["what"] and "pydoc://topics" in needless["measured"]
    with pytest.raises(StageError, match="no model is given"):
        CORPUS.run(CORPUS.params.model_validate(PARAMS), {}, tmp_path, Silent())


def test_only_a_corpus_that_a_model_writes_needs_torch_and_the_code_of_models() -> None:
    plain = CORPUS.params.model_validate({"source": "pydoc://topics", "splits": HALVES})
    own, mixed = (
        CORPUS.params.model_validate(PARAMS),
        CORPUS.params.model_validate(
            {
                "splits": HALVES,
                "sources": [{"source": "pydoc://topics", "share": 0.5}, {"source": "model://self", "share": 0.5}],
            }
        ),
    )
    assert [CORPUS.image_of(one) for one in (plain, own, mixed)] == [Image.BASE, Image.TORCH, Image.TORCH]
    works = [work_of(CORPUS, one, {}) for one in (plain, own, mixed)]
    assert works[0].code != works[1].code == works[2].code
    assert "torch" not in works[0].requires and works[0].requires.items() < works[1].requires.items()
    code = (
        "import sys; from pathlib import Path; from stages.corpus.stage import CORPUS as c; "
        "from stages.runtime.progress import Silent; import tempfile; "
        "p = c.params.model_validate({'source': 'pydoc://topics', 'splits': {'test': 1.0}}); "
        "c.run(p, {}, Path(tempfile.mkdtemp()), Silent()); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.fault
def test_killed_while_it_writes_ends_in_the_bytes_of_a_run_that_nothing_disturbed(
    speaker: Path, tmp_path: Path
) -> None:
    from tests.stages.test_killed import start

    params = PARAMS | {"sample_tokens": 64}
    with start("corpus", params, {"model": speaker}, tmp_path / "killed") as first:
        assert first.stdout is not None
        for line in first.stdout:
            if float(line.partition(" of ")[0]) >= 40:
                break
        first.kill()
    assert first.returncode == -9 and not (tmp_path / "killed" / "corpus.json").exists()
    with (
        start("corpus", params, {"model": speaker}, tmp_path / "killed") as again,
        start("corpus", params, {"model": speaker}, tmp_path / "whole") as whole,
    ):
        said = again.communicate()[0]
        whole.communicate()
    assert again.returncode == whole.returncode == 0 and float(said.partition(" of ")[0]) >= 32
    files = [{p.name: p.read_bytes() for p in (tmp_path / run).iterdir() if p.is_file()} for run in ("killed", "whole")]
    assert files[0] == files[1]
