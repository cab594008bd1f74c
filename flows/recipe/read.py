"""A recipe's file to a Recipe: parse, apply `--set`, check the shape, check the sense; every mistake with its line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ValidationError

from flows.recipe.check import check_step, faults, said
from flows.recipe.located_yaml import Fault, Located, read_yaml, scalar
from flows.recipe.located_yaml import Path as Field
from flows.recipe.model import Gate, Judge, Recipe, RecipeError, Register, Step
from stages import STAGES, stage

SHIPPED = Path(__file__).parent / "shipped"


def load_recipe(source: str | Path, sets: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: a YAML file, its s3:// URI, or the bare name of a shipped recipe.
        sets: changes such as `steps.int8.params.scheme=int4_weight_only`.

    Raises:
        RecipeError: it is missing or wrong; every mistake at once.
    """
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


def read_recipe(path: Path, sets: Sequence[str] = ()) -> Recipe:
    """Read, change and check the recipe in `path`.

    Raises:
        RecipeError: everything that is wrong, one line each.
    """
    document = read_yaml(_text(path))
    report = _Report(path, document)
    if document.faults:
        report.refuse(document.faults)
    data = document.value
    if not isinstance(data, dict):
        wrong = "the recipe is empty" if data is None else "a recipe is a mapping"
        report.refuse([Fault((), f"{wrong}; allowed: {', '.join(_names(Recipe))}", 1)])
    changed = {_set(data, text) for text in sets}
    report.changed = changed
    _resolve_sources(data, path.parent, changed)
    try:
        recipe = Recipe.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        report.refuse([*_shape(error, data), *_steps_alone(data)])
    found = faults(recipe)
    if found:
        report.refuse(found)
    return recipe


class _Report:
    """Faults as lines of text."""

    def __init__(self, path: Path, document: Located) -> None:
        self.path, self.document = path, document
        self.changed: set[Field] = set()

    def refuse(self, found: Iterable[Fault]) -> None:
        """Raise them, in the order of the file."""
        placed = sorted({(fault.line or self.document.line(fault.path), self._said(fault)) for fault in found})
        raise RecipeError("\n".join(f"{self.path}:{line}: {text}" for line, text in placed))

    def _said(self, fault: Fault) -> str:
        by_hand = any(fault.path[: len(path)] == path for path in self.changed)
        return f"{_dotted(fault.path, self.document.value)}{' (--set)' if by_hand else ''}: {fault.text}"


def keys_at(data: Any, path: Field) -> list[str] | None:
    """The keys that a mapping at `path` may have; None where any may stand."""
    match path:
        case ():
            return _names(Recipe)
        case ("judge",):
            return _names(Judge)
        case ("register",):
            return _names(Register)
        case ("gates", int()):
            return _names(Gate)
        case ("steps", int()):
            return _names(Step)
        case ("steps", int() as index, "params" | "inputs" as what):
            name = data["steps"][index].get("stage")
            if name not in STAGES:
                return None
            return list(stage(name).inputs) if what == "inputs" else _names(stage(name).params)
    return None


def _names(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}:1: recipe: this is not text ({error.reason}); allowed: YAML in UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give a file one may read") from error


def _set(data: dict[str, Any], text: str) -> Field:
    """Apply one `--set PATH=VALUE` in place; returns the path of the value."""
    where, equals, written = text.partition("=")
    if not equals or not where:
        raise RecipeError(f"--set {text}: allowed: PATH=VALUE, as in steps.int8.params.scheme=int4_weight_only")
    try:
        value = scalar(written)
    except ValueError as error:
        raise RecipeError(f"--set {where}: {error}") from error
    parts = where.split(".")
    here: Any = data
    path: Field = ()
    for number, part in enumerate(parts):
        key = _key(data, here, path, part, where)
        path = (*path, key)
        if number == len(parts) - 1:
            here[key] = value
            break
        if isinstance(here, dict) and here.get(part) is None:
            here[part] = {}
        here = here[key]
    return path


def _key(data: dict[str, Any], here: Any, path: Field, part: str, where: str) -> str | int:
    at = _dotted(path, data)
    if isinstance(here, list):
        names = [str(one.get("name", i)) if isinstance(one, dict) else str(i) for i, one in enumerate(here)]
        if part in names:
            return names.index(part)
        if part.isdecimal() and int(part) < len(here):
            return int(part)
        raise RecipeError(f"--set {where}: {at} has no {part!r}; allowed: {', '.join(names)}")
    if not isinstance(here, dict):
        raise RecipeError(f"--set {where}: {at} is a value and has no {part!r}; allowed: {at}=VALUE")
    allowed = keys_at(data, path)
    if allowed is not None and part not in allowed:
        raise RecipeError(f"--set {where}: {at} has no {part!r}; allowed: {', '.join(allowed) or 'nothing'}")
    return part


def _resolve_sources(data: dict[str, Any], folder: Path, changed: set[Field]) -> None:
    """Make a step's local `source` absolute: beside the recipe if it stands there, else in the working directory."""
    steps = data.get("steps")
    for index, step in enumerate(steps if isinstance(steps, list) else ()):
        params = step.get("params") if isinstance(step, dict) else None
        if not isinstance(params, dict):
            continue
        source = params.get("source")
        if not isinstance(source, str) or not source or ("://" in source and not source.startswith("file://")):
            continue
        local = Path(
            unquote(urlsplit(source).path) if source.startswith("file:///") else source.removeprefix("file://")
        )
        beside = folder / local.expanduser()
        by_hand = any(path[:2] == ("steps", index) and path[-1] == "source" for path in changed)
        found = beside if beside.exists() and not by_hand else local.expanduser()
        params["source"] = found.absolute().as_uri()


def _shape(error: ValidationError, data: Any) -> list[Fault]:
    found: dict[Field, str] = {}
    for one in error.errors(include_url=False):
        path = _within(one["loc"], data, extra=one["type"] in ("missing", "extra_forbidden"))
        text = said(one["type"], one["msg"], ", ".join(keys_at(data, path[:-1]) or ["nothing"]))
        found[path] = f"{found[path]}, or {text}" if path in found and text not in found[path] else text
    return [Fault(path, text) for path, text in found.items()]


def _within(loc: tuple[str | int, ...], data: Any, *, extra: bool) -> Field:
    """The part of pydantic's location that names something in the file; it also names branches of a union."""
    path: Field = ()
    for part in loc:
        inside = (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int))
        if not inside:
            return (*path, part) if extra and isinstance(data, dict) else path
        data, path = data[part], (*path, part)
    return path


def _steps_alone(data: dict[str, Any]) -> list[Fault]:
    """What is wrong inside the steps that have a step's shape, so that it is said together with the rest."""
    faulty: list[Fault] = []
    steps = data.get("steps")
    for index, raw in enumerate(steps if isinstance(steps, list) else ()):
        try:
            step = Step.model_validate_json(json.dumps(raw), strict=True)
        except ValidationError:
            continue
        faulty += check_step(index, step)
    return faulty


def _dotted(path: Field, data: Any) -> str:
    parts: list[str] = []
    for part in path:
        name = None
        if isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
            name = data.get("name") if isinstance(data, dict) else None
        else:
            data = data.get(part) if isinstance(data, dict) else None
        parts.append(str(name if name is not None else part))
    return ".".join(parts) or "recipe"
