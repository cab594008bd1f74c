"""A recipe as far as it can be read, so that a fault in one place keeps nobody from seeing another elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flows.recipe.expand import target
from flows.recipe.model import CHAMPION, Judge, Name, Recipe, Step
from flows.recipe.shape import part
from stages import STAGES, stage
from stages.runtime.contract import Kind

RUNS = frozenset({Kind.CHECKPOINT, Kind.ONNX, Kind.ENGINE})
"""Kinds that answer, so that they can be judged."""


@dataclass(frozen=True, kw_only=True)
class SeenStep:
    """One step as far as it can be read.

    Attributes:
        name: what others can call it by; empty where nobody can tell.
        named: its name is sound and no other step before it has it.
        stage: empty where there is none of that name.
        inputs: role -> step or steps, BROKEN where that is no name; BROKEN where there is no mapping.
        params: BROKEN where there is no mapping.
    """

    index: int
    name: str
    named: bool
    stage: str
    inputs: Any
    params: Any

    @property
    def output(self) -> Kind | None:
        """The kind it makes, None where that cannot be told."""
        return stage(self.stage).output if self.stage else None

    def reads(self) -> Iterator[Wanted]:
        """The steps that it speaks of."""
        roles = stage(self.stage).inputs if self.stage else {}
        for role, source in self.inputs.items() if isinstance(self.inputs, dict) else ():
            kinds = roles[role].kinds if role in roles else frozenset(Kind)
            for name in source if isinstance(source, list) else [source]:
                if isinstance(name, str):
                    yield Wanted(name, self.index, kinds)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A recipe as far as it can be read.

    Attributes:
        judge: a mapping, None for none, BROKEN where it cannot be read.
        unsound: numbers of the steps whose stage or params are wrong.
        guessed: names that no step bears -> the step that is probably meant, whose own name is wrong.
        gpu: the architecture of the GPU where artifacts are measured, empty for none.
    """

    steps: tuple[SeenStep, ...]
    judge: Any
    gates: list[Any]
    unsound: frozenset[int]
    guessed: Mapping[str, SeenStep]
    gpu: str

    def find(self, name: str) -> SeenStep | None:
        """The first step of a name, or the one that is probably meant by it."""
        return next((step for step in self.steps if step.name == name), self.guessed.get(name))

    def named(self, field: str) -> list[str]:
        """The names in a list of `judge`, those that can be read."""
        listed = part(self.judge, field, [])
        return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []

    def executed(self) -> list[str]:
        """The judged artifacts that are executed here, or may be for all that can be read."""
        return [name for name in self.named("artifacts") if self.target(name) != ""]

    def target(self, name: str) -> str | None:
        """What executes the artifact of a step, empty where nothing here does, None where that cannot be told."""
        step = self.find(name)
        if step is None or step.output not in RUNS or (step.stage == "compile" and step.index in self.unsound):
            return None
        return target(step.stage, step.params if isinstance(step.params, dict) else {}, self.gpu)

    def sound(self) -> Recipe:
        """The steps whose names and stages are known, as a recipe whose params nobody has checked."""
        steps = [
            Step.model_construct(
                name=one.name,
                stage=one.stage,
                inputs=_sound(one.inputs),
                params=one.params if isinstance(one.params, dict) else {},
            )
            for one in self.steps
            if one.named and one.stage
        ]
        judge = self.judge if isinstance(self.judge, dict) else None
        judged = Judge.model_construct(**judge) if judge else None
        return Recipe.model_construct(recipe=1, name="seen", steps=steps, judge=judged, gates=[], register_as=None)


def steps_of(data: Any, left: Any) -> tuple[SeenStep, ...]:
    """The steps of a recipe: as written, and as left by the check of its shape."""
    found: list[SeenStep] = []
    listed = part(left, "steps", [])
    for index, one in enumerate(listed if isinstance(listed, list) else ()):
        raw = data["steps"][index]
        name, known = _called(raw) if isinstance(raw, dict) else "", part(one, "stage")
        sound = name != CHAMPION and _is_name(name) and name not in {step.name for step in found}
        found.append(
            SeenStep(
                index=index,
                name=name,
                named=sound,
                stage=known if isinstance(known, str) and known in STAGES else "",
                inputs=part(one, "inputs", {}),
                params=part(one, "params", {}),
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class Wanted:
    """Where a step is spoken of: by the step of a number, or by `judge` or a gate, and as which kinds."""

    name: str
    by: int | None
    kinds: frozenset[Kind]

    def fits(self, step: SeenStep) -> bool:
        """Whether a step may be meant, as far as it can be read."""
        return (self.by is None or step.index < self.by) and (step.output is None or step.output in self.kinds)


def guessed(steps: tuple[SeenStep, ...], wanted: Collection[Wanted]) -> dict[str, SeenStep]:
    """Names that are spoken of and that no step bears -> the step whose own name is wrong and that is probably meant.

    That is the one which is called almost so; of the other names those are taken that most places speak of. Where
    several may be meant none is taken, so that nothing is kept back.
    """
    names, doubtful = {step.name for step in steps if step.named}, [step for step in steps if not step.named]
    strange: dict[str, list[Wanted]] = {}
    for one in wanted:
        if one.name not in names and one.name != CHAMPION:
            strange.setdefault(one.name, []).append(one)

    def fits(name: str, step: SeenStep) -> bool:
        return name not in found and any(use.fits(step) for use in strange[name])

    found: dict[str, SeenStep] = {}
    left: list[SeenStep] = []
    for step in doubtful:
        fitting = [name for name in strange if fits(name, step)]
        own = [] if step.name in names else get_close_matches(step.name.lower(), fitting, 1)
        found |= {name: step for name in own}
        left += [] if own else [step]
    for step in left:
        counts = Counter({name: len(uses) for name, uses in strange.items() if fits(name, step)}).most_common(
            len(left) + 1
        )
        if len(counts) > len(left) and counts[-1][1] == counts[-2][1]:
            continue
        found |= {name: step for name, _ in counts[:1]}
    return found


def _is_name(text: str) -> bool:
    try:
        TypeAdapter(Name).validate_python(text)
    except ValidationError:
        return False
    return True


def _called(raw: dict[str, Any]) -> str:
    keys = ["name", *get_close_matches("name", [key for key in raw if key not in Step.model_fields], 1)]
    return next((raw[key] for key in keys if isinstance(raw.get(key), str)), "")


def _sound(inputs: Any) -> dict[str, Any]:
    if not isinstance(inputs, dict):
        return {}
    return {
        role: source
        for role, source in inputs.items()
        if isinstance(source, str) or (isinstance(source, list) and all(isinstance(one, str) for one in source))
    }
