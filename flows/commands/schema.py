"""The JSON Schemas that ship with the package: `python -m flows.commands.schema` writes them all."""

from __future__ import annotations

import json
from pathlib import Path

from flows.recipe.model import Recipe
from flows.registry.overview import ModelsResult
from flows.reporting.compare import CompareResult
from flows.reporting.stage_docs import StagesResult
from flows.results import SCHEMAS, CheckResult
from stages.runtime.contract import Frozen

LISTS: dict[str, type[Frozen]] = {
    "models": ModelsResult,
    "stages": StagesResult,
    "compare": CompareResult,
    "check": CheckResult,
}
"""What is printed with --json and kept nowhere."""
FOLDER = Path(__file__).parent / "schemas"


def schemas() -> dict[str, str]:
    """File name -> text, generated from the models and every stage's params."""
    models: dict[str, type[Frozen]] = {"recipe": Recipe, **SCHEMAS, **LISTS}
    return {f"{name}.json": _text(name, model.model_json_schema()) for name, model in models.items()}


def _text(name: str, schema: dict[str, object]) -> str:
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"enginery {name}"}
    return json.dumps(schema | head, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write(folder: Path = FOLDER) -> None:
    """Write every schema into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in schemas().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
