"""What a stage takes and gives: from its definition, its params' schema and docstring, with nothing heavy loaded."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages import STAGES, stage
from stages.measures.table import MEASURES
from stages.runtime.contract import Frozen, Input, Kind, Params

_LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "minLength": "at least {} characters",
    "minItems": "at least {} of them",
    "maxItems": "at most {} of them",
    "pattern": "matching {}",
}


class ParamLine(Frozen):
    """One param of a stage: its type, the values it takes, its default as JSON, None where it must be given."""

    name: str
    type: str
    allowed: str
    default: str | None
    about: str


class MeasureLine(Frozen):
    """What `validate` measures, and what it is."""

    name: str
    about: str


class StageLine(Frozen):
    """One stage.

    Attributes:
        inputs: role -> the kinds of artifact that it takes, and whether it may be left out or be a list.
        image: the set of dependencies that it runs with.
    """

    name: str
    about: str
    inputs: dict[str, str]
    output: Kind
    image: str
    params: list[ParamLine]
    measures: list[MeasureLine]


class StagesResult(Frozen):
    """`enginery stages --json`."""

    stages: list[StageLine]


def described(name: str) -> StageLine:
    """One stage as its definition says it is.

    Raises:
        StageError: no stage is called so.
    """
    definition = stage(name)
    about = (sys.modules[STAGES[name].partition(":")[0]].__doc__ or "").strip().splitlines()
    first = about[0].removeprefix(f"{name}: ").rstrip(".") if about else ""
    return StageLine(
        name=name,
        about=f"{first[:1].upper()}{first[1:]}",
        inputs={role: _taken(one) for role, one in definition.inputs.items()},
        output=definition.output,
        image=f"{definition.image}{', or what its params ask for' if definition.chosen_image else ''}",
        params=params(definition.params),
        measures=measures() if name == "validate" else [],
    )


def measures() -> list[MeasureLine]:
    """What `validate` measures and a gate may ask for, each with the first sentence of its function."""
    lines = []
    for name, one in MEASURES.items():
        how = "The exponential of the mean" if one.exponential else "The mean"
        beside = " Needs a baseline." if one.paired else ""
        about = f"{_first_sentence(one.function)} {how}. Of models that {', '.join(sorted(one.tasks))}.{beside}"
        lines.append(MeasureLine(name=name, about=about))
    return [*lines, MeasureLine(name="size_bytes", about="Bytes of the model's own files.")]


def params(kind: type[Params]) -> list[ParamLine]:
    """The fields of a stage's params, in their order."""
    schema, said = kind.model_json_schema(), documented(kind)
    lines = []
    for name, field in schema["properties"].items():
        if field.get("pinned"):
            continue  # filled in when the run is planned
        types, allowed = _read(field, schema.get("$defs", {}))
        lines.append(
            ParamLine(
                name=name,
                type=types,
                allowed=allowed,
                default=json.dumps(field["default"], ensure_ascii=False) if "default" in field else None,
                about=said.get(name, field.get("description", "")),
            )
        )
    return lines


def documented(kind: type[Any]) -> dict[str, str]:
    """Field -> what the `Attributes:` of a class's docstring, and of those that it stands on, say of it."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        name = ""
        for line in inspect.cleandoc(one.__dict__.get("__doc__") or "").partition("Attributes:\n")[2].splitlines():
            if begun := re.match(r" {4}(\w+): (.*)", line):
                name = begun[1]
                found[name] = begun[2]
            elif name and line.startswith(" " * 8):
                found[name] += f" {line.strip()}"
    return found


def _taken(one: Input) -> str:
    kinds = " or ".join(sorted(one.kinds))
    return f"{'a list of ' if one.many else ''}{kinds}{' (optional)' if one.optional else ''}"


def _read(field: Mapping[str, Any], defs: Mapping[str, Any]) -> tuple[str, str]:
    """A field's type, and the values it takes, as people read them."""
    if "$ref" in field:
        field = defs[field["$ref"].rpartition("/")[2]]
    if "anyOf" in field:
        several = [_read(one, defs) for one in field["anyOf"]]
        types, allowed = zip(*several, strict=True)
        return " or ".join(dict.fromkeys(types)), "; ".join(filter(None, dict.fromkeys(allowed)))
    choices = field.get("enum", [field["const"]] if "const" in field else [])
    said = [", ".join(str(one) for one in choices)] if choices else []
    said += [text.format(field[key]) for key, text in _LIMITS.items() if key in field]
    kind = {"object": "mapping", "array": "list"}.get(field.get("type", ""), str(field.get("type", "any")))
    if kind in ("list", "mapping"):
        inner = field.get("items") or field.get("additionalProperties")
        inner = field["prefixItems"][0] if "prefixItems" in field else inner
        of, limits = _read(inner, defs) if isinstance(inner, dict) else ("any", "")
        kind = f"{kind} of {of}"
        said += [limits] if limits else []
    return kind, ", ".join(said)


def _first_sentence(function: str) -> str:
    """Of a function's docstring, read from its source: importing it would load torch."""
    module, _, name = function.partition(":")
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            said = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
            return re.sub(r": \w+, (shape )?\[.*?\]\.", ".", said)
    return ""
