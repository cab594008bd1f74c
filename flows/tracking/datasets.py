"""What a run reads from outside, as MLflow's datasets: texts, and the checkpoints it begins with."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

_DIGEST_CHARACTERS = 36
_KINDS = {"": "local", "file": "local", "s3": "s3", "http": "http", "https": "http"}
"""Scheme of a source -> MLflow's name for such a place. What it has no name for keeps the scheme's."""


@dataclass(frozen=True)
class Dataset:
    """One thing that is read.

    Attributes:
        name: of the step that brings it.
        fingerprint: of its artifact.
        source: where it comes from.
        contexts: what for: `calibrate`, `train`, `validate`, `test`; `checkpoint` for a model.
    """

    name: str
    fingerprint: str
    source: str
    contexts: tuple[str, ...]


def digest(fingerprint: str) -> str:
    """What MLflow tells a dataset's contents by: as much of its artifact's fingerprint as it takes."""
    return fingerprint[:_DIGEST_CHARACTERS]


def inputs(read: Iterable[Dataset]) -> list[DatasetInput]:
    """As MLflow's client takes them."""
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput, InputTag

    found = []
    for one in read:
        scheme = one.source.partition("://")[0] if "://" in one.source else ""
        kind = _KINDS.get(scheme, scheme)
        entity = Entity(
            name=one.name,
            digest=digest(one.fingerprint),
            source_type=kind,
            source=json.dumps({"url" if kind == "http" else "uri": one.source}),
            profile=json.dumps({"fingerprint": one.fingerprint}),
        )
        found.append(DatasetInput(entity, [InputTag("mlflow.data.context", ", ".join(one.contexts))]))
    return found
