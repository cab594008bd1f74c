"""Recipes: typed, checked whole before anything starts, expanded into the steps that run.

Reading a recipe imports the stages' definitions and nothing that computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, FiniteFloat, GetJsonSchemaHandler, model_validator
from pydantic_core import core_schema

from stages import STAGES, stage
from stages.runtime.contract import Frozen, Kind, StageError

SHIPPED = Path(__file__).parent / "recipes"

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60)]
"""Lowercase and without dots, so that it can name a file and a container, and `--set` can address it."""

Title = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
"""The name of a recipe or a registered model; dots as in `qwen2.5`."""

Score = Literal["perplexity", "kl_divergence", "top1_agreement"]
"""What `validate` measures on text; `size_bytes` is a fact about the files."""

SCORES: tuple[Score, ...] = ("perplexity", "kl_divergence", "top1_agreement")
Measure = Literal["perplexity", "kl_divergence", "top1_agreement", "size_bytes"]


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
        trace: also measure each checkpoint between the baseline and the artifacts, on the first corpus.
    """

    artifacts: list[Name] = Field(min_length=1)
    baseline: Name
    corpora: list[Name] = Field(min_length=1)
    measures: list[Score] = Field(default_factory=lambda: list(SCORES), min_length=1)
    split: Literal["calibrate", "train", "validate", "test"] = "test"
    window_tokens: int = Field(default=512, ge=2)
    windows: int | None = Field(default=None, ge=1)
    trace: bool = True


class Gate(Frozen):
    """A bound that must hold before anything is promoted.

    With `against` the bound is on the ratio to that step or to the `champion`; without `artifact` it holds for every
    judged artifact, without `corpus` on every corpus.
    """

    measure: Measure
    against: Name | None = None
    artifact: Name | None = None
    corpus: Name | None = None
    at_most: FiniteFloat | None = None
    at_least: FiniteFloat | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Gate:
        if self.at_most is None and self.at_least is None:
            raise ValueError("a gate without a bound; allowed: at_most, at_least")
        return self


class Register(Frozen):
    """Under which name and alias a model that holds every gate is promoted."""

    model: Title
    alias: Name = "champion"


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

    def expanded(self) -> list[PlannedStep]:
        """The recipe's steps, then the measurements that `judge` asks for."""
        planned = [PlannedStep(s.name, s.stage, s.roles(), dict(s.params)) for s in self.steps]
        return planned + ([] if self.judge is None else list(_measurements(self, self.judge)))

    def check(self) -> None:
        """Raise RecipeError unless the steps, the judging and the gates fit together."""
        from flows.recipe.check import faults

        found = faults(self)
        if found:
            raise RecipeError("\n".join(f"{dotted(fault.path, self)}: {fault.text}" for fault in found))


@dataclass(frozen=True)
class PlannedStep:
    """A step as it runs.

    Attributes:
        inputs: role -> name of the step it reads.
        measures: the step that this one measures, empty for a step of the recipe.
        corpus: the corpus it is measured on.
        traced: it only draws the curve of the intermediate checkpoints; no gate reads it.
    """

    name: str
    stage: str
    inputs: dict[str, str]
    params: dict[str, Any]
    measures: str = ""
    corpus: str = ""
    traced: bool = False


def load_recipe(source: str | Path, sets: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: a YAML file, its s3:// URI, or the bare name of a shipped recipe.
        sets: changes such as `steps.int8.params.scheme=int4_weight_only`.

    Raises:
        RecipeError: it is missing or wrong; every mistake at once.
    """
    from flows.recipe.read import read_recipe

    if str(source).startswith("s3://"):
        from stages.adapters.s3_client import fetch_object, parse

        with TemporaryDirectory() as folder:
            local = Path(folder, str(source).rpartition("/")[2])
            fetch_object(*parse(str(source)), local, lambda _: None)
            return read_recipe(local, sets)
    return read_recipe(recipe_path(source), sets)


def shipped() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def recipe_path(source: str | Path) -> Path:
    """The file of a recipe given as a path or as a shipped name.

    Raises:
        RecipeError: there is none.
    """
    text = str(source)
    path = Path(text).expanduser()
    if not path.is_file() and not path.suffix and len(path.parts) == 1 and text in shipped():
        return SHIPPED / f"{text}.yaml"
    if not path.is_file():
        raise RecipeError(
            f"there is no recipe {text!r}; give a YAML file or one of the shipped: {', '.join(shipped())}"
        )
    return path


def executable_here(step: Step | PlannedStep) -> bool:
    """Whether the artifact of a step can be executed by the runtimes of this machine without a GPU."""
    return step.stage != "compile" or step.params.get("backend") == "onnxruntime"


def upstream(recipe: Recipe, name: str) -> set[str]:
    """The names of all steps that `name` reads, directly or through others."""
    known = {step.name: set(step.roles().values()) for step in recipe.steps}
    found: set[str] = set()
    pending = list(known.get(name, ()))
    while pending:
        one = pending.pop()
        if one not in found:
            found.add(one)
            pending += known.get(one, ())
    return found


def dotted(path: Iterable[str | int], recipe: Recipe | None = None) -> str:
    """A path as `--set` writes it: a step by its name, a gate by its number."""
    parts = list(path)
    if recipe and len(parts) > 1 and parts[0] == "steps" and isinstance(parts[1], int):
        parts[1] = recipe.steps[parts[1]].name
    return ".".join(str(part) for part in parts) or "recipe"


def _measurements(recipe: Recipe, judge: Judge) -> Iterable[PlannedStep]:
    executed = [name for name in judge.artifacts if executable_here(recipe.step(name))]
    for artifact in dict.fromkeys([judge.baseline, *executed]):
        for corpus in judge.corpora:
            yield _measurement(judge, recipe.step(artifact), corpus, against=artifact != judge.baseline)
    if not judge.trace:
        return
    above = set().union(*(upstream(recipe, name) for name in judge.artifacts))
    for step in recipe.steps:
        between = step.name in above and judge.baseline in upstream(recipe, step.name)
        if between and step.name not in judge.artifacts and stage(step.stage).output is Kind.CHECKPOINT:
            yield _measurement(judge, step, judge.corpora[0], traced=True)


def _measurement(judge: Judge, step: Step, corpus: str, *, against: bool = False, traced: bool = False) -> PlannedStep:
    artifact, target = step.name, "torch:cpu" if stage(step.stage).output is Kind.CHECKPOINT else "onnxruntime:cpu"
    params: dict[str, Any] = {"split": judge.split, "window_tokens": judge.window_tokens, "target": target}
    if judge.windows is not None:
        params["windows"] = judge.windows
    inputs = {"model": artifact, "text": corpus} | ({"baseline": judge.baseline} if against else {})
    return PlannedStep(f"validate-{artifact}-{corpus}", "validate", inputs, params, artifact, corpus, traced)


def _shape(plain: dict[str, Any], name: str, handler: GetJsonSchemaHandler) -> dict[str, Any]:
    definition = stage(name)
    params = handler(definition.params.__pydantic_core_schema__)
    one = plain["properties"]["name"]
    roles = {
        role: {"type": "array", "items": one, "minItems": 1} if taken.many else one
        for role, taken in definition.inputs.items()
    }
    needed = [role for role, taken in definition.inputs.items() if not taken.optional]
    inputs = {"type": "object", "additionalProperties": False, "properties": roles, "required": needed}
    required = ["name", "stage", *(["inputs"] if needed else []), *(["params"] if params.get("required") else [])]
    return {
        "type": "object",
        "title": name,
        "additionalProperties": False,
        "properties": {"name": one, "stage": {"const": name, "type": "string"}, "inputs": inputs, "params": params},
        "required": required,
    }
