"""Whether the steps, the judging and the gates of a recipe fit together; nothing is run or fetched to know it."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic import ValidationError

from flows.recipe.expand import executable_here, expanded, upstream
from flows.recipe.located_yaml import Fault
from flows.recipe.located_yaml import Path as Field
from flows.recipe.model import Gate, Judge, Recipe, RecipeError, Step
from stages import STAGES, stage
from stages.measures.table import MEASURES
from stages.runtime.contract import Kind, StageError

CHAMPION = "champion"
_RUNS = (Kind.CHECKPOINT, Kind.ONNX, Kind.ENGINE)
"""Kinds that answer, so that they can be judged."""


def check_recipe(recipe: Recipe) -> None:
    """Raise RecipeError unless the steps, the judging and the gates fit together."""
    found = faults(recipe)
    if found:
        raise RecipeError("\n".join(f"{_dotted(fault.path, recipe)}: {fault.text}" for fault in found))


def faults(recipe: Recipe) -> list[Fault]:
    """Everything that keeps a recipe of the right shape from running."""
    # Each part builds on what the one before found sound, so that one mistake is not said in three places.
    faulty = list(_names(recipe))
    for index, step in enumerate(recipe.steps):
        faulty += check_step(index, step)
        if step.stage in STAGES:
            faulty += _inputs(recipe, index, step)
    if not faulty:
        faulty += [*_precisions(recipe), *_judge(recipe), *_register(recipe)]
    if not faulty:
        faulty += [*_measured(recipe), *_gates(recipe)]
    return faulty


def check_step(index: int, step: Step) -> list[Fault]:
    """What is wrong inside one step, whatever stands around it: its stage and its params."""
    here: Field = ("steps", index)
    if step.stage not in STAGES:
        return [Fault((*here, "stage"), f"there is no stage {step.stage!r}; allowed: {', '.join(STAGES)}")]
    params = stage(step.stage).params
    try:
        params.model_validate_json(json.dumps(step.params), strict=True)
    except ValidationError as error:
        known = ", ".join(params.model_fields) or "nothing"
        return [
            Fault((*here, "params", *one["loc"]), said(one["type"], one["msg"], known))
            for one in error.errors(include_url=False)
        ]
    return []


def said(kind: str, message: str, allowed: str) -> str:
    """One of pydantic's errors in the words of a recipe."""
    if kind == "extra_forbidden":
        return f"unknown key; allowed: {allowed}"
    if kind == "missing":
        return "required and not there"
    return message.removeprefix("Value error, ").replace("Input should", "should").replace("String should", "should")


def _names(recipe: Recipe) -> Iterator[Fault]:
    first: dict[str, int] = {}
    for index, step in enumerate(recipe.steps):
        if step.name == CHAMPION:
            yield Fault(("steps", index, "name"), "`champion` means the model now served; allowed: another name")
        if step.name in first:
            text = f"the name {step.name!r} stands twice; allowed: a name that no other step has"
            yield Fault(("steps", index, "name"), text)
        first.setdefault(step.name, index)


def _inputs(recipe: Recipe, index: int, step: Step) -> Iterator[Fault]:
    """Roles, order and kinds of what a step reads."""
    here: Field = ("steps", index, "inputs")
    definition = stage(step.stage)
    for role, accepted in definition.inputs.items():
        if not accepted.optional and role not in step.inputs:
            kinds = " or ".join(sorted(accepted.kinds))
            yield Fault(here, f"{step.stage} needs an input {role!r}; allowed: the name of a step that makes a {kinds}")
    for role, source in step.inputs.items():
        if role not in definition.inputs:
            roles = ", ".join(definition.inputs) or "no inputs"
            yield Fault((*here, role), f"{step.stage} has no input {role!r}; allowed: {roles}")
            continue
        many = definition.inputs[role].many
        if many != isinstance(source, list):
            yield Fault((*here, role), f"allowed: {'a list of steps' if many else 'one step'}")
            continue
        for name in [source] if isinstance(source, str) else source:
            yield from _reads(recipe, index, (*here, role), name, definition.inputs[role].kinds)


def _reads(recipe: Recipe, index: int, path: Field, name: str, kinds: frozenset[Kind]) -> Iterator[Fault]:
    fitting = [s.name for s in recipe.steps[:index] if _output(s) in kinds]
    allowed = f"allowed: {', '.join(fitting) or 'no step before this one fits'}"
    source = next((s for s in recipe.steps[:index] if s.name == name), None)
    if source is None:
        later = any(s.name == name for s in recipe.steps[index:])
        text = f"{name!r} comes later or is this step itself" if later else f"there is no step {name!r}"
        yield Fault(path, f"{text}; {allowed}")
    elif (made := _output(source)) is not None and made not in kinds:
        yield Fault(path, f"{name!r} makes a {made}, wanted is a {' or '.join(sorted(kinds))}; {allowed}")


def _output(step: Step) -> Kind | None:
    return stage(step.stage).output if step.stage in STAGES else None


def _precisions(recipe: Recipe) -> Iterator[Fault]:
    """What no builder can build for an architecture: known here, before an engine is built for minutes."""
    from stages.adapters.backends import refuse_impossible

    for index, step in enumerate(recipe.steps):
        if step.stage != "compile":
            continue
        params = stage("compile").params.model_validate(step.params)
        formats = _formats(recipe, step.name)
        try:
            refuse_impossible(params.backend, params.architectures, formats.keys())
        except StageError as error:
            made = ", ".join(f"{name} by step {source!r}" for name, source in formats.items() if source)
            where = "architectures" if "architectures" in step.params else "backend"
            allowed = error.limit or "nothing"
            said = f"{error.what}; allowed: {allowed}. {error.remedy}{f' (made {made})' if made else ''}"
            yield Fault(("steps", index, "params", where), said)


def _formats(recipe: Recipe, name: str) -> dict[str, str]:
    """Number formats of the graph that a step reads -> the step that chose them."""
    # Norms, scales and products of activations stay float32 in every graph that is exported.
    found = {"float32": ""}
    above = upstream(recipe, name)
    for step in recipe.steps:
        if step.stage == "quantize" and step.name in above:
            params = stage("quantize").params.model_validate(step.params)
            found[str(getattr(params, "scheme", "")).partition("_")[0]] = step.name
    return found


def _judge(recipe: Recipe) -> Iterator[Fault]:
    judge = recipe.judge
    if judge is None:
        return
    for index, name in enumerate(judge.artifacts):
        yield from _named(recipe, ("judge", "artifacts", index), name, _RUNS)
    yield from _named(recipe, ("judge", "baseline"), judge.baseline, (Kind.CHECKPOINT,))
    for index, name in enumerate(judge.corpora):
        yield from _named(recipe, ("judge", "corpora", index), name, (Kind.CORPUS,))
        corpus = next((step for step in recipe.steps if step.name == name), None)
        splits = corpus.params.get("splits") if corpus else None
        if isinstance(splits, dict) and not splits.get(judge.split):
            have = ", ".join(split for split, share in splits.items() if share)
            yield Fault(("judge", "split"), f"corpus {name!r} has no split {judge.split!r}; allowed: {have}")
    for what in ("artifacts", "corpora"):
        names = getattr(judge, what)
        if len(set(names)) < len(names):
            yield Fault(("judge", what), "a name stands twice; allowed: each once")


def _measured(recipe: Recipe) -> Iterator[Fault]:
    taken = {step.name for step in recipe.steps}
    for name in [step.name for step in expanded(recipe).steps if step.measures and step.name in taken]:
        yield Fault(("judge",), f"a step is called {name!r} as this measurement would be; allowed: another name")


def _named(recipe: Recipe, path: Field, name: str, kinds: tuple[Kind, ...]) -> Iterator[Fault]:
    fitting = [step.name for step in recipe.steps if stage(step.stage).output in kinds]
    if name not in fitting:
        known = any(step.name == name for step in recipe.steps)
        text = f"{name!r} is no {' or '.join(kinds)}" if known else f"there is no step {name!r}"
        yield Fault(path, f"{text}; allowed: {', '.join(fitting) or 'none in this recipe'}")


def _gates(recipe: Recipe) -> Iterator[Fault]:
    for index, gate in enumerate(recipe.gates):
        here: Field = ("gates", index)
        if gate.measure == "size_bytes":
            yield from _size_gate(recipe, here, gate)
        elif recipe.judge is None:
            yield Fault((*here, "measure"), f"{gate.measure} needs `judge`; allowed: size_bytes")
        else:
            yield from _score_gate(recipe, recipe.judge, here, gate)


def _size_gate(recipe: Recipe, here: Field, gate: Gate) -> Iterator[Fault]:
    if gate.corpus is not None:
        yield Fault((*here, "corpus"), "a size has no corpus; allowed: leave it out")
    if gate.artifact is not None:
        yield from _named(recipe, (*here, "artifact"), gate.artifact, _RUNS)
    elif recipe.judge is None:
        yield Fault((*here, "artifact"), "required, since nothing is judged; allowed: the name of a step")
    if gate.against not in (None, CHAMPION):
        yield from _named(recipe, (*here, "against"), str(gate.against), _RUNS)


def _score_gate(recipe: Recipe, judge: Judge, here: Field, gate: Gate) -> Iterator[Fault]:
    executed = [name for name in judge.artifacts if executable_here(recipe.step(name))]
    against = [CHAMPION, *executed] + ([] if MEASURES[gate.measure].paired else [judge.baseline])
    for field, value, allowed, why in (
        ("measure", gate.measure, judge.measures, "is not measured"),
        ("artifact", gate.artifact, executed, "is not judged by execution here"),
        ("corpus", gate.corpus, judge.corpora, "is not judged"),
        ("against", gate.against, against, "has no such measure"),
    ):
        if value is not None and value not in allowed:
            yield Fault((*here, field), f"{value!r} {why}; allowed: {', '.join(allowed) or 'none in this recipe'}")


def _register(recipe: Recipe) -> Iterator[Fault]:
    if recipe.register_as and recipe.judge is None:
        yield Fault(("register",), "only what was judged is promoted; allowed: together with `judge`")


def _dotted(path: Field, recipe: Recipe) -> str:
    """A path as `--set` writes it: a step by its name, a gate by its number."""
    parts = list(path)
    if len(parts) > 1 and parts[0] == "steps" and isinstance(parts[1], int):
        parts[1] = recipe.steps[parts[1]].name
    return ".".join(str(part) for part in parts) or "recipe"
