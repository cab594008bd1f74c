"""The model card: items beside dense, and as much of it as MLflow has room for."""

from __future__ import annotations

import re

import pytest

from flows.registry.card_abilities import sections
from flows.registry.model_card import CARD, DESCRIBED, described
from flows.reporting.abilities import item_sets
from tests.flows.reporting.test_abilities import CHAIN, REPORTS


@pytest.fixture(scope="module")
def parts():
    (found,) = item_sets(REPORTS, "dense", ["cpu"], CHAIN)
    return list(sections(found))


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {first: rest for first, *rest in rows}


def test_abilities_stand_beside_dense_with_their_interval(parts):
    rows = cells(parts[1])
    assert rows["ability"] == ["items", "dense", "cpu"]
    assert rows["all"][:2] == ["14", "7"]
    right, point, low, high = map(float, re.findall(r"\d+(?:\.\d+)?", rows["all"][2]))
    assert right == 4 and point == pytest.approx(4 / 7, abs=0.01) and low < point < high
    assert rows["capitals"][:2] == ["6", "5"] and rows["noise"] == ["4", "0", "0"], "of nothing there is no share"


def test_steps_stand_beside_abilities_with_what_they_lost(parts):
    rows = cells(parts[3])
    assert rows["ability"] == ["pruned", "int8", "cpu"]
    assert rows["capitals"] == ["-4 of 6", "-4 of 6", "-3 of 6"]
    assert rows["sums"][0] == "+0 of 4"


def test_description_of_a_version_is_whole_sections_that_fit_and_says_where_the_rest_is():
    parts = ["# model", *(f"## {name}\n\n{name * size}" for name, size in (("a", 1000), ("b", 5000), ("c", 2000)))]
    whole = "\n\n".join(parts) + "\n"
    short = described(whole)
    assert len(short) <= DESCRIBED and CARD in short
    assert "a" * 1000 in short and "c" * 2000 in short and "b" * 9 not in short and "## b" not in short
    assert described(parts[0]) == parts[0] and described("") == ""
    assert len(described("x" * 9000)) <= DESCRIBED


def test_database_that_is_strict_takes_what_is_described():
    from mlflow.store.model_registry.dbmodels.models import SqlModelVersion

    assert SqlModelVersion.__table__.c.description.type.length == DESCRIBED
