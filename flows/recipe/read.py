"""A recipe's file to a Recipe: parse, apply `--set`, check the shape, check the sense; every mistake with its line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

from flows.recipe.check import faults
from flows.recipe.located_yaml import Fault, Located, read_yaml, scalar
from flows.recipe.located_yaml import Path as Field
from flows.recipe.model import Recipe, RecipeError
from flows.recipe.shape import dotted, keys_at, names_of

SHIPPED = Path(__file__).parent / "shipped"


def load_recipe(source: str | Path, sets: Sequence[str] = (), gpu: str | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        source: a YAML file, its s3:// URI, or the bare name of a shipped recipe.
        sets: changes such as `steps.int8.params.scheme=int4_weight_only`.
        gpu: the architecture of the GPU where its artifacts are measured, empty for none; this machine's by default.

    Raises:
        RecipeError: it is missing or wrong; every mistake at once.
    """
    if str(source).startswith("s3://"):
        from stages.adapters.s3.client import fetch_object, parse

        with TemporaryDirectory() as folder:
            local = Path(folder, str(source).rpartition("/")[2])
            fetch_object(*parse(str(source)), local, lambda _: None)
            return read_recipe(local, sets, gpu)
    return read_recipe(recipe_path(source), sets, gpu)


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


def read_recipe(path: Path, sets: Sequence[str] = (), gpu: str | None = None) -> Recipe:
    """Read, change and check the recipe in `path`.

    Raises:
        RecipeError: everything that is wrong, one line each.
    """
    document = read_yaml(_text(path))
    data = document.value
    if not isinstance(data, dict):
        wrong = "the recipe is empty" if data is None else "a recipe is a mapping"
        empty = Fault((), f"{wrong}; allowed: {', '.join(names_of(Recipe))}", 1)
        raise _refused(path, document, set(), document.faults or [empty], [])
    data, changed, unset = _all_set(data, sets)
    document = replace(document, value=data)
    _resolve_sources(data, path.parent, changed)
    # Where YAML itself was refused, nothing is left to look at.
    lost = [fault.path for fault in document.faults if _at(data, fault.path) is None]
    found = [one for one in faults(data, gpu) if not any(one.path[: len(at)] == at for at in [*lost, *unset])]
    if document.faults or found or unset:
        raise _refused(path, document, changed, [*document.faults, *found], list(unset.values()))
    return Recipe.model_validate_json(json.dumps(data), strict=True)


def _refused(
    path: Path, document: Located, changed: set[Field], found: Iterable[Fault], unset: list[str]
) -> RecipeError:
    """Everything that is wrong: what the command line asked for, then faults in the order of the file."""
    lines: set[tuple[int, str]] = set()
    for fault in found:
        by_hand = any(fault.path[: len(one)] == one for one in changed)
        text = f"{dotted(fault.path, document.value)}{' (--set)' if by_hand else ''}: {fault.text}"
        lines.add((fault.line or document.line(fault.path), text))
    return RecipeError("\n".join([*unset, *(f"{path}:{line}: {text}" for line, text in sorted(lines))]))


def _at(data: Any, path: Field) -> Any:
    try:
        for key in path:
            data = data[key]
    except (KeyError, IndexError, TypeError):  # what was merged by `<<` has lines and no place of its own
        return None
    return data


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}:1: recipe: this is not text ({error.reason}); allowed: YAML in UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give a file one may read") from error


class _Unset(Exception):
    """A `--set` that cannot be applied, and how far its path led."""

    def __init__(self, text: str, path: Field = ()) -> None:
        super().__init__(text)
        self.path = path


def _all_set(data: dict[str, Any], sets: Sequence[str]) -> tuple[dict[str, Any], set[Field], dict[Field, str]]:
    """Apply every `--set`: the recipe as changed, the paths of the values, and what could not be applied where.

    What stands at such a place is not looked at, since the change might have mended it.
    """
    changed: set[Field] = set()
    unset: dict[Field, str] = {}
    for number, text in enumerate(sets):
        tried = deepcopy(data)
        try:
            changed.add(_set(tried, text))
            data = tried
        except _Unset as error:
            at = error.path if len(error.path) > 1 else ("--set", number)
            unset[at] = f"{unset[at]}\n{error}" if at in unset else str(error)
    return data, changed, unset


def _set(data: dict[str, Any], text: str) -> Field:
    """Apply one `--set PATH=VALUE` in place; returns the path of the value."""
    where, equals, written = text.partition("=")
    if not equals or not where:
        raise _Unset(f"--set {text}: allowed: PATH=VALUE, as in steps.int8.params.scheme=int4_weight_only")
    try:
        value = scalar(written)
    except ValueError as error:
        raise _Unset(f"--set {where}: {error}") from error
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
    at = dotted(path, data)
    if isinstance(here, list):
        names = [str(one.get("name", i)) if isinstance(one, dict) else str(i) for i, one in enumerate(here)]
        if part in names:
            return names.index(part)
        if part.isdecimal() and int(part) < len(here):
            return int(part)
        raise _Unset(f"--set {where}: {at} has no {part!r}; allowed: {', '.join(names)}", path)
    if not isinstance(here, dict):
        raise _Unset(f"--set {where}: {at} is a value and has no {part!r}; allowed: {at}=VALUE", path)
    allowed = keys_at(data, path)
    if allowed is not None and part not in allowed:
        raise _Unset(f"--set {where}: {at} has no {part!r}; allowed: {', '.join(allowed) or 'nothing'}", path)
    return part


def _resolve_sources(data: dict[str, Any], folder: Path, changed: set[Field]) -> None:
    """Make local sources of a step absolute: beside the recipe if they stand there, else in the working directory."""
    steps = data.get("steps")
    for index, step in enumerate(steps if isinstance(steps, list) else ()):
        params = step.get("params") if isinstance(step, dict) else None
        if not isinstance(params, dict):
            continue
        by_hand = {path[2:] for path in changed if path[:2] == ("steps", index)}
        for name in ("source", "base"):
            _resolve(params, name, folder, ("params", name) in by_hand)
        several = params.get("sources")
        for number, one in enumerate(several if isinstance(several, list) else ()):
            if isinstance(one, dict):
                _resolve(one, "source", folder, ("params", "sources", number, "source") in by_hand)


def _resolve(params: dict[str, Any], name: str, folder: Path, by_hand: bool) -> None:
    source = params.get(name)
    if not isinstance(source, str) or not source or ("://" in source and not source.startswith("file://")):
        return
    local = Path(unquote(urlsplit(source).path) if source.startswith("file:///") else source.removeprefix("file://"))
    beside = folder / local.expanduser()
    found = beside if beside.exists() and not by_hand else local.expanduser()
    params[name] = found.absolute().as_uri()
