"""Make a Prefect server ready for production: bucket, secrets, work pools, limits, deployments, automations.

What is declared and differs is changed, and nothing else: what an operator set stays. So the same command follows
every release, from any shell.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from flows.prefect_api.retry import patiently
from flows.production.deployments import all_declared, look_at_deployment
from flows.production.differences import Difference, Part, summary
from flows.production.pools import POOLS, Kind, Size, declared, look_at_limit, look_at_pool
from flows.production.secret_blocks import look_at_secret
from flows.production.variables import SECRETS, Shell, names_in
from stages.runtime.contract import StageError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

Look = Callable[["SyncPrefectClient"], Part]


def deploy(kind: Kind, size: Size, shell: Shell, store: str, say: Callable[[str], None], *, dry: bool = False) -> None:
    """Bring the Prefect server of $PREFECT_API_URL up to date.

    Args:
        kind: what the workers start: containers of Docker, or jobs of Kubernetes.
        size: how much the pools do at once.
        shell: the variables that were set before this process set any.
        store: URI of the store; its bucket is made if it is not there.
        say: who is told what was done.
        dry: tell what would be done, and do nothing.

    Raises:
        StageError: no server is named; variables are missing; a pool is of another type. Nothing was changed.
        Unavailable: the server does not answer.
    """
    from prefect.client.orchestration import get_client

    if not os.environ.get("PREFECT_API_URL"):
        raise StageError("`enginery deploy` needs a Prefect server", remedy="Set PREFECT_API_URL.")
    with get_client(sync_client=True) as client:
        # All is looked at before anything is made: what is refused is refused here.
        looks = _looks(kind, size, shell, store)
        found = patiently(lambda: _found(client, looks, shell), say=say)
        for line in shell.kept_line():
            say(line)
        for place, look in enumerate(looks):
            if not dry:
                found[place] = patiently(partial(_made, client, look), say=say)
            for line in found[place].lines():
                say(line)
    say(summary(found, dry=dry))


def _looks(kind: Kind, size: Size, shell: Shell, store: str) -> list[Look]:
    templates = [declared(pool, kind, 1) for pool in POOLS]
    secrets = [name for name in SECRETS if name in names_in(templates)]
    return [
        *([lambda _: _bucket(store)] if store.startswith("s3://") else []),
        *(partial(look_at_secret, shell=shell, variable=name) for name in secrets),
        *(partial(look_at_pool, shell=shell, pool=pool, kind=kind, size=size) for pool in POOLS),
        partial(look_at_limit, name="gpu", at_first=size.at_first("gpu"), asked=size.asked("gpu")),
        *(partial(look_at_deployment, shell=shell, one=one) for one in all_declared()),
        *_automations(shell),
    ]


def _found(client: SyncPrefectClient, looks: list[Look], shell: Shell) -> list[Part]:
    found = [look(client) for look in looks]
    shell.check()
    return found


def _made(client: SyncPrefectClient, look: Look) -> Part:
    """Look again and change what differs, as often as it takes: a lost answer does no harm."""
    part = look(client)
    if part.differences:
        part.make()
    return part


def _bucket(uri: str) -> Part:
    from stages.adapters.s3.bucket import ensure_bucket, has_bucket

    differences = [] if has_bucket(uri) else [Difference(wanted="made")]
    return Part(name=f"bucket {uri.split('/')[2]}", differences=differences, make=partial(ensure_bucket, uri))


def _automations(shell: Shell) -> list[Look]:
    from flows.production.automations import look_at_arrivals, look_at_automation, queue_alert, zombies

    wanted = [zombies(), *map(queue_alert, POOLS)]
    return [partial(look_at_arrivals, shell=shell), *(partial(look_at_automation, wanted=one) for one in wanted)]
