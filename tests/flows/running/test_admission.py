"""Whether a recipe's steps can take what the steps before them will make, before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flows.recipe.expand import expanded
from flows.recipe.model import Recipe
from flows.running import admission
from flows.running.admission import ask, refuse_inadmissible
from flows.running.plan import resolve
from stages import stage as definition
from stages.admission import Answer, Asked
from stages.models.checkpoint.loading import load_model
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.benchmarks.families import checkpoint
from tests.stages.models.families import FAMILIES, WIDER

TEXT = {"source": "pydoc://topics", "splits": dict.fromkeys(("calibrate", "train", "validate", "test"), 0.25)}


def recipe(folder: Path, *steps: dict[str, object], **more: object) -> Recipe:
    given = [
        {"name": "dense", "stage": "fetch", "params": {"source": str(folder)}},
        {"name": "text", "stage": "corpus", "params": TEXT},
        *steps,
    ]
    return Recipe.model_validate({"recipe": 1, "name": "case", "steps": given, **more})


def step(name: str, stage: str, reads: str = "dense", **params: object) -> dict[str, object]:
    return {"name": name, "stage": stage, "inputs": {"model": reads, "text": "text"}, "params": params}


def admitted(store, asked: Recipe) -> list[str]:
    """Have a recipe admitted; returns what was said."""
    said: list[str] = []
    planned = resolve(expanded(asked).steps, store, lambda _: Silent())
    refuse_inadmissible(planned, asked, store, said.append)
    return said


def test_blocks_that_no_longer_divide_after_prune_are_refused_and_the_remedy_is_taken(store, tmp_path):
    folder = checkpoint("llama", tmp_path)
    cut = step("cut", "prune", keep=0.9, multiple=2)
    with pytest.raises(StageError, match="step 'q' \\(quantize\\): blocks of 16 do not divide") as refused:
        admitted(store, recipe(folder, cut, step("q", "quantize", "cut", scheme="int4_weight_only", block=16)))
    assert refused.value.remedy
    works = int(refused.value.remedy.partition("`block` to ")[2].partition(",")[0])
    mended = step("q", "quantize", "cut", scheme="int4_weight_only", block=works)
    assert not admitted(store, recipe(folder, cut, mended))
    assert not list(store.manifests())


def test_a_cut_width_is_a_multiple_of_the_blocks_that_come_later(store, tmp_path):
    folder = checkpoint("llama", tmp_path)
    asked = recipe(
        folder, step("cut", "prune", keep=0.9), step("q", "quantize", "cut", scheme="int4_weight_only", block=16)
    )
    assert expanded(asked).steps[2].params["multiple"] == 16
    assert not admitted(store, asked)
    plain = recipe(folder, step("cut", "prune", keep=0.9), step("q", "quantize", "cut", scheme="int8_weight_only"))
    assert "multiple" not in expanded(plain).steps[2].params


def test_what_one_step_cuts_another_does_not_miss(store, tmp_path):
    folder = checkpoint("llama", tmp_path)
    twice = [step(name, "prune", method="channels", keep=0.5, multiple=1) for name in ("a", "b")]
    assert not admitted(store, recipe(folder, *twice, step("q", "quantize", scheme="int4_weight_only", block=16)))


def test_predicted_shapes_are_those_that_are_made(store, tmp_path, seal):
    folder = checkpoint("llama", tmp_path)
    from stages.fetch import FetchParams, admit
    from stages.prune.admission import admitted as predicted
    from stages.prune.params import PruneParams

    known = admit(FetchParams(source=str(folder)), {})
    for method in ("channels", "heads"):
        params = PruneParams(method=method, keep=0.85, multiple=4, windows=2, window_tokens=16)
        outline = predicted(params, {"model": known}).model
        made = _pruned(folder, params, tmp_path / method)
        shapes = {name: tuple(one.shape) for name, one in made.named_parameters()}
        assert {name: tuple(one.shape) for name, one in outline.named_parameters()} == shapes


def _pruned(folder: Path, params, output: Path) -> torch.nn.Module:
    from stages.models.text.windows import Windows
    from stages.prune.stage import _structure

    output.mkdir()
    model = load_model(folder)
    ids_NT = torch.randint(0, 96, (params.windows, params.window_tokens), generator=torch.Generator().manual_seed(0))
    _structure(params, model, Windows(ids_NT, ()), folder, output, Silent())
    return load_model(output)


def test_a_gate_on_what_is_not_measured_of_such_a_model_is_refused(store, tmp_path):
    judged = {"judge": {"artifacts": ["q"], "baseline": "dense", "corpora": ["text"]}}
    gate = {"gates": [{"measure": "perplexity", "against": "dense", "at_most": 1.2}]}
    asked = recipe(
        checkpoint("bert_classes", tmp_path), step("q", "quantize", scheme="int8_weight_only"), **judged, **gate
    )
    with pytest.raises(StageError, match="a gate asks for perplexity of q") as refused:
        admitted(store, asked)
    assert "cosine" in str(refused.value.limit)


def test_a_gate_on_a_speed_that_such_a_model_has_not_is_refused(store, tmp_path):
    judged = {"judge": {"artifacts": ["q"], "baseline": "dense", "corpora": ["text"], "speed": True}}
    gate = {"gates": [{"measure": "decode_tokens_per_s", "against": "dense", "at_least": 2}]}
    asked = recipe(
        checkpoint("bert_classes", tmp_path), step("q", "quantize", scheme="int8_weight_only"), **judged, **gate
    )
    with pytest.raises(StageError, match="a gate asks for decode_tokens_per_s of q") as refused:
        admitted(store, asked)
    assert refused.value.limit == "items_per_s, load_s, peak_rss_bytes"


def test_all_that_is_wrong_is_said_at_once(store, tmp_path):
    folder = checkpoint("t5", tmp_path)
    asked = recipe(
        folder,
        step("q", "quantize", scheme="int4_weight_only", block=64),
        {"name": "g", "stage": "export", "inputs": {"model": "dense"}, "params": {"dtype": "fp16"}},
    )
    with pytest.raises(StageError, match="2 things keep this recipe from running") as refused:
        admitted(store, asked)
    assert "step 'q'" in str(refused.value) and "step 'g'" in str(refused.value)


def test_an_answer_is_kept_while_nothing_changes(store, tmp_path, monkeypatch):
    folder = checkpoint("llama", tmp_path)
    asked = recipe(folder, step("q", "quantize", scheme="int8_weight_only"))
    assert not admitted(store, asked)
    called: list[object] = []
    monkeypatch.setattr(admission, "ask", lambda steps: called.append(steps) or ask(steps))
    assert not admitted(store, asked)
    assert not called
    assert not admitted(store, recipe(folder, step("q", "quantize", scheme="bf16")))
    assert called


def test_what_cannot_be_looked_at_is_said_and_does_not_stand_in_the_way(store, tmp_path, monkeypatch):
    broken = [Answer(step=name, unknown="KeyError: 'x'") for name in ("q",)]
    monkeypatch.setattr(admission, "ask", lambda steps: broken)
    said = admitted(store, recipe(checkpoint("llama", tmp_path), step("q", "quantize", scheme="int8_weight_only")))
    assert said == ["q: what it can take could not be looked at (KeyError: 'x')"]


@pytest.mark.parametrize("name", FAMILIES | WIDER)
def test_every_stage_can_look_at_every_family(name, tmp_path):
    from flows.commands.check import _asked

    it = Asked(name="it", stage="fetch", params={"source": str(checkpoint(name, tmp_path))}, inputs={})
    first, *answers = ask([it, *_asked()])
    assert first.refusal is None and first.facts["architecture"].startswith(FAMILIES.get(name, WIDER.get(name))[0])
    assert not [one.unknown for one in answers if one.unknown]
    assert all(one.refusal["what"] for one in answers if one.refusal)


@pytest.mark.parametrize(("name", "scheme"), [("mixtral", "bf16"), ("mamba", "int4_weight_only")])
def test_what_the_work_takes_is_not_refused(name, scheme, store, tmp_path):
    folder = checkpoint(name, tmp_path)
    assert not admitted(store, recipe(folder, step("q", "quantize", scheme=scheme, block=16)))


def test_a_mask_does_not_outlive_the_maps_that_it_is_of(store, tmp_path):
    zeros = step("zeros", "prune", method="magnitude", pattern="2:4")
    learn = {"name": "r", "stage": "recover", "inputs": {"model": "zeros", "teacher": "dense", "text": "text"}}
    folder = checkpoint("llama", tmp_path)
    with pytest.raises(StageError, match="update: sparse"):
        admitted(store, recipe(folder, zeros, learn))
    narrow = step("narrow", "prune", "zeros", keep=0.9, multiple=1)
    after = {**learn, "inputs": {"model": "narrow", "teacher": "dense", "text": "text"}}
    assert not admitted(store, recipe(folder, zeros, narrow, after))


@pytest.mark.parametrize(
    ("stage", "params"),
    [
        ("quantize", {}),
        ("quantize", {"scheme": "int4_weight_only", "block": 16}),
        ("quantize", {"scheme": "int8_weight_only", "rotation": "auto"}),
        ("quantize", {"scheme": "bf16", "kv_cache": "int8"}),
        ("share", {}),
        ("recover", {}),
        ("prune", {"method": "magnitude"}),
    ],
)
def test_a_text_that_is_missing_is_missed_as_by_the_work(stage, params, store, tmp_path):
    folder = checkpoint("llama", tmp_path / "given")
    optional = definition(stage).inputs["text"].optional
    bare = {"name": "s", "stage": stage, "inputs": {"model": "dense"}, "params": params}
    if optional:
        with pytest.raises(StageError) as ahead:
            admitted(store, recipe(folder, bare))
        with pytest.raises(StageError) as work:
            run = definition(stage)
            (tmp_path / "out").mkdir()
            run.run(run.params.model_validate(params), {"model": folder}, tmp_path / "out", Silent())
        assert (ahead.value.what, ahead.value.remedy) == (
            f"step 's' ({stage}): {work.value.what}",
            work.value.remedy,
        )
        assert not admitted(store, recipe(folder, step("s", stage, **params)))
    halved = {"name": "half", "stage": "corpus", "params": {**TEXT, "splits": {"test": 1.0}}}
    inputs = {"model": "dense", "text": "half"} | ({"teacher": "dense"} if stage == "recover" else {})
    with pytest.raises(StageError, match="the corpus has no split"):
        admitted(store, recipe(folder, halved, {**bare, "inputs": inputs}))


def test_blocks_of_maps_that_stay_float_round_nothing(store, tmp_path):
    cut = step("cut", "prune", keep=0.9)
    kept = step("q", "quantize", "cut", scheme="int4_weight_only", block=16, skip=["*.down_proj"])
    assert "multiple" not in expanded(recipe(checkpoint("llama", tmp_path), cut, kept)).steps[2].params


def test_what_breaks_while_looking_ahead_is_said_and_stops_nothing(store, tmp_path, monkeypatch):
    def broken(_steps: object) -> list[Answer]:
        raise StageError("no memory")

    monkeypatch.setattr(admission, "ask", broken)
    said = admitted(store, recipe(checkpoint("llama", tmp_path), step("q", "quantize", scheme="int8_weight_only")))
    assert said == ["what the steps can take could not be looked at: no memory"]
