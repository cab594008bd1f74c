"""MLflow runs to look at, and calls of MLflow that break for a while."""

from contextlib import contextmanager
from pathlib import Path

import boto3  # noqa: F401 - as in a process that keeps MLflow's files in S3
import pytest
from mlflow.exceptions import MlflowException

from flows.tracking.runs import Start, recipe_run
from stages.runtime.contract import Unavailable


@contextmanager
def begun(tracking, recipe="r", run="1", close=None, **start):
    with recipe_run(lambda: tracking, Start(recipe=recipe, run=run, **start), close) as parent:
        parent.opened.result()
        yield parent


def children(tracking, parent_id):
    query = f"tags.`mlflow.parentRunId` = '{parent_id}'"
    return tracking.client.search_runs([tracking.experiment_id], query)


def read(tracking, run_id, name):
    return Path(tracking.client.download_artifacts(run_id, name)).read_text()


@contextmanager
def broken(call, error=None, times=10_000):
    """A call of MLflow's client that breaks so many times; gives how often it was made."""
    from mlflow import MlflowClient

    whole, made = getattr(MlflowClient, call), []

    def breaking(*args, **kwargs):
        made.append(args)
        if len(made) <= times:
            raise error or MlflowException("down")
        return whole(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, call, breaking)
        yield made


def asked_again(ask, stopped=None):
    """As `patiently` does it, without the pauses."""
    for _ in range(5):
        try:
            return ask()
        except Unavailable:
            continue
    return ask()


def states(tracking):
    """Name -> status of every run there is."""
    found = tracking.client.search_runs([tracking.experiment_id])
    return {run.info.run_name: run.info.status for run in found}


def note(tracking, run_id):
    return tracking.client.get_run(run_id).data.tags.get("mlflow.note.content", "")


def read_all(tracking, run_id):
    return {one.path for one in tracking.client.list_artifacts(run_id)}


def children_of_all(tracking):
    return tracking.client.search_runs([tracking.experiment_id])
