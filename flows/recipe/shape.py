"""The shape of a recipe: all that pydantic says of a file in the file's own words, and what of it is left to go by."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from flows.recipe.located_yaml import Fault
from flows.recipe.located_yaml import Path as Field
from flows.recipe.model import Gate, Judge, Recipe, Register, Step
from stages import STAGES, stage

BROKEN: Any = object()
"""Stands where what was written has no right shape: nothing more is said of it, nor of what builds on it."""


def shaped(data: dict[str, Any]) -> tuple[list[Fault], dict[str, Any]]:
    """What is wrong in a recipe's shape, and the recipe with BROKEN in those places."""
    try:
        Recipe.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    else:
        return [], data
    found: dict[Field, str] = {}
    broken: set[Field] = set()
    for one in without_echoes(errors):
        path = _within(one["loc"], data, extra=one["type"] in ("missing", "extra_forbidden"))
        text = said(one["type"], one["msg"], ", ".join(keys_at(data, path[:-1]) or ["nothing"]))
        found[path] = f"{found[path]}, or {text}" if path in found and text not in found[path] else text
        if one["type"] not in ("missing", "value_error"):  # the first is not there, the second sound in its parts
            broken.add(path)
    left = _without(data, (), broken)
    return [Fault(path, text) for path, text in found.items()], left if isinstance(left, dict) else {}


def part(mapping: Any, key: str, default: Any = None) -> Any:
    """What stands at a key of what was left; BROKEN also where only a misspelling of the key is there."""
    if not isinstance(mapping, dict):
        return BROKEN
    if key in mapping:
        return mapping[key]
    return BROKEN if meant(key, [name for name, value in mapping.items() if value is BROKEN]) else default


def meant(key: object, written: Iterable[object]) -> bool:
    """Whether one of the keys that were written is probably this one, misspelled."""
    return bool(get_close_matches(str(key), map(str, written), 1))


def without_echoes(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Pydantic's errors but those of a key that is missing only because it is misspelled beside."""
    unknown: dict[tuple[str | int, ...], list[str | int]] = {}
    for one in errors:
        if one["type"] == "extra_forbidden":
            unknown.setdefault(one["loc"][:-1], []).append(one["loc"][-1])
    return [
        one for one in errors if one["type"] != "missing" or not meant(one["loc"][-1], unknown.get(one["loc"][:-1], ()))
    ]


def said(kind: str, message: str, allowed: str) -> str:
    """One of pydantic's errors in the words of a recipe."""
    if kind == "extra_forbidden":
        return f"unknown key; allowed: {allowed}"
    if kind == "missing":
        return "required and not there"
    return message.removeprefix("Value error, ").replace("Input should", "should").replace("String should", "should")


def keys_at(data: Any, path: Field) -> list[str] | None:
    """The keys that a mapping at `path` may have; None where any may stand."""
    match path:
        case ():
            return names_of(Recipe)
        case ("judge",):
            return names_of(Judge)
        case ("register",):
            return names_of(Register)
        case ("gates", int()):
            return names_of(Gate)
        case ("steps", int()):
            return names_of(Step)
        case ("steps", int() as index, "params" | "inputs" as what):
            name = data["steps"][index].get("stage")
            if not isinstance(name, str) or name not in STAGES:
                return None
            return list(stage(name).inputs) if what == "inputs" else names_of(stage(name).params)
    return None


def names_of(model: type[BaseModel]) -> list[str]:
    """The keys of a model as a file writes them."""
    return [field.alias or name for name, field in model.model_fields.items()]


def dotted(path: Field, data: Any) -> str:
    """A path as `--set` writes it: a step by its name, a gate by its number."""
    parts: list[str] = []
    for one in path:
        name = None
        if isinstance(data, list) and isinstance(one, int) and one < len(data):
            data = data[one]
            name = data.get("name") if isinstance(data, dict) else None
        else:
            data = data.get(one) if isinstance(data, dict) else None
        parts.append(str(name if name is not None else one))
    return ".".join(parts) or "recipe"


def _without(value: Any, path: Field, broken: set[Field]) -> Any:
    if path in broken:
        return BROKEN
    if isinstance(value, dict):
        return {key: _without(inner, (*path, key), broken) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without(inner, (*path, index), broken) for index, inner in enumerate(value)]
    return value


def _within(loc: tuple[str | int, ...], data: Any, *, extra: bool) -> Field:
    """The part of pydantic's location that names something in the file; it also names branches of a union."""
    path: Field = ()
    for part_ in loc:
        inside = (isinstance(data, dict) and part_ in data) or (isinstance(data, list) and isinstance(part_, int))
        if not inside:
            return (*path, part_) if extra and isinstance(data, dict) else path
        data, path = data[part_], (*path, part_)
    return path
