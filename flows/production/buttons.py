"""Promotion and rollback as Prefect flows, for those who may press a button and may not open a shell."""

from __future__ import annotations

from prefect import flow, get_run_logger

from flows.registry.projection import Registry, Release, promote, rollback
from flows.settings import enter, settle
from flows.tracking.connect import open_tracking


@flow(name="promote", flow_run_name="{model} {version} as {alias}")
def promote_version(model: str, version: str, alias: str = "champion", why: str = "") -> str:
    """Make an alias stand on a registered version; returns the version that it stands on.

    Args:
        model: name in the registry.
        version: number of the version.
        alias: to move.
        why: for the journal.
    """
    return _said(promote(_registry(), model, version, alias, why), model, alias)


@flow(name="rollback", flow_run_name="{model} {alias}")
def roll_back(model: str, alias: str = "champion", why: str = "") -> str:
    """Make an alias stand on what it stood on before; returns the version that it stands on.

    Args:
        model: name in the registry.
        alias: to move.
        why: for the journal.
    """
    return _said(rollback(_registry(), model, alias, why), model, alias)


def _registry() -> Registry:
    settings = settle()
    scratch = enter(settings)
    return Registry(settings.connect().objects, open_tracking(scratch))


def _said(made: Release, model: str, alias: str) -> str:
    get_run_logger().info(made.note or f"{model}@{alias} stands on version {made.version}")
    return made.version
