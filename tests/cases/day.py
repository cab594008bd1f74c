"""Which cases a day has: with $ENGINERY_CASES=third every third one, so that three days in a row have all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime

ASKED, DAY = "ENGINERY_CASES", "ENGINERY_CASES_DAY"


def today() -> int:
    """The day's number; kept in the environment, so that processes begun before midnight agree after it."""
    return int(os.environ.setdefault(DAY, str(datetime.now(UTC).toordinal())))


def drawn(names: Sequence[str]) -> list[str]:
    """All cases, or the third of the day."""
    return [*names] if os.environ.get(ASKED) != "third" else [*names[today() % 3 :: 3]]
