"""Three days in a row have every case, and no case twice."""

from itertools import chain

from tests.cases.day import ASKED, DAY, FAULTS, drawn, third
from tests.cases.table import CASES


def test_cases_of_three_days_in_a_row_are_all_and_those_of_a_day_stay(monkeypatch):
    names = list(CASES)
    assert len(names) == 31 and names == sorted(names)
    monkeypatch.setenv(ASKED, "third")
    days = []
    for day in ("739582", "739583", "739584"):
        monkeypatch.setenv(DAY, day)
        days.append(drawn(names))
        assert days[-1] == drawn(names)
    assert sorted(chain(*days)) == names and max(map(len, days)) <= 11
    for asked in ("", "all"):
        monkeypatch.setenv(ASKED, asked)
        assert drawn(names) == names


def test_files_of_faults_of_three_days_in_a_row_are_all(monkeypatch):
    files = [f"test_{number}.py" for number in range(32)]
    assert third(files) == files
    monkeypatch.setenv(FAULTS, "third")
    days = []
    for day in ("739582", "739583", "739584"):
        monkeypatch.setenv(DAY, day)
        days.append(third(files))
    assert sorted(chain(*days)) == sorted(files) and max(map(len, days)) == 11
