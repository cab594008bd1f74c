"""A flow run whose deployment allows only so many at once holds a slot, which it must renew.

Prefect ends a run that could not renew its slot, also where nothing but the server was away for a while. A run of hours
is worth more than the limit: it goes on, and until it ends there may be one more than the limit says.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from prefect.concurrency import _leases

_NAME = "_handle_lease_renewal_failure"
"""Prefect has no setting for it; its flow engine asks for the end of the run, always."""


def outlast_lost_slots() -> None:
    """From now on a flow run of this process whose slot is lost says so and goes on."""
    theirs = getattr(_leases, _NAME)
    if not hasattr(theirs, "__wrapped__"):
        setattr(_leases, _NAME, _only_told(theirs))


def _only_told(theirs: Any) -> Any:
    @wraps(theirs)
    def told(
        exc: BaseException, lease_id: Any, _raise_on_lease_renewal_failure: bool, _suppress: bool, cancel_scope: Any
    ) -> None:
        theirs(exc, lease_id, False, False, cancel_scope)

    return told
