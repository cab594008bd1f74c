"""Commands for a team's Prefect server: deploy."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer


class Kind(StrEnum):
    """What the workers start."""

    docker = "docker"
    kubernetes = "kubernetes"


def deploy(
    kind: Annotated[Kind, typer.Option("--type", help="What the workers start.")] = Kind.docker,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            min=0,
            show_default="$ENGINERY_GPUS",
            help="GPUs of the gpu pool, and its limit from now on; 0: compile ahead of time.",
        ),
    ] = None,
    cpu_steps: Annotated[
        int | None,
        typer.Option(
            "--cpu-steps",
            min=1,
            show_default="$ENGINERY_CPU_STEPS",
            help="Steps that the cpu pool runs at once, from now on.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")] = False,
) -> None:
    """Bring a Prefect server up to date.

    Makes what is missing of bucket, secrets, work pools, limits, deployments and automations, and changes what differs
    from infra/. What an operator set stays: pauses, limits, schedules switched on or off. So does what this shell has
    no variable for.
    """
    from flows.settings import enter, settle

    shell = dict(os.environ)
    settings = settle(launcher="process")
    enter(settings)
    from flows.production.deploy import deploy as bring_up_to_date
    from flows.production.pools import Size
    from flows.production.variables import Shell

    size = Size.told(shell, gpus, cpu_steps)
    bring_up_to_date(kind.value, size, Shell(shell), settings.store, typer.echo, dry=dry_run)
