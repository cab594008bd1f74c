"""Sums what pytest wrote of each slice of `.ci/run`; the last line says how many tests passed and failed in all.

python3 count.py FOLDER NAME:STATUS:SECONDS[:idle] ...

STATUS is what the slice's command ended with, FOLDER/NAME.xml what pytest wrote. A slice fails if its command failed,
if pytest wrote nothing, or if it executed no test; one that may be `idle` may skip all that it has. A slice that fails
without a failed test counts as one. Ends with 1 if any slice failed.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path


def counted(path: Path) -> Counter[str]:
    """How many tests passed, failed and were skipped; a test that passed and failed to clean up has failed."""
    kinds: dict[tuple[str, str], set[str]] = {}  # pytest writes a test that failed twice as two
    for case in ET.parse(path).getroot().iter("testcase"):  # noqa: S314 - pytest wrote it, just now
        kinds.setdefault((case.get("classname", ""), case.get("name", "")), set()).update(one.tag for one in case)
    return Counter(
        "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        for tags in kinds.values()
    )


def judged(path: Path, status: int, idle: bool) -> tuple[Counter[str], str]:
    """A slice's counts, and why it failed where no test of its own says so."""
    try:
        found = counted(path)
    except (OSError, ET.ParseError):
        return Counter(failed=1), f"ended with {status} and left no count of its tests"
    if found["failed"]:
        return found, ""
    if not found["passed"] and not (idle and found["skipped"]):
        return found + Counter(failed=1), "executed no test"
    if status:
        return found + Counter(failed=1), f"ended with {status}, though no test failed"
    return found, ""


def line(found: Counter[str]) -> str:
    """Passed, failed, and skipped if any were."""
    skipped = f", {found['skipped']} skipped" if found["skipped"] else ""
    return f"{found['passed']} passed, {found['failed']} failed{skipped}"


def main(folder: str, *slices: str) -> int:
    """Print a line for each slice, then the sum."""
    total: Counter[str] = Counter()
    for one in slices:
        name, status, seconds, *idle = one.split(":")
        found, why = judged(Path(folder, f"{name}.xml"), int(status), bool(idle))
        total += found
        minutes, rest = divmod(int(seconds), 60)
        print(f"{name}: {line(found)}, in {minutes} min {rest} s{f': {why}' if why else ''}")  # noqa: T201
    print(line(total))  # noqa: T201
    return 1 if total["failed"] or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
