"""Tidying up as a Prefect flow, for a schedule: only a sweep ends uploads that nobody completes."""

from __future__ import annotations

from prefect import flow, get_run_logger

from flows.pipeline.tidying import said, tidy
from flows.settings import enter, settle


@flow(name="sweep")
def sweep_store(older_than_hours: float = 24, runs_older_than_days: float = 90) -> str:
    """Remove what is of no use and old enough, from the store and from the scratch folder of this machine.

    Args:
        older_than_hours: longer than any publication lasts.
        runs_older_than_days: records of runs; those of promoted versions and the last 50 stay.
    """
    settings = settle()
    enter(settings)
    older_s, runs_s = 3600 * older_than_hours, 86400 * runs_older_than_days
    swept = tidy(settings.connect(), older_than_s=older_s, runs_older_than_s=runs_s)
    text = "removed " + ("; ".join(said(swept)) or "nothing")
    get_run_logger().info(text)
    return text
