"""Measures of a logged model, each on its dataset, so that MLflow finds and compares models by them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flows.tracking.batches import BATCH, valid_key
from flows.tracking.datasets import digest

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class ModelMetric:
    """One measure.

    Attributes:
        key: its name.
        value: what was measured.
        dataset: name and fingerprint of what it was measured on; None for what needs none, such as a size.
    """

    key: str
    value: float
    dataset: tuple[str, str] | None = None


def log_model_metrics(client: MlflowClient, run_id: str, model_id: str, measured: Iterable[ModelMetric]) -> None:
    """Log measures to a logged model, and to the run that measured it; what is not finite is left out."""
    from mlflow.entities import Metric

    at = int(time.time() * 1000)
    points = []
    for one in measured:
        name, fingerprint = one.dataset or (None, None)
        on = {"dataset_name": name, "dataset_digest": digest(fingerprint) if fingerprint else None}
        if math.isfinite(one.value):
            points.append(Metric(valid_key(one.key), one.value, at, 0, model_id=model_id, run_id=run_id, **on))
    for start in range(0, len(points), BATCH["metrics"]):
        client.log_batch(run_id, metrics=points[start : start + BATCH["metrics"]])
