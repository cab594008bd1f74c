"""An alias of MLflow's registry as a thing that arrives: the version that it stands on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flows.names import checked_alias
from flows.recipe.model import Recipe
from flows.tracking.connect import Tracking
from flows.tracking.errors import MISSING, Refused
from flows.triggers.arrival_records import Arrival, moved_alias
from stages.adapters.sources import SCHEMES
from stages.runtime.contract import StageError

SOURCE_TAG = "enginery.source"
"""A version's tag that says where its checkpoint lies, where that is not the version's own source."""


@dataclass(frozen=True)
class Alias:
    """A watched alias, `models:/NAME@ALIAS`."""

    model: str
    name: str

    @property
    def uri(self) -> str:
        """As MLflow writes it."""
        return f"models:/{self.model}@{self.name}"


def parse(uri: str, recipe: Recipe) -> Alias:
    """An alias to watch for a recipe.

    Raises:
        StageError: the form is another, MLflow takes no such alias, or the recipe promotes to this very alias and would
            start itself.
    """
    found = re.fullmatch(r"models:/([^@/:]+)@([^@/]+)", uri)
    if not found:
        raise StageError(f"{uri} names no alias", limit="models:/NAME@ALIAS", remedy="Write it in this form.")
    alias = Alias(found[1], checked_alias(found[2]))
    register = recipe.register_as
    if register and (register.model, register.alias) == (alias.model, alias.name):
        raise StageError(
            f"recipe {recipe.name} promotes to {alias.uri} itself, so that each run would start another",
            remedy="Watch another alias.",
        )
    return alias


def standing(tracking: Tracking, alias: Alias) -> str | None:
    """The number of the version that an alias stands on, None where there is no such model or alias.

    Raises:
        Unavailable: MLflow does not answer.
    """
    try:
        aliases = tracking.client.get_registered_model(alias.model).aliases
    except Refused as error:
        if error.code != MISSING:
            raise
        return None
    return str(aliases[alias.name]) if alias.name in aliases else None


def arrival(tracking: Tracking, alias: Alias, version: str, recipe: str) -> Arrival:
    """A version under an alias, with the source of its checkpoint where it names one that `fetch` speaks.

    Raises:
        StageError: there is no such version.
        Unavailable: MLflow does not answer.
    """
    found = tracking.client.get_model_version(alias.model, version)
    source = found.tags.get(SOURCE_TAG) or found.source or ""
    fetched = source if source.partition("://")[0] in SCHEMES and "://" in source else ""
    return moved_alias(recipe, alias.model, alias.name, version, fetched, f"{found.source} {found.run_id}")
