"""Params, points and tags on their way to MLflow, in as few calls as it allows."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stages.runtime.fingerprint import digest_bytes

if TYPE_CHECKING:
    from mlflow import MlflowClient

BATCH = {"metrics": 1000, "params": 100, "tags": 100}
"""What MLflow takes in one `log_batch`."""
LONGEST = {"param": 6000, "tag": 8000}
"""Characters of a value that MLflow takes."""
NOT_FINITE = "enginery.not_finite"


@dataclass
class Buffer:
    """What waits to be sent: points are (name, value, milliseconds since the epoch, step)."""

    params: dict[str, str] = field(default_factory=dict)
    points: list[tuple[str, float, int, int]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def before(self, later: Buffer) -> Buffer:
        """This and what came later, which counts where both say something."""
        return Buffer(self.params | later.params, self.points + later.points, self.tags | later.tags)


def send(client: MlflowClient, run_id: str, waiting: Buffer) -> None:
    """Send what waits in as few calls as MLflow allows.

    Its charts break on a NaN or an infinity: they stay here, and a tag names their metrics.
    """
    from mlflow.entities import Metric, Param, RunTag

    finite = [point for point in waiting.points if math.isfinite(point[1])]
    odd = sorted({name for name, value, *_ in waiting.points if not math.isfinite(value)})
    named = {**waiting.tags, NOT_FINITE: ", ".join(odd)} if odd else waiting.tags
    params = [Param(key, text) for key, text in waiting.params.items()]
    tags = [RunTag(key, text[: LONGEST["tag"]]) for key, text in named.items()]
    metrics = [Metric(key, value, at, step) for key, value, at, step in _thinned(finite)]
    while params or tags or metrics:
        client.log_batch(run_id, metrics=metrics, params=params[: BATCH["params"]], tags=tags[: BATCH["tags"]])
        metrics, params, tags = [], params[BATCH["params"] :], tags[BATCH["tags"] :]


def _thinned(points: list[tuple[str, float, int, int]]) -> list[tuple[str, float, int, int]]:
    """At most one batch of points, each curve thinned evenly with its last point kept."""
    curves: dict[str, list[tuple[str, float, int, int]]] = {}
    for point in points:
        curves.setdefault(point[0], []).append(point)
    most = BATCH["metrics"] // max(1, len(curves))
    kept = []
    for curve in curves.values():
        kept += curve if len(curve) <= most else [*curve[:: -(-len(curve) // (most - 1))], curve[-1]]
    return kept


def now(figures: Mapping[str, float]) -> list[tuple[str, float, int, int]]:
    """Figures as points of this moment."""
    return [(valid_key(name), float(value), int(time.time() * 1000), 0) for name, value in figures.items()]


def flattened(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested params as dotted keys and short texts, as MLflow takes them."""
    if isinstance(value, Mapping) and (value or not prefix):
        flat: dict[str, str] = {}
        for key, inner in value.items():
            flat |= flattened(inner, f"{prefix}.{key}" if prefix else str(key))
        return flat
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if len(text) > LONGEST["param"]:
        text = f"{text[:5900]}... sha256 {digest_bytes(text.encode())}"
    return {valid_key(prefix): text}


def valid_key(key: str) -> str:
    """A key that MLflow accepts: letters, digits and `_-. :/`, at most 250."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in key)[:250]
