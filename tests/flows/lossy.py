"""A runner whose first process is gone without a word, as a container is whose machine died."""

import os
from pathlib import Path

from prefect import flow

from flows.running.container import run_stage as whole


@flow(name="run-stage", validate_parameters=False)
def run_stage(order, store, threads=1, minutes=None, one_at_a_time=""):
    mark = Path(os.environ["ENGINERY_TEST_MARK"])
    if not mark.exists():
        mark.touch()
        os._exit(9)
    return whole.fn(order, store, threads, minutes, one_at_a_time)
