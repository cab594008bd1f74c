"""Whether two reports are of the same documents, so that they can be compared one by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from stages.runtime.contract import StageError

Report = Mapping[str, Any]

MOST_LEFT_OUT = 0.1
"""Of a set, so much may be longer than one of two reads: beyond it what is left says too little of what it is for."""


def read_by_both(ours: Report, theirs: Report, which: str) -> tuple[Report, Report, str]:
    """Two reports without the items that are longer than one of both reads, and what is to be said of it.

    An engine may read less at once than the model that it was made of; which items those are stands in its report.

    Raises:
        StageError: it is too much of the set.
    """
    gone = {name for report in (ours, theirs) for name in report.get("left_out", ())}
    if not gone:
        return ours, theirs, ""
    items = max(len(report["documents"]) + len(report.get("left_out", ())) for report in (ours, theirs))
    what = f"{len(gone)} of {items} items are longer than one of both reads"
    if len(gone) > MOST_LEFT_OUT * items:
        raise StageError(
            f"{which} cannot be compared",
            measured=what,
            limit=f"{MOST_LEFT_OUT:.0%} of them",
            remedy="Compile with a larger `maximum_tokens`, or give shorter items.",
        )
    return _without(ours, gone), _without(theirs, gone), f"left out, since {what}: {min(gone)} is the first"


def _without(report: Report, gone: Collection[str]) -> Report:
    # A document's name is its item's id and a digest of what was asked.
    return {**report, "documents": [one for one in report["documents"] if one["id"].rpartition("-")[0] not in gone]}


def check_paired(ours: Report, theirs: Report, which: str) -> None:
    """Raise StageError unless two reports are of the same documents."""
    a, b = ({d["id"]: d["tokens"] for d in report["documents"]} for report in (ours, theirs))
    remedy = "Measure both on the same corpus, split and windows, with the same tokenizer."
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            raise StageError(
                f"the documents of {which} cannot be paired: {name} differs",
                measured=f"{a.get(name, 'no')} tokens",
                limit=f"{b.get(name, 'no')} tokens",
                remedy=remedy,
            )
    if ours.get("corpus") and theirs.get("corpus") and ours["corpus"] != theirs["corpus"]:
        raise StageError(f"the reports of {which} are of different corpora", remedy=remedy)
    if any(len(names) != len(report["documents"]) for names, report in ((a, ours), (b, theirs))):
        raise StageError(f"a document stands twice in the reports of {which}", remedy=remedy)
