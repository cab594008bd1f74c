"""Tidying up as a Prefect flow, for a schedule: only a sweep ends uploads that nobody completes."""

from __future__ import annotations

from prefect import flow, get_run_logger

from flows.reporting.format import size
from flows.settings import enter, settle


@flow(name="sweep")
def sweep_store(older_than_hours: float = 24) -> str:
    """Remove what is of no use and old enough, from the store and from the scratch folder of this machine.

    Args:
        older_than_hours: longer than any publication lasts.
    """
    settings = settle()
    enter(settings)
    swept = settings.connect().sweep(older_than_s=3600 * older_than_hours)
    said = f"{swept.drafts} drafts, views and logs, {swept.blobs} files, {swept.uploads} uploads: {size(swept.bytes)}"
    get_run_logger().info(said)
    return said
