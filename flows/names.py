"""What a registered model and its aliases may be called: as MLflow has it, known without loading MLflow.

An alias stands in the promotion journal before MLflow hears of it: what MLflow refuses must not get so far.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from stages.runtime.contract import StageError

_TITLE = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
_ALIAS, _VERSION, _MOST = r"[\w-]+", r"[vV]\d+", 255
_ALIASES = f"letters, digits, _ and -, at most {_MOST} of them, but neither `latest` nor `v` and a number"

LONGEST = 100
"""Characters of a title."""
Title = Annotated[str, Field(pattern=_TITLE, max_length=LONGEST)]
"""The name of a recipe or a registered model; dots as in `qwen2.5`. MLflow takes all of them."""


def alias_fault(alias: str) -> str:
    """Why MLflow takes no such alias; empty where it does.

    Source: MLflow 3, `mlflow.utils.validation`: an alias's characters, its length, and the names of versions.
    """
    if alias.lower() == "latest" or re.fullmatch(_VERSION, alias):
        return f"MLflow reserves the alias {alias!r} for versions by their number"
    if len(alias) > _MOST or not re.fullmatch(_ALIAS, alias):
        return f"MLflow takes no alias {alias!r}"
    return ""


def checked_alias(alias: str) -> str:
    """The alias itself.

    Raises:
        StageError: MLflow takes no such alias.
    """
    if fault := alias_fault(alias):
        raise StageError(fault, limit=_ALIASES, remedy="Name another, such as champion.")
    return alias


def checked_model(model: str) -> str:
    """The model's name itself.

    Raises:
        StageError: no recipe can register a model so.
    """
    if not re.fullmatch(_TITLE.strip("^$"), model):
        limit = "letters, digits, _, . and -, of which the first is a letter or a digit"
        raise StageError(
            f"no registered model is called {model!r}", limit=limit, remedy="`enginery models` lists those there are."
        )
    return model


def _an_alias(alias: str) -> str:
    if fault := alias_fault(alias):
        raise ValueError(f"{fault}; allowed: {_ALIASES}")
    return alias


Alias = Annotated[
    str,
    AfterValidator(_an_alias),
    Field(
        json_schema_extra={
            "pattern": f"^{_ALIAS}$",
            "maxLength": _MOST,
            "not": {"pattern": rf"^([lL][aA][tT][eE][sS][tT]|{_VERSION})$"},
        }
    ),
]
"""An alias of a registered model."""
