"""What MLflow's registry keeps of a version: how one is made, and where aliases stand there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from flows.registry.journal import Candidate
from flows.registry.model_card import about_model, described
from flows.registry.package import TASK
from flows.tracking.errors import MISSING, STANDS, Refused

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

IDENTITY, CANDIDATE, CARRIER = "enginery.identity", "enginery.candidate", "enginery.logged_model"


def create_version(client: MlflowClient, candidate: Candidate, carrier: LoggedModel, card: str) -> str:
    """Register a candidate by the logged model that carries its engine; returns the version's number."""
    served = candidate.executables[candidate.serves]
    _create_model(client, candidate.model, carrier.tags.get(TASK, "generate"))
    made = client.create_model_version(
        candidate.model,
        carrier.artifact_location,  # not models:/ID, which MLflow looks up wherever its global URI points
        run_id=candidate.run,
        model_id=carrier.model_id,
        description=described(card) or "; ".join(f"{one}: {status}" for one, status in candidate.targets.items()),
        tags={
            IDENTITY: candidate.identity,
            CANDIDATE: candidate.model_dump_json(),
            CARRIER: carrier.model_id,
            "enginery.fingerprint": served.fingerprint,
            "enginery.target": served.target,
            "enginery.targets": json.dumps(candidate.targets),
            "enginery.verdict": str(candidate.verdict.get("verdict", "passed")),
        },
    )
    return str(made.version)


def aliases(client: MlflowClient, model: str) -> dict[str, str] | None:
    """Alias -> version number, None when no model is registered so."""
    try:
        return {alias: str(number) for alias, number in client.get_registered_model(model).aliases.items()}
    except Refused as error:
        if error.code != MISSING:
            raise
        return None


def _create_model(client: MlflowClient, model: str, task: str) -> None:
    """The registered model, with a description where it has none; a person's is left alone."""
    about = about_model(model, task)
    try:
        client.create_registered_model(model, description=about)
    except Refused as error:
        if error.code != STANDS:
            raise
        if not client.get_registered_model(model).description:
            client.update_registered_model(model, about)
