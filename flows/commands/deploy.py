"""Commands for a team's Prefect server: deploy."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Kind(StrEnum):
    """What the workers start."""

    docker = "docker"
    kubernetes = "kubernetes"


def deploy(
    kind: Annotated[Kind, typer.Option("--type", help="What the workers start.")] = Kind.docker,
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="GPUs of the gpu pool; 0: compile ahead of time.")] = 1,
) -> None:
    """Bring a Prefect server up to date.

    Makes or updates the bucket, work pools, limits, deployments and automations, as infra/ describes them.
    """
    from flows.settings import enter, settle

    settings = settle(launcher="process")
    from flows.production.deploy import deploy as bring_up_to_date
    from flows.production.deploy import make_bucket

    if make_bucket(settings.store):
        typer.echo(f"made the bucket of {settings.store}")
    enter(settings)
    bring_up_to_date(kind.value, gpus, typer.echo)
