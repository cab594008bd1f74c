"""A minute of 16 clients at once: nobody is told anything else than alone, and nothing grows.

How much faster that is `make bench-serving` measures.
"""

# ruff: noqa: F401 - fixtures that other modules define are imported and then named as arguments

import os
from pathlib import Path

import pytest

from stages.compile.stage import CompileParams, compile_engine
from tests.benchmarks.serving import CLIENTS, SECONDS, measure, told
from tests.engines import Hears, mixed, mixed_graph

pytestmark = pytest.mark.service


@pytest.fixture
def engine(request, tmp_path):
    """The folder that $ENGINERY_SERVED names, or an engine of the tiny Llama."""
    if named := os.environ.get("ENGINERY_SERVED"):
        return Path(named)
    params = CompileParams(backend="onnxruntime", maximum_tokens=512)
    compile_engine(params, {"graph": request.getfixturevalue("mixed_graph")}, tmp_path, Hears())
    return tmp_path


def test_many_clients_for_a_minute_are_answered_as_if_alone_and_nothing_grows(engine):
    found = measure(engine, clients=CLIENTS, seconds=SECONDS, alone_s=10.0, rows=8)
    figures = told(found, CLIENTS)
    print(figures)  # noqa: T201 - for who runs it with -s
    loads = (*found.alone, found.many)
    assert not any(one.errors or one.wrong for one in loads) and found.many.answers > CLIENTS, figures
    assert found.growth_bytes < 16e6, figures
    assert set(found.burst.errors) == {429} and found.burst.answers >= 64 and not found.burst.wrong, figures
