"""An MLflow of its own for each test."""

import pytest

from flows.tracking.connect import Tracking
from tests.flows.recorded import tracking_in


@pytest.fixture
def tracking(tmp_path, monkeypatch) -> Tracking:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tracking_in(tmp_path / "mlflow")
