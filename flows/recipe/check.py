"""Whether a recipe can run: its shape, its steps, its judging, its gates; nothing is run or fetched to know it.

Each step, each gate and each field is looked at by itself. What is wrong is said once, where it is wrong: of what only
builds on it nothing is said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from flows.recipe.check_gates import gate_faults, named, ungated
from flows.recipe.expand import expanded, upstream
from flows.recipe.located_yaml import Fault
from flows.recipe.located_yaml import Path as Field
from flows.recipe.model import CHAMPION, Recipe, RecipeError
from flows.recipe.seen import RUNS, Seen, SeenStep, Wanted, guessed, steps_of
from flows.recipe.shape import BROKEN, dotted, meant, part, said, shaped, without_echoes
from stages import STAGES, stage
from stages.adapters.targets import CPU, CUDA
from stages.measures.own import GROUP, installed
from stages.runtime.contract import Kind, StageError
from stages.runtime.cuda_driver import gpu_architecture


def check_recipe(recipe: Recipe, gpu: str | None = None) -> None:
    """Raise RecipeError unless the steps, the judging and the gates fit together; `gpu` as of `faults`."""
    data = recipe.model_dump(mode="json", by_alias=True)
    found = faults(data, gpu)
    if found:
        raise RecipeError("\n".join(f"{dotted(fault.path, data)}: {fault.text}" for fault in found))


def faults(data: dict[str, Any], gpu: str | None = None) -> list[Fault]:
    """Everything that keeps a recipe, given as JSON values, from running.

    Args:
        data: the recipe.
        gpu: the architecture of the GPU where artifacts are measured, empty for none; this machine's by default.
    """
    found, left = shaped(data)
    steps, judge, gates = steps_of(data, left), part(left, "judge"), part(left, "gates", [])
    of_params = {step.index: _params(step, left["steps"][step.index]) for step in steps}
    seen = Seen(
        steps=steps,
        judge=judge,
        gates=gates if isinstance(gates, list) else [],
        unsound=frozenset(index for index, faulty in of_params.items() if faulty or steps[index].params is BROKEN),
        guessed={},
        gpu=gpu_architecture() if gpu is None else gpu,
    )
    seen = replace(seen, guessed=guessed(steps, _wanted(seen)))
    for faulty in of_params.values():
        found += faulty
    found += _names(seen)
    found += _promotion(seen, left)
    if not steps:
        return found  # there is nothing that the rest could speak of
    for step in steps:
        found += _inputs(seen, step)
    found += _precisions(seen)
    found += _targets(seen)
    found += _judge(seen)
    wrong = {str(fault.path[1]) for fault in found if fault.path[:1] == ("judge",) and len(fault.path) > 1}
    if not wrong:
        found += _measured(seen)
    for index, gate in enumerate(seen.gates):
        if isinstance(gate, dict):
            found += gate_faults(seen, ("gates", index), gate, wrong)
    if part(left, "register") is not None:
        found += ungated(seen, tuple(found))
    return found


def _params(step: SeenStep, left: Any) -> list[Fault]:
    """What is wrong inside one step, whatever stands around it: its stage and its params."""
    here: Field = ("steps", step.index)
    named = part(left, "stage")
    if not step.stage:
        text = f"there is no stage {named!r}; allowed: {', '.join(STAGES)}"
        return [Fault((*here, "stage"), text)] if isinstance(named, str) else []
    if not isinstance(step.params, dict):
        return []
    params = stage(step.stage).params
    try:
        params.model_validate_json(json.dumps(step.params), strict=True)
    except ValidationError as error:
        known = ", ".join(params.model_fields) or "nothing"
        return [
            Fault((*here, "params", *one["loc"]), said(one["type"], one["msg"], known))
            for one in without_echoes(error.errors(include_url=False))
        ]
    return []


def _wanted(seen: Seen) -> list[Wanted]:
    """Every step that is spoken of: by steps, by `judge` and by gates."""
    spoken = [(name, RUNS) for name in seen.named("artifacts")]
    spoken += [(name, frozenset({Kind.CORPUS})) for name in seen.named("corpora")]
    spoken.append((part(seen.judge, "baseline"), frozenset({Kind.CHECKPOINT})))
    for gate in seen.gates:
        spoken += [(part(gate, field), RUNS) for field in ("artifact", "against")]
        spoken.append((part(gate, "corpus"), frozenset({Kind.CORPUS})))
    wanted = [one for step in seen.steps for one in step.reads()]
    return wanted + [Wanted(name, None, kinds) for name, kinds in spoken if isinstance(name, str)]


def _names(seen: Seen) -> Iterator[Fault]:
    first: set[str] = set()
    for step in seen.steps:
        if step.name == CHAMPION:
            text = "`champion` means the model now served; allowed: another name"
            yield Fault(("steps", step.index, "name"), text)
        elif step.name in first:
            text = f"the name {step.name!r} stands twice; allowed: a name that no other step has"
            yield Fault(("steps", step.index, "name"), text)
        first |= {step.name} - {""}


def _inputs(seen: Seen, step: SeenStep) -> Iterator[Fault]:
    """Roles, order and kinds of what a step reads."""
    if not step.stage or not isinstance(step.inputs, dict):
        return
    here: Field = ("steps", step.index, "inputs")
    roles = stage(step.stage).inputs
    unknown = [role for role in step.inputs if role not in roles]
    for role, accepted in roles.items():
        if not accepted.optional and role not in step.inputs and not meant(role, unknown):
            kinds = " or ".join(sorted(accepted.kinds))
            yield Fault(here, f"{step.stage} needs an input {role!r}; allowed: the name of a step that makes a {kinds}")
    for role, source in step.inputs.items():
        if role in unknown:
            text = f"{step.stage} has no input {role!r}; allowed: {', '.join(roles) or 'no inputs'}"
            yield Fault((*here, role), text)
        elif source is not BROKEN and roles[role].many != isinstance(source, list):
            yield Fault((*here, role), f"allowed: {'a list of steps' if roles[role].many else 'one step'}")
        else:
            for name in source if isinstance(source, list) else [source]:
                yield from _reads(seen, step.index, (*here, role), name, roles[role].kinds)


def _reads(seen: Seen, index: int, path: Field, name: Any, kinds: frozenset[Kind]) -> Iterator[Fault]:
    if not isinstance(name, str):
        return
    fitting = [step.name for step in seen.steps[:index] if step.output in kinds]
    allowed = f"allowed: {', '.join(fitting) or 'no step before this one fits'}"
    source = seen.find(name)
    if source is None or source.index >= index:
        text = f"{name!r} comes later or is this step itself" if source else f"there is no step {name!r}"
        yield Fault(path, f"{text}; {allowed}")
    elif source.output is not None and source.output not in kinds:
        yield Fault(path, f"{name!r} makes a {source.output}, wanted is a {' or '.join(sorted(kinds))}; {allowed}")


def _precisions(seen: Seen) -> Iterator[Fault]:
    """What no builder can build for an architecture: known here, before an engine is built for minutes."""
    from stages.adapters.backends import refuse_impossible

    for step in seen.steps:
        if step.stage != "compile" or step.index in seen.unsound:
            continue
        params = stage("compile").params.model_validate(step.params)
        formats = _formats(seen, step.name)
        told: set[str] = set()
        for asked in [[one] for one in params.architectures] or [[]]:
            try:
                refuse_impossible(params.backend, asked, formats.keys())
            except StageError as error:
                made = ", ".join(f"{name} by step {source!r}" for name, source in formats.items() if source)
                where = "architectures" if "architectures" in step.params else "backend"
                allowed = error.limit or "nothing"
                text = f"{error.what}; allowed: {allowed}. {error.remedy}{f' (made {made})' if made else ''}"
                if text not in told:
                    yield Fault(("steps", step.index, "params", where), text)
                told.add(text)


def _targets(seen: Seen) -> Iterator[Fault]:
    """That a step is to execute its artifact on what does not: known here, before there is the artifact."""
    for step in seen.steps:
        role = {"validate": "model", "bench": "artifact"}.get(step.stage, "")
        source = part(step.inputs, role) if role and step.index not in seen.unsound else None
        fitting = seen.target(source) if isinstance(source, str) else None
        if fitting is None or not isinstance(source, str):
            continue
        asked = str(getattr(stage(step.stage).params.model_validate(step.params), "target", ""))
        here, built = ("steps", step.index, "params", "target"), seen.find(source)
        if not fitting and built is not None:
            on = " + ".join(built.params.get("architectures", ()))
            lacks = f"the GPU here is {seen.gpu}" if seen.gpu else "no GPU is here"
            yield Fault(here, f"{source!r} is for {on}, and {lacks}; allowed: leave the step out, or run it there")
        elif asked != fitting and not (fitting == CPU and asked == CUDA):
            yield Fault(here, f"{source!r} is not executed on {asked}; allowed: {fitting}")


def _formats(seen: Seen, name: str) -> dict[str, str]:
    """Number formats of the graph that a step reads -> the step that chose them."""
    # Norms, scales and products of activations stay float32 in every graph that is exported.
    found = {"float32": ""}
    above = upstream(seen.sound(), name)
    for step in seen.steps:
        if step.stage == "quantize" and step.name in above and step.index not in seen.unsound:
            params = stage("quantize").params.model_validate(step.params)
            found[str(getattr(params, "scheme", "")).partition("_")[0]] = step.name
    return found


def _judge(seen: Seen) -> Iterator[Fault]:
    if not isinstance(seen.judge, dict):
        return
    for index, name in enumerate(_listed(seen, "artifacts")):
        yield from named(seen, ("judge", "artifacts", index), name, RUNS)
    yield from named(seen, ("judge", "baseline"), part(seen.judge, "baseline"), frozenset({Kind.CHECKPOINT}))
    for index, name in enumerate(_listed(seen, "own")):
        if isinstance(name, str) and name not in installed():
            text = f"no package that is installed registers a measure {name!r} under `{GROUP}`"
            yield Fault(("judge", "own", index), f"{text}; allowed: {', '.join(installed()) or 'none'}")
    split = part(seen.judge, "split", "test")
    for index, name in enumerate(_listed(seen, "corpora")):
        yield from named(seen, ("judge", "corpora", index), name, frozenset({Kind.CORPUS}))
        corpus = seen.find(name) if isinstance(name, str) else None
        if corpus is None or split is BROKEN or corpus.index in seen.unsound:
            continue
        splits = corpus.params.get("splits")
        if isinstance(splits, dict) and not splits.get(split):
            have = ", ".join(split for split, share in splits.items() if share)
            yield Fault(("judge", "split"), f"corpus {name!r} has no split {split!r}; allowed: {have}")
    yield from _asked_of(seen)
    for what in ("artifacts", "corpora"):
        names = seen.named(what)
        if len(set(names)) < len(names):
            yield Fault(("judge", what), "a name stands twice; allowed: each once")


def _asked_of(seen: Seen) -> Iterator[Fault]:
    corpora = seen.named("corpora")
    texts = [name for name in corpora if (one := seen.find(name)) is None or one.stage != "items"]
    if part(seen.judge, "speed", False) is True and corpora and not texts:
        text = "prompts are taken from text, and only items are judged on; allowed: with a step of the stage corpus"
        yield Fault(("judge", "speed"), f"{text} among its corpora")
    if isinstance(part(seen.judge, "beams"), int) and len(texts) == len(corpora) > 0 and all(map(seen.find, corpora)):
        text = "beams are followed where items are answered, and only texts are judged; allowed: with a step of items"
        yield Fault(("judge", "beams"), f"{text} among its corpora")


def _listed(seen: Seen, field: str) -> list[Any]:
    listed = part(seen.judge, field, [])
    return listed if isinstance(listed, list) else []


def _measured(seen: Seen) -> Iterator[Fault]:
    recipe = seen.sound()
    taken = {step.name for step in recipe.steps}
    # Their params say what is executed, and what a cut width is a multiple of.
    unsound = any(step.index in seen.unsound for step in seen.steps if step.stage in ("compile", "prune", "quantize"))
    if recipe.judge is None or unsound or not {*recipe.judge.artifacts, recipe.judge.baseline} <= taken:
        return  # which measurements there will be cannot be told
    for name in [step.name for step in expanded(recipe, seen.gpu).steps if step.measures and step.name in taken]:
        yield Fault(("judge",), f"a step is called {name!r} as this measurement would be; allowed: another name")


def _promotion(seen: Seen, left: Any) -> Iterator[Fault]:
    """What would promote a model that nothing was held against, be it only the first one; what no champion can hold."""
    gates, register = part(left, "gates", []), part(left, "register")
    against = [part(gate, "against") for gate in seen.gates]
    if register is None:
        alone = [index for index, one in enumerate(against) if one == CHAMPION]
        text = "no alias says which model is served; allowed: together with `register`"
        yield from (Fault(("gates", index, "against"), text) for index in alone)
    elif seen.judge is None:
        yield Fault(("register",), "only what was judged is promoted; allowed: together with `judge`")
    elif gates == []:
        yield Fault(("register",), "only what holds a gate is promoted; allowed: together with `gates`")
    elif isinstance(gates, list) and all(one == CHAMPION for one in against):
        text = "where no champion is yet, none of the gates holds anything; allowed: one more, without `champion`"
        yield Fault(("gates",), text)
