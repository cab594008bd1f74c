"""A recipe as data: steps, what is judged, gates, what to register, with the JSON Schema of each.

`read` makes one from a file, `check` says whether it makes sense, `expand` which steps run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from flows.names import Alias, Title
from stages import STAGES, stage
from stages.measures.table import BROUGHT, MEASURES, SPEEDS
from stages.runtime.contract import Frozen, StageError
from stages.serving.generation import MOST_BEAMS
from stages.validate.params import Own, Variant

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60)]
"""Lowercase and without dots, so that it can name a file and a container, and `--set` can address it."""

CHAMPION = "champion"
"""What a gate calls the version that the alias stands on; no step is called so."""

_NAMED = (*MEASURES, "size_bytes", *SPEEDS)
_MEASURES = {
    "anyOf": [{"enum": [*_NAMED], "type": "string"}, {"pattern": r"^(own|harness)\.[A-Za-z0-9_-]+$", "type": "string"}]
}


def _is_measure(name: str) -> str:
    """In the table's order: errors and the JSON Schema list them."""
    if name not in _NAMED and not name.startswith(BROUGHT):
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": _either(_NAMED)})
    return name


def _either(names: Sequence[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return f"{', '.join(quoted[:-1])} or {quoted[-1]}"


if TYPE_CHECKING:
    Score = str
    Measure = str
else:
    # In the table's order: pydantic's errors and the JSON Schema list them.
    Score = Literal[tuple(MEASURES)]
    Measure = Annotated[str, AfterValidator(_is_measure), WithJsonSchema(_MEASURES)]
"""`validate` measures a score, `bench` a speed; `size_bytes` is a fact about the files."""


class RecipeError(StageError):
    """A recipe that cannot run: one line a mistake, each with file, line, field and what is allowed."""


class Step(Frozen):
    """One use of a stage."""

    name: Name
    stage: str
    inputs: dict[str, Name | list[Name]] = Field(default_factory=dict)
    params: dict[str, Any] = Field(default_factory=dict)

    def roles(self) -> dict[str, str]:
        """Role -> name of the step it reads; a list of steps becomes role.0, role.1, ..."""
        found: dict[str, str] = {}
        for role, source in self.inputs.items():
            if isinstance(source, str):
                found[role] = source
            else:
                found |= {f"{role}.{i}": one for i, one in enumerate(source)}
        return found

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """One shape a stage, with that stage's roles and params, so that editors and forms can offer them."""
        plain = handler.resolve_ref_schema(handler(core))
        return {"title": "Step", "oneOf": [_shape(plain, name, handler) for name in STAGES]}


class Judge(Frozen):
    """What is measured: artifacts and a baseline, on one split of each corpus.

    Attributes:
        windows: at most this many windows of a corpus; all by default.
        items: at most this many items of a set; all by default.
        own: measures that packages bring by the entry point `enginery.measures`; a gate names one as `own.NAME`.
        variants: how items are typed otherwise and asked once more: gates on `robustness` and `variant_flips` need it.
        beams: beginnings that encoder-decoders follow at once where they write in answer to items, all that are judged
            alike; by default what each one's settings say.
        trace: also measure each checkpoint between the baseline and the artifacts, on the first corpus and every set.
        trace_items: at most this many items of a set for such a checkpoint, so that it is not said for long where
            right answers went.
        speed: also measure how fast the artifacts are, each in turn with the baseline: gates on speed need it.
    """

    artifacts: list[Name] = Field(min_length=1)
    baseline: Name
    corpora: list[Name] = Field(min_length=1)
    measures: list[Score] = Field(default_factory=lambda: list(MEASURES), min_length=1)
    split: Literal["calibrate", "train", "validate", "test"] = "test"
    window_tokens: int = Field(default=512, ge=2)
    windows: int | None = Field(default=None, ge=1)
    items: int | None = Field(default=None, ge=1)
    variants: list[Variant] = Field(default_factory=list)
    own: list[Own] = Field(default_factory=list)
    beams: int | None = Field(default=None, ge=1, le=MOST_BEAMS)
    trace: bool = True
    trace_items: int = Field(default=200, ge=1)
    speed: bool = False


class Gate(Frozen):
    """A bound that must hold before anything is promoted.

    With `against` the bound is on the ratio to that step or to the `champion`; without `artifact` it holds for every
    judged artifact, without `corpus` on every corpus that has the measure. `at_most` and `at_least` bound the bad end
    of the 95% interval, `value_at_most` and `value_at_least` what was measured itself, `low_at_most` and
    `high_at_least` the good end: such a gate fails where the limit is surely missed, as of the worst of many slices.
    A speed is of one device and of no corpus, and is compared with the baseline alone, with which it was measured in
    turn.

    Attributes:
        slice: only this slice of the corpus: a source of a mix, an ability of a set of items.
        worst: each slice must hold by itself.
    """

    measure: Measure
    against: Name | None = None
    artifact: Name | None = None
    corpus: Name | None = None
    slice: str | None = None
    worst: bool = False
    at_most: FiniteFloat | None = None
    at_least: FiniteFloat | None = None
    value_at_most: FiniteFloat | None = None
    value_at_least: FiniteFloat | None = None
    low_at_most: FiniteFloat | None = None
    high_at_least: FiniteFloat | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Gate:
        ends = (self.at_most, self.at_least, self.low_at_most, self.high_at_least)
        if all(one is None for one in (*ends, self.value_at_most, self.value_at_least)):
            raise ValueError("a gate without a bound; allowed: at_most, at_least")
        if self.slice and self.worst:
            raise ValueError("`slice` names one slice and `worst` means each; allowed: one of both")
        return self


class Register(Frozen):
    """Under which name and alias a model that holds every gate is promoted."""

    model: Title
    alias: Alias = "champion"


class Recipe(Frozen):
    """Steps in order, what is judged, the gates, and what to register."""

    # `register` is a method of every pydantic class, so the field bears another name in Python.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, serialize_by_alias=True)

    recipe: Literal[1]
    name: Title
    steps: list[Step] = Field(min_length=1)
    judge: Judge | None = None
    gates: list[Gate] = Field(default_factory=list)
    register_as: Register | None = Field(default=None, alias="register")

    def step(self, name: str) -> Step:
        """The step of that name."""
        return next(step for step in self.steps if step.name == name)


def _shape(plain: dict[str, Any], name: str, handler: GetJsonSchemaHandler) -> dict[str, Any]:
    definition = stage(name)
    params = handler(definition.params.__pydantic_core_schema__)
    step_name = plain["properties"]["name"]
    roles = {
        role: {"type": "array", "items": step_name, "minItems": 1} if taken.many else step_name
        for role, taken in definition.inputs.items()
    }
    needed = [role for role, taken in definition.inputs.items() if not taken.optional]
    inputs = {"type": "object", "additionalProperties": False, "properties": roles, "required": needed}
    required = ["name", "stage", *(["inputs"] if needed else []), *(["params"] if params.get("required") else [])]
    return {
        "type": "object",
        "title": name,
        "additionalProperties": False,
        "properties": {
            "name": step_name,
            "stage": {"const": name, "type": "string"},
            "inputs": inputs,
            "params": params,
        },
        "required": required,
    }
