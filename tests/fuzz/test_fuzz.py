"""Twenty drawn checkpoints of the day, each of another family; `make cases` runs them, `make fuzz` any."""

from random import Random

import pytest

from tests.cases.day import today
from tests.fuzz.draw import families
from tests.fuzz.judge import tried

pytestmark = [pytest.mark.case, pytest.mark.timeout(120)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(Random(today()).sample(sorted(families()), 20)))
def test_drawn_checkpoint_answers_as_transformers_or_is_refused_at_admission(family, tmp_path):
    tried(family, today(), tmp_path)
