"""The JSON Schemas that ship with the package: `python -m flows.commands.schema` writes them all."""

from __future__ import annotations

import json
from pathlib import Path

from flows.recipe.model import Recipe
from flows.registry.overview import ModelsResult
from flows.reporting.compare import CompareResult
from flows.reporting.stage_docs import StagesResult
from flows.results import CheckResult, Inspection, ListResult, PlanResult, RunResult, RunsResult, VerifyResult
from stages.runtime.contract import Frozen

SCHEMAS: dict[str, type[Frozen]] = {
    "recipe": Recipe,
    "run": RunResult,
    "plan": PlanResult,
    "inspect": Inspection,
    "ls": ListResult,
    "runs": RunsResult,
    "verify": VerifyResult,
    "models": ModelsResult,
    "stages": StagesResult,
    "compare": CompareResult,
    "check": CheckResult,
}
"""Name of the schema file -> what it describes."""
FOLDER = Path(__file__).parent / "schemas"


def schemas() -> dict[str, str]:
    """File name -> text, generated from the models and every stage's params."""
    return {f"{name}.json": _text(name, model.model_json_schema()) for name, model in SCHEMAS.items()}


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
