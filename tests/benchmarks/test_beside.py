"""The row of a busy neighbour: its ratios, its ways of waiting, the whole of it on a small model."""

import os

import pytest

from flows.reporting.terminal import TerminalProgress
from flows.running.child_environment import child_environment
from tests.benchmarks import beside, results
from tests.benchmarks.results import Row

FIGURES = {
    "seconds",
    "spinning_seconds",
    "beside_seconds",
    "beside_spinning_seconds",
    "beside_ratio",
    "beside_spinning_ratio",
}


def test_row_has_the_time_beside_by_the_time_alone_for_each_way_of_waiting():
    took = {(False, False): 2.0, (False, True): 3.0, (True, False): 4.0, (True, True): 16.0}
    row = beside._row(took, 0.25, 3)
    assert (row.figures["beside_ratio"], row.figures["beside_spinning_ratio"]) == (1.5, 4.0)
    assert "3.00 s, 1.50 times" in row.about and "other work had 25%" in row.about
    assert results.summary(row, Row("dense")) == row.figures


def test_ways_of_waiting_are_the_products_and_openmps_own_whatever_the_user_has(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with beside._variables(beside.SPINNING):
        spinning = child_environment("quantize", 2)
    with beside._variables({}):
        ours = child_environment("quantize", 2)
    assert spinning.items() - ours.items() == {*beside.SPINNING.items()}
    assert ours.items() - spinning.items() == {("GOMP_SPINCOUNT", "400"), ("KMP_BLOCKTIME", "0")}
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE" and "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.fault
def test_row_of_a_small_model_is_measured_and_leaves_the_cores_as_they_were(store):
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("needs two cores")
    with TerminalProgress() as terminal:
        row = beside.measured(store, terminal, text="pydoc://topics", width=192, blocks=2, repeats=1)
    assert not row.error and set(row.figures) == FIGURES and min(row.figures.values()) > 0
    assert os.sched_getaffinity(0) == cores
