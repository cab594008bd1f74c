"""The flow runs that made one artifact, or tried to: how they are found, numbered, begun and given up.

Prefect's `run_deployment` gives back an old run for a key it knows, even a failed one. So the key is the work and an
attempt, and every attempt bears the work as a tag: the next is the highest number known and one, whichever of them an
operator has removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx

from flows.prefect_api.retry import patiently
from stages.runtime.contract import StageError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

RUNNER = "run-stage"
_PAGE = 200
"""The most that a server tells at once; the newest are among them."""


def attempts(client: SyncPrefectClient, work: str) -> list[FlowRun]:
    """The flow runs of one work, first attempt first."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
    from prefect.client.schemas.sorting import FlowRunSort

    found = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[_tag(work)])),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=_PAGE,
    )
    return sorted(found, key=_number)


def begin(
    known: list[FlowRun],
    work: str,
    *,
    pool: str,
    name: str,
    tags: list[str],
    parameters: Mapping[str, Any],
    job_variables: Mapping[str, Any],
) -> FlowRun:
    """Start the attempt after those that are known; where two start it at once, both get the same one.

    Raises:
        StageError: there is no such pool.
    """
    from prefect.deployments import run_deployment
    from prefect.exceptions import ObjectNotFound

    number = _number(known[-1]) + 1 if known else 1
    try:
        return run_deployment(  # type: ignore[return-value]
            f"{RUNNER}/{pool}",
            parameters=dict(parameters),
            flow_run_name=name,
            tags=[*tags, _tag(work)],
            timeout=0,
            idempotency_key=f"{_tag(work)}:{number}",
            job_variables=dict(job_variables),
        )
    except ObjectNotFound as error:
        raise not_deployed(pool) from error


def is_final(flow_run: FlowRun) -> bool:
    """Whether a flow run has ended."""
    return flow_run.state is not None and flow_run.state.is_final()


def give_up(client: SyncPrefectClient, flow_run: FlowRun, why: str) -> None:
    """Mark a flow run as crashed, unless it ended meanwhile.

    Raises:
        Unavailable: Prefect's API stayed away.
    """
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Crashed

    def mark() -> None:
        if not is_final(client.read_flow_run(flow_run.id)):
            client.set_flow_run_state(flow_run.id, Crashed(message=why), force=True)

    with suppress(ObjectNotFound):  # a person removed it
        patiently(mark)


def cancel(client: SyncPrefectClient, flow_run: FlowRun, why: str) -> None:
    """Cancel a flow run that nobody waits for any more; a server that is away cannot."""
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelled

    with suppress(httpx.HTTPError, ObjectNotFound):
        client.set_flow_run_state(flow_run.id, Cancelled(message=why))


def not_deployed(pool: str) -> StageError:
    """The error of a pool that is not on the server."""
    return StageError(
        f"there is no work pool {pool} with a deployment {RUNNER}/{pool}",
        remedy="`enginery deploy` makes both; see infra/.",
    )


def _tag(work: str) -> str:
    return f"work:{work}"


def _number(flow_run: FlowRun) -> int:
    last = (flow_run.idempotency_key or "").rpartition(":")[2]
    return int(last) if last.isdigit() else 0
