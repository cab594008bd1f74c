"""recover judged by every source of a mix: the step is kept whose worst source is best, or none."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from stages.models.checkpoint.loading import load_model, load_tokenizer
from stages.models.memory.saved_state import save_state
from stages.recover.held_out import left, worst
from stages.recover.params import RecoverParams
from stages.recover.stage import recover
from stages.runtime.contract import PARTIAL, StageError
from stages.runtime.progress import Silent
from tests.stages.recover.test_stage import PARAMS, Heard, Stopped, folders, sealed  # noqa: F401
from tests.tiny import reference_text

EVERY = {"check_every_steps": 2, "patience": 99, "learning_rate": 5e-4}
COSTLY = 1.2e-3
"""A rate at which what is learned of one source is forgotten of the other."""


def mix(folder, train):
    """Prose and what is none, half and half; the train split holds one or both."""
    folder.mkdir()
    rng = random.Random(0)
    prose = [{"source": "prose", "text": one} for one in reference_text().split("\n\n")[:400]]
    odd = [
        {
            "source": "odd",
            "text": " ".join("".join(rng.choices("0123456789#+*/", k=rng.randint(1, 4))) for _ in range(60)),
        }
        for _ in range(120)
    ]
    parts = {"prose": prose[:300], "odd": odd[:80]}
    splits = {
        "train": parts[train] if train in parts else [*prose[:300], *odd[:80]],
        "validate": prose[300:] + odd[80:],
    }
    for name, rows in splits.items():
        lines = [json.dumps({"id": f"{name}-{n}"} | row) + "\n" for n, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    shares = {"prose": {"share": 0.5}, "odd": {"share": 0.5}}
    (folder / "corpus.json").write_text(json.dumps({"sources": shares}))
    return folder


@torch.no_grad()
def kl_of(student, teacher, corpus, source):
    """Of a source's held-out windows, read and cut here, in float64."""
    tokenizer = load_tokenizer(teacher)
    rows = [json.loads(line) for line in (corpus / "validate.jsonl").read_text().splitlines()]
    ids = [one for row in rows if row["source"] == source for one in tokenizer(f"{row['text']}\n\n").input_ids]
    ids_NT = torch.tensor(ids[: 8 * 64]).view(8, 64)
    p, q = (load_model(one)(input_ids=ids_NT).logits.double().log_softmax(-1) for one in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def curves(heard):
    """Step -> source -> held-out KL, and step -> the worst that was told."""
    found: dict[int, dict[str, float]] = {}
    told = {}
    for name, value, step in heard.points:
        if name == "worst_held_out":
            told[step] = value
        elif name.endswith("_held_out"):
            found.setdefault(step, {})[name.removeprefix("kl_text_").removesuffix("_held_out")] = value
    return found, told


@pytest.fixture(scope="module")
def odd_alone(folders, tmp_path_factory):  # noqa: F811
    """A run that learns from one of two sources: inputs, output, metrics, what was heard."""
    root, heard = tmp_path_factory.mktemp("odd"), Heard()
    inputs = folders | {"text": mix(root / "text", "odd")}
    metrics = recover(RecoverParams(**PARAMS | EVERY), inputs, root / "out", heard)
    return inputs, root / "out", metrics, heard


def test_each_source_is_judged_by_its_own_windows(odd_alone):
    inputs, output, metrics, _ = odd_alone
    for source in ("prose", "odd"):
        for when, student in (("before", inputs["model"]), ("after", output)):
            expected = kl_of(student, inputs["teacher"], inputs["text"], source)
            # heads and states in bfloat16: a few thousandths of a nat
            assert metrics[f"kl_text_{source}_{when}"] == pytest.approx(expected, rel=0.1, abs=0.004)
    assert metrics["kl_before"] == pytest.approx((metrics["kl_text_prose_before"] + metrics["kl_text_odd_before"]) / 2)


def test_the_step_is_kept_whose_worst_source_has_least_left_of_what_it_lost(odd_alone):
    _, _, metrics, heard = odd_alone
    found, told = curves(heard)
    rest = {step: max(now[name] / found[0][name] for name in now) for step, now in found.items()}
    assert sorted(found) == list(range(0, 13, 2))
    assert told == pytest.approx(rest)
    assert metrics["best_step"] == min(rest, key=rest.get)
    assert metrics["worst_after"] == pytest.approx(min(rest.values()))
    assert metrics["kl_text_odd_after"] == found[metrics["best_step"]]["odd"]
    said = next(note for note in heard.notes if note.startswith("held-out KL by source"))
    assert f"{metrics['kl_text_odd_before']:.4f} to {metrics['kl_text_odd_after']:.4f}" in said
    assert f"text_prose won least, {metrics['worst_after']:.0%}" in said


def test_what_one_source_wins_at_the_cost_of_another_is_not_kept(folders, tmp_path):  # noqa: F811
    heard = Heard()
    inputs = folders | {"text": mix(tmp_path / "text", "odd")}
    metrics = recover(RecoverParams(**PARAMS | EVERY | {"learning_rate": COSTLY}), inputs, tmp_path / "out", heard)
    found, _ = curves(heard)
    assert any(now["odd"] < 0.5 * found[0]["odd"] for now in found.values())
    assert any(sum(now.values()) < 0.9 * sum(found[0].values()) for now in found.values())  # a mean would keep it
    assert all(now["prose"] > found[0]["prose"] for step, now in found.items() if step)
    assert metrics["best_step"] == metrics["changed_tensors"] == 0
    assert metrics["worst_after"] == 1
    said = next(note for note in heard.notes if "the weights stay as they came" in note)
    assert "without another one getting worse" in said and "text_odd to" in said and "text_prose to" not in said
    old, new = (dict(load_model(one).named_parameters()) for one in (inputs["model"], tmp_path / "out"))
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_patience_ends_where_the_worst_source_gets_no_better(folders, tmp_path):  # noqa: F811
    heard = Heard()
    how = {"check_every_steps": 2, "patience": 2, "learning_rate": COSTLY}
    inputs = folders | {"text": mix(tmp_path / "text", "odd")}
    metrics = recover(RecoverParams(**PARAMS | how), inputs, tmp_path / "out", heard)
    found, _ = curves(heard)
    assert found[4]["odd"] < found[2]["odd"]  # still better, of itself
    assert metrics["steps"] == 4


def test_another_text_counts_as_a_source(folders, tmp_path):  # noqa: F811
    heard = Heard()
    inputs = folders | {"text": mix(tmp_path / "text", "both"), "other": folders["text"]}
    metrics = recover(RecoverParams(**PARAMS), inputs, tmp_path / "out", heard)
    names = {name for name, *_ in heard.points if name.endswith("held_out")}
    assert names == {"kl_text_prose_held_out", "kl_text_odd_held_out", "kl_other_held_out", "worst_held_out"}
    rest = [metrics[f"kl_{one}_after"] / metrics[f"kl_{one}_before"] for one in ("text_prose", "text_odd", "other")]
    assert metrics["worst_after"] == pytest.approx(max(rest), rel=1e-6)
    assert metrics["worst_after"] < 1


@pytest.mark.parametrize("at", [3, 8])
def test_a_run_that_was_cut_off_ends_in_the_same_bytes(odd_alone, tmp_path, at):
    class Stopper(Silent):
        def metric(self, name, value, step):
            if name == "kl" and step == at:
                raise Stopped

    inputs, output, metrics, _ = odd_alone
    params = RecoverParams(**PARAMS | EVERY)
    with pytest.raises(Stopped):
        recover(params, inputs, tmp_path / "out", Stopper())
    assert recover(params, inputs, tmp_path / "out", Silent()) == metrics
    assert sealed(tmp_path / "out") == sealed(output)


def test_a_corpus_of_one_named_source_is_as_one_without_a_name(folders, tmp_path):  # noqa: F811
    heard, outputs = Heard(), [tmp_path / "plain", tmp_path / "named"]
    named = Path(shutil.copytree(folders["text"], tmp_path / "text"))
    for split in ("train", "validate"):
        rows = [json.loads(line) for line in (named / f"{split}.jsonl").read_text().splitlines()]
        lines = [json.dumps(row | {"source": "prose"}) + "\n" for row in rows]
        (named / f"{split}.jsonl").write_text("".join(lines))
    (named / "corpus.json").write_text(json.dumps({"sources": {"prose": {"share": 1.0}}}))
    params = RecoverParams(**PARAMS | {"tokens": 4 * 256})
    plain = recover(params, folders, outputs[0], Silent())
    assert recover(params, folders | {"text": named}, outputs[1], heard) == plain
    assert sealed(outputs[0]) == sealed(outputs[1])
    assert {name for name, *_ in heard.points if name.endswith("held_out")} == {"kl_text_held_out"}


def test_best_weights_that_are_not_those_that_were_chosen_are_refused(folders, tmp_path):  # noqa: F811
    class Vandal(Silent):
        best = 1.0

        def metric(self, name, value, step):
            if name == "worst_held_out" and value > self.best < 1:  # the best one was written at a check before
                file = next((tmp_path / "out" / PARTIAL).glob("best-*.safetensors"))
                save_state(file, {n: one * 2 for n, one in load_model(folders["model"]).named_parameters()}, {})
            self.best = min(self.best, value) if name == "worst_held_out" else self.best

    rising = {"learning_rate": 0.01, "warmup_steps": 60, "tokens": 60 * 256, "check_every_steps": 2, "patience": 2}
    inputs = folders | {"text": mix(tmp_path / "text", "both")}
    with pytest.raises(StageError, match=r"the student that is kept is worse on text_\w+ than the one.*at step \d"):
        recover(RecoverParams(**PARAMS | rising), inputs, tmp_path / "out", Vandal())
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_source_is_measured_by_its_own_beginning():
    before = {"easy": 0.1, "hard": 2.0}
    # The hard one loses more in nats, and has won more of what it lost.
    assert left({"easy": 0.08, "hard": 1.0}, before) == {"easy": pytest.approx(0.8), "hard": 0.5}
    assert (
        worst({"easy": 0.05, "hard": 1.2}, before) < worst({"easy": 0.09, "hard": 0.5}, before) < worst(before, before)
    )


@pytest.mark.parametrize("now", [{"a": float("nan"), "b": 0.1}, {"a": 0.1, "b": float("nan")}])
def test_a_score_that_is_no_number_is_the_worst(now):
    assert worst(now, {"a": 1.0, "b": 1.0}) == float("inf")


def test_a_source_that_lost_next_to_nothing_does_not_decide_until_it_has():
    before = {"kept": 0.001, "lost": 0.5}
    assert worst({"kept": 0.002, "lost": 0.4}, before) == pytest.approx(0.8)
    assert worst({"kept": 0.02, "lost": 0.4}, before) == pytest.approx(2)
    assert worst({"kept": -0.3, "lost": 0.4}, {"kept": -0.2, "lost": 0.5}) == pytest.approx(0.8)
