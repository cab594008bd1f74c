"""One test a case; `make cases` runs them, `.ci/run` the third of the day."""

import pytest

from tests.cases.day import drawn
from tests.cases.place import Place
from tests.cases.table import CASES

pytestmark = [pytest.mark.case, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", drawn(list(CASES)))
def test_case_made_anew_comes_out_right(name, tmp_path):
    CASES[name](Place(tmp_path))
