"""README's table of families and techniques is what this code does: one family a day, all in 26 days."""

import pytest

from tests.benchmarks.families import COLUMNS, EQUAL, MARK, MOST, PAGE, ROWS, Cell, far, read_table, row, shown, table
from tests.cases.day import today

CELLS = read_table(PAGE.read_text(encoding="utf-8"))
DRAWN = [[*ROWS][today() % len(ROWS)]]


def test_table_has_every_family_and_technique_nine_of_ten_work_and_none_is_far_from_dense():
    assert [*CELLS] == [*ROWS]
    assert all([*one] == [*COLUMNS] for one in CELLS.values())
    cells = [text for one in CELLS.values() for text in one.values()]
    assert sum(text != "no" for text in cells) >= 0.9 * len(cells)
    assert far(CELLS) == []


def test_cell_beyond_three_times_the_llamas_is_named():
    cells = {"Llama": {"INT4": "0.01", "tie": "yes"}, "Other": {"INT4": "0.031", "tie": "no"}}
    assert far(cells) == ["Other INT4: 0.031, 3.1 times"]
    assert far(cells | {"Other": {"INT4": f"{0.01 * MOST}", "tie": "yes"}}) == []


def test_row_that_is_written_anew_leaves_all_others_as_they_were():
    old = PAGE.read_text(encoding="utf-8").split(MARK)[1].strip("\n")
    assert table({}, old) == old
    new = {column: Cell(None, "it is gone") if column == "graph" else Cell(0.5) for column in COLUMNS}
    made = table({"T5": new}, old)
    told, first = (read_table(f"{MARK}\n{one}\n{MARK}") for one in (made, old))
    assert [*told] == [*first] and {**told, "T5": 0} == {**first, "T5": 0}
    assert told["T5"] == {column: "no" if column == "graph" else "0.5" for column in COLUMNS}
    assert "- T5 graph: it is gone." in made.splitlines() and "T5 plan" not in made and "BLOOM heads: the" in made


@pytest.mark.fault
@pytest.mark.parametrize("title", DRAWN)
def test_family_of_the_day_is_as_the_table_says(title, tmp_path):
    found = {column: shown(cell) for column, cell in row(ROWS[title], tmp_path).items()}
    differs = {
        column: (CELLS[title][column], text) for column, text in found.items() if not _alike(text, column, title)
    }
    assert not differs


def _alike(text: str, column: str, title: str) -> bool:
    """Another processor sums in another order, and a choice between near equals falls otherwise."""
    said = CELLS[title][column]
    if "no" in (text, said):
        return text == said
    one, other = (EQUAL if cell == "yes" else float(cell) for cell in (text, said))
    return max(one, other) <= 1.5 * min(one, other) + EQUAL
