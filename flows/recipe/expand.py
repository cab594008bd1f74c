"""A recipe to the steps that run: its own, then the measurements that `judge` asks for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from flows.recipe.model import CHAMPION, Judge, Recipe, Step
from stages import stage
from stages.adapters.backends import GRAPHS_BACKEND
from stages.adapters.targets import CPU, takes_turns, target_of
from stages.measures.table import BENCH
from stages.quantize.params import QuantizeParams, block_of
from stages.runtime.contract import Kind
from stages.runtime.cuda_driver import gpu_architecture


@dataclass(frozen=True)
class PlannedStep:
    """A step as it runs. No two of a recipe bear one name.

    Attributes:
        inputs: role -> name of the step it reads.
        measures: the step that this one measures, empty for a step of the recipe.
        corpus: the corpus it is measured on; with `measures` the identity of a measurement.
        traced: it only draws the curve of the intermediate checkpoints; no gate reads it.
        target: what executes its artifact; empty for what makes none, and for an engine of GPUs that are not there.
        given: role -> fingerprint of a sealed artifact that no step of the recipe makes.
    """

    name: str
    stage: str
    inputs: dict[str, str]
    params: dict[str, Any]
    measures: str = ""
    corpus: str = ""
    traced: bool = False
    target: str = ""
    given: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Expanded:
    """A recipe, checked, and the steps that run for it, in an order in which none reads a later one.

    Attributes:
        champion: the measurements of the champion that gates ask for; its engine, the role `model`, and what executes
            it are known when the recipe runs.
        chains: of each judged artifact the checkpoints from the baseline to it, in order, and itself.
        gpu: the architecture of the GPU where artifacts are measured, empty for none.
    """

    recipe: Recipe
    steps: tuple[PlannedStep, ...]
    champion: tuple[PlannedStep, ...] = ()
    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gpu: str = ""


def expanded(recipe: Recipe, gpu: str | None = None) -> Expanded:
    """The recipe's steps, then the measurements that `judge` asks for.

    Args:
        recipe: checked.
        gpu: the architecture of the GPU where its artifacts are measured, empty for none; this machine's by default.
    """
    gpu = gpu_architecture() if gpu is None else gpu
    own = [
        PlannedStep(s.name, s.stage, s.roles(), _in_blocks(s, recipe), target=target(s.stage, s.params, gpu))
        for s in recipe.steps
    ]
    targets = {one.name: one.target for one in own}
    measured = []
    if recipe.judge is not None:
        measured = [*_measurements(recipe, recipe.judge, targets), *_speeds(recipe, recipe.judge, targets)]
    steps = (*own, *_named_apart(measured))
    taken = {step.name for step in steps}
    if recipe.judge is None:
        return Expanded(recipe, steps, gpu=gpu)
    chains = {name: _chain(recipe, recipe.judge, name) for name in recipe.judge.artifacts}
    return Expanded(recipe, steps, tuple(_champions(recipe, recipe.judge, taken)), chains, gpu)


def _chain(recipe: Recipe, judge: Judge, artifact: str) -> tuple[str, ...]:
    above = upstream(recipe, artifact)
    return tuple(dict.fromkeys([judge.baseline, *(one for one in between(recipe) if one in above), artifact]))


def _champions(recipe: Recipe, judge: Judge, taken: Collection[str]) -> Iterator[PlannedStep]:
    gates = [gate for gate in recipe.gates if gate.against == CHAMPION and gate.measure != "size_bytes"]
    for corpus in judge.corpora:
        if any(gate.corpus in (None, corpus) for gate in gates):
            named, inputs = measurement_name(CHAMPION, corpus), {"text": corpus, "baseline": judge.baseline}
            name = _apart(CHAMPION, corpus) if named in taken else named
            yield PlannedStep(name, "validate", inputs, _params(recipe, judge, "", corpus), CHAMPION, corpus)


def _in_blocks(step: Step, recipe: Recipe) -> dict[str, Any]:
    """A step's params; what is left of a width by `prune` is a multiple of the blocks in which it is quantized later.

    Only where the recipe says nothing of it.
    """
    params = dict(step.params)
    if step.stage != "prune" or "multiple" in params or params.get("method", "channels") not in _READERS:
        return params
    later = [one for one in recipe.steps if one.stage == "quantize" and step.name in upstream(recipe, one.name)]
    readers = _READERS[params.get("method", "channels")]
    blocks = [block for one in later if (block := _block(one.params, readers))]
    default = stage("prune").params.model_fields["multiple"].default
    return params | ({"multiple": math.lcm(default, *blocks)} if blocks else {})


_READERS = {"auto": ("mlp.down_proj",), "channels": ("mlp.down_proj",), "width": ("self_attn.q_proj", "mlp.gate_proj")}
"""What reads the width that a method cuts, as maps are called where these methods take a model."""


def _block(params: Mapping[str, Any], readers: Iterable[str]) -> int | None:
    """Inputs that share a scale, where any of the maps that read a cut width is quantized in blocks."""
    asked = QuantizeParams.model_validate(params)
    paths = [f"model.layers.0.{one}" for one in readers]
    rounded = [path for path in paths if _any(path, asked.layers) and not _any(path, asked.skip)]
    return block_of(asked) if rounded else None


def _any(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def target(stage_name: str, params: Mapping[str, Any], gpu: str) -> str:
    """What executes the artifact of a step, empty where nothing does: it is no model, or for GPUs that are not there.

    Args:
        stage_name: of the step.
        params: its own, which name a backend that there is.
        gpu: the architecture of the GPU that there is, empty for none.
    """
    made = stage(stage_name).output
    if made is Kind.CHECKPOINT:
        return CPU
    if made is Kind.ONNX:
        return target_of(GRAPHS_BACKEND, (), gpu)
    return target_of(params["backend"], params.get("architectures", ()), gpu) if made is Kind.ENGINE else ""


def upstream(recipe: Recipe, name: str) -> set[str]:
    """The names of all steps that `name` reads, directly or through others."""
    known = {step.name: set(step.roles().values()) for step in recipe.steps}
    found: set[str] = set()
    pending = list(known.get(name, ()))
    while pending:
        source = pending.pop()
        if source not in found:
            found.add(source)
            pending += known.get(source, ())
    return found


def measurement_name(artifact: str, corpus: str) -> str:
    """How the measurement of an artifact on a corpus is called, where no other one is called so."""
    return f"validate-{artifact}-{corpus}"


def _named_apart(measured: Iterable[PlannedStep]) -> Iterator[PlannedStep]:
    """Names hold dashes: `a-b` on `c` and `a` on `b-c` read alike. None holds a dot, which tells them apart."""
    found = list(measured)
    bearers = Counter(step.name for step in found)
    for step in found:
        alike = bearers[step.name] > 1
        yield replace(step, name=_apart(step.measures, step.corpus)) if alike else step


def _apart(artifact: str, corpus: str) -> str:
    return f"validate-{artifact}.{corpus}"


def _measurements(recipe: Recipe, judge: Judge, targets: Mapping[str, str]) -> Iterator[PlannedStep]:
    for artifact in dict.fromkeys([judge.baseline, *(name for name in judge.artifacts if targets[name])]):
        for corpus in judge.corpora:
            yield _measurement(recipe, judge, artifact, targets[artifact], corpus)
    if not judge.trace:
        return
    sets = [name for name in judge.corpora[1:] if _is_set(recipe, name)]
    for step in recipe.steps:
        if step.name in between(recipe) and step.name not in judge.artifacts:
            for corpus in (judge.corpora[0], *sets):
                yield _measurement(recipe, judge, step.name, targets[step.name], corpus, traced=True)


def _speeds(recipe: Recipe, judge: Judge, targets: Mapping[str, str]) -> Iterator[PlannedStep]:
    """Each executed artifact in turn with the baseline; prompts come from the first text that is judged on."""
    if not judge.speed:
        return
    text = next(one for one in judge.corpora if not _is_set(recipe, one))
    for artifact in judge.artifacts:
        if found := targets[artifact]:
            inputs = {"artifact": artifact, "text": text}
            inputs |= {"baseline": judge.baseline} if artifact != judge.baseline and takes_turns(found) else {}
            yield PlannedStep(f"{BENCH}-{artifact}", BENCH, inputs, {"split": judge.split, "target": found}, artifact)


def _is_set(recipe: Recipe, corpus: str) -> bool:
    return any(step.name == corpus and step.stage == "items" for step in recipe.steps)


def between(recipe: Recipe) -> list[str]:
    """The checkpoints between the baseline and what is judged, in order."""
    if recipe.judge is None:
        return []
    above = set().union(*(upstream(recipe, name) for name in recipe.judge.artifacts))
    return [
        step.name
        for step in recipe.steps
        if step.name in above
        and recipe.judge.baseline in upstream(recipe, step.name)
        and stage(step.stage).output is Kind.CHECKPOINT
    ]


def _measurement(
    recipe: Recipe, judge: Judge, artifact: str, on: str, corpus: str, *, traced: bool = False
) -> PlannedStep:
    params = _params(recipe, judge, on, corpus)
    inputs = {"model": artifact, "text": corpus}
    if traced and _is_set(recipe, corpus):
        params["items"] = min(judge.trace_items, judge.items or judge.trace_items)
        params = {name: value for name, value in params.items() if name not in ("variants", "own")}
    elif not traced and artifact != judge.baseline:
        inputs["baseline"] = judge.baseline
    if not traced and _is_set(recipe, corpus):
        inputs |= {f"seen.{place}": name for place, name in enumerate(_read_by(recipe, artifact))}
    return PlannedStep(measurement_name(artifact, corpus), "validate", inputs, params, artifact, corpus, traced)


def _read_by(recipe: Recipe, artifact: str) -> list[str]:
    """The texts that an artifact was calibrated or trained on, and those that it was written from."""
    above = upstream(recipe, artifact)
    return [step.name for step in recipe.steps if step.name in above and step.stage == "corpus"]


def _params(recipe: Recipe, judge: Judge, target: str, corpus: str) -> dict[str, Any]:
    params: dict[str, Any] = {"split": judge.split, "window_tokens": judge.window_tokens, "target": target}
    if not _is_set(recipe, corpus):
        return params if judge.windows is None else params | {"windows": judge.windows}
    if recipe.step(corpus).params.get("harness"):
        return params | {"harness": True} | ({"items": judge.items} if judge.items else {})
    asked = {"items": judge.items, "variants": judge.variants, "own": judge.own, "beams": judge.beams}
    return params | {name: value for name, value in asked.items() if value}
