"""The JSON files of a checkpoint, a graph or an engine. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.runtime.contract import StageError

_AGAIN = "Make or fetch what it belongs to again."


def read_json(path: Path, *, optional: bool = False, absent: StageError | None = None) -> dict[str, Any]:
    """A JSON object; {} for an optional file that is absent.

    Raises:
        StageError: it is missing (`absent`, where that says it better) or not one.
    """
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise absent or StageError(
            f"{path.parent.name} has no {path.name}", remedy="Give a checkpoint in Hugging Face layout."
        ) from error
    except ValueError as error:
        raise StageError(f"{path.name} is not JSON", measured=error, limit="a JSON object", remedy=_AGAIN) from error
    if not isinstance(value, dict):
        raise StageError(
            f"{path.name} is no JSON object", measured=type(value).__name__, limit="a JSON object", remedy=_AGAIN
        )
    return value


def read_given(path: Path) -> dict[str, Any]:
    """A JSON object that a user gave: errors say where it lies.

    Raises:
        StageError: it is missing or not one.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StageError(
            f"{path} is missing", remedy="Give a folder with config.json, *.safetensors and tokenizer files."
        ) from error
    except ValueError as error:
        raise StageError(f"{path} is not JSON ({error})", remedy="Fetch or write the file again.") from error
    if not isinstance(found, dict):
        raise StageError(f"{path} is not a JSON object", remedy="Fetch or write the file again.")
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, its keys in order."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
