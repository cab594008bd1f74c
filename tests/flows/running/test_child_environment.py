"""What a stage's child finds in its environment: its store's credentials, its threads, how they wait."""

import json

import pytest

from flows.running.child_environment import child_environment

POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def test_environment_holds_no_foreign_credential(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    inside = child_environment("quantize", 1)
    assert "secret" not in json.dumps(inside)
    assert child_environment("fetch", 1)["HF_TOKEN"] == "secret"
    assert inside["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("asked", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "9"}])
def test_environment_has_the_users_waiting_policy_and_ours_where_there_is_none(monkeypatch, asked):
    ours = {"GOMP_SPINCOUNT": "400", "KMP_BLOCKTIME": "0"}
    for name in POLICIES:
        monkeypatch.delenv(name, raising=False)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    inside = child_environment("quantize", 2)
    assert {name: inside[name] for name in inside if name in POLICIES} == (asked or ours)
