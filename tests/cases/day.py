"""Which cases a day has: with $ENGINERY_CASES=third every third one, so that three days in a row have all of them.

The same for families as engines, with $ENGINERY_ENGINES=fifth in five days, and for the files of the fault slice, with
$ENGINERY_FAULTS=third in three.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TypeVar

T = TypeVar("T")
ASKED, DAY, ENGINES, FAULTS = "ENGINERY_CASES", "ENGINERY_CASES_DAY", "ENGINERY_ENGINES", "ENGINERY_FAULTS"


def today() -> int:
    """The day's number; kept in the environment, so that processes begun before midnight agree after it."""
    return int(os.environ.setdefault(DAY, str(datetime.now(UTC).toordinal())))


def drawn(names: Sequence[str]) -> list[str]:
    """All cases, or the third of the day."""
    return [*names] if os.environ.get(ASKED) != "third" else [*names[today() % 3 :: 3]]


def fifth(names: Sequence[T]) -> list[T]:
    """All families, or the fifth of the day."""
    return [*names] if os.environ.get(ENGINES) != "fifth" else [*names[today() % 5 :: 5]]


def third(names: Sequence[T]) -> list[T]:
    """All files of faults, or the third of the day."""
    return [*names] if os.environ.get(FAULTS) != "third" else [*names[today() % 3 :: 3]]
