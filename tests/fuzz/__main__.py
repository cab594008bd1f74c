"""`make fuzz`: drawn checkpoints of every family, or of one; the last line is how many passed, were refused, failed."""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

from transformers.utils import logging

from tests.fuzz.draw import families
from tests.fuzz.judge import tried


def main() -> int:
    """Try seeds from the first on; a failure says with which command it comes again."""
    asked = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    asked.add_argument("--family", default="", help="model types, divided by commas; by default all")
    asked.add_argument("--seed", type=int, default=0, help="the first")
    asked.add_argument("--count", type=int, default=500, help="of each family")
    given = asked.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    total: Counter[str] = Counter()
    for family in given.family.split(",") if given.family else families():
        counts, reasons = Counter[str](), Counter[str]()
        for seed in range(given.seed, given.seed + given.count):
            ended, why = _ended(family, seed)
            counts[ended] += 1
            reasons[why] += 1
        total += counts
        sys.stdout.write(f"{family}: {_told(counts)}\n")
        for why, times in reasons.most_common():
            sys.stdout.write(f"  {times} refused: {why}\n" if why else "")
        sys.stdout.flush()
    sys.stdout.write(f"{_told(total)}\n")
    return 1 if total["failed"] else 0


def _ended(family: str, seed: int) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            why = tried(family, seed, Path(folder))
        # Any error: each is a failure of the product, and the next seed is tried all the same.
        except Exception:  # noqa: BLE001
            sys.stdout.write(f"{traceback.format_exc()}again: make fuzz FAMILY={family} SEED={seed} COUNT=1\n")
            return "failed", ""
    return ("refused", why.replace(folder, "FOLDER")) if why else ("passed", "")


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in ("passed", "refused", "failed"))


if __name__ == "__main__":
    raise SystemExit(main())
