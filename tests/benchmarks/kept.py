"""What a technique keeps of the dense model's abilities, by the text that it was calibrated on: pure, from reports.

Every interval is that of the gates: 95%, by bootstrap over items or windows, paired.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from flows.judging.pairing import check_paired
from flows.reporting.format import size
from stages.measures.interval import Interval, resampled
from stages.measures.paired import Document, of_documents
from stages.measures.table import MEASURES

NARROW, SELF, MIXED = CALIBRATIONS = ("narrow", "self", "mixed")
"""One source; what the model writes itself; half and half."""
ABILITIES, OTHER = "abilities", "other"
Reports = Mapping[str, Mapping[str, Any]]
"""ABILITIES, OTHER -> content of a `report.json`."""


@dataclass(frozen=True)
class Cell:
    """One technique, calibrated on one text.

    Attributes:
        right: items that are answered right.
        kept: the share of them in dense's.
        kl_short: mean KL divergence from dense at the positions of the items' prompts, in nats.
        elsewhere: perplexity over dense's, on text that calibrates nothing.
        size_bytes: of the model's files.
        error: why there are no figures.
    """

    right: int = 0
    kept: Interval | None = None
    kl_short: float = math.nan
    elsewhere: Interval | None = None
    size_bytes: float = math.nan
    error: str = ""


@dataclass(frozen=True)
class Row:
    """One technique.

    Attributes:
        name: the technique, or the peer.
        about: what a reader must know.
        ours: of a peer: the technique of ours at the same format.
        cells: calibration -> what it came to.
        gains: calibration -> what it keeps more than NARROW, in shares of dense's right answers.
        beside: peer at the same format -> what ours keeps more, both calibrated on the last text that both have.
    """

    name: str
    about: str = ""
    ours: str = ""
    cells: Mapping[str, Cell] = field(default_factory=dict)
    gains: Mapping[str, Interval] = field(default_factory=dict)
    beside: Mapping[str, Interval] = field(default_factory=dict)

    @property
    def marks(self) -> tuple[str, ...]:
        """What must not be overlooked: the mix is worse than the narrow text, or a peer keeps more than ours."""
        found = [f"{MIXED} WORSE than {NARROW}"] if MIXED in self.gains and self.gains[MIXED].high < 0 else []
        for peer, more in self.beside.items():
            if more.point < 0:
                found.append(f"{'LESS' if more.high < 0 else 'less, within the interval,'} than {peer}")
        return tuple(found)

    @property
    def wrong(self) -> bool:
        """Whether a mark is beyond its interval."""
        return any("WORSE" in mark or "LESS" in mark for mark in self.marks)


def cell(ours: Reports, dense: Reports) -> Cell:
    """The figures of one artifact beside the dense model's.

    Raises:
        StageError: the reports are of other items or windows.
    """
    for name in (ABILITIES, OTHER):
        check_paired(ours[name], dense[name], f"an artifact and dense on {name}")
    pairs = {name: [_sorted(one[name]) for one in (ours, dense)] for name in (ABILITIES, OTHER)}
    measures = ours[ABILITIES]["measures"]
    return Cell(
        right=sum(one["right"] for one in pairs[ABILITIES][0]),
        kept=of_documents(MEASURES["accuracy"], *pairs[ABILITIES]),
        kl_short=measures.get("kl_divergence", 0.0),
        elsewhere=of_documents(MEASURES["perplexity"], *pairs[OTHER]),
        size_bytes=measures["size_bytes"],
    )


def more(ours: Reports, theirs: Reports, dense: Reports) -> Interval:
    """What one artifact keeps more than another, in shares of dense's right answers, over the same items."""
    for one in (theirs, dense):
        check_paired(ours[ABILITIES], one[ABILITIES], f"two artifacts on {ABILITIES}")
    columns = [[one["right"] for one in _sorted(reports[ABILITIES])] for reports in (ours, theirs, dense)]
    kinds = Counter(zip(*columns, strict=True))
    ours_D, theirs_D, dense_D = np.array([*kinds], dtype=np.float64).T

    def share(weights_RD: Any) -> Any:
        below_R = weights_RD @ dense_D
        return np.where(below_R > 0, weights_RD @ (ours_D - theirs_D) / np.where(below_R > 0, below_R, 1), np.nan)

    return resampled(np.array([*kinds.values()], dtype=np.float64), share)


def row(name: str, found: Mapping[str, Reports | str], dense: Reports, *, about: str = "", ours: str = "") -> Row:
    """A technique's row.

    Args:
        name: of the technique or the peer.
        found: calibration -> its reports, or why there are none.
        dense: the dense model's.
        about: see Row.
        ours: see Row.
    """
    cells = {
        calibration: Cell(error=one) if isinstance(one, str) else cell(one, dense) for calibration, one in found.items()
    }
    made = {calibration: one for calibration, one in found.items() if not isinstance(one, str)}
    narrow = made.pop(NARROW, None)
    gains = {} if narrow is None else {name: more(one, narrow, dense) for name, one in made.items()}
    return Row(name, about, ours, cells, gains)


def beside(
    found: Mapping[str, Mapping[str, Reports | str]], rows: Sequence[Row], dense: Reports
) -> dict[str, dict[str, Interval]]:
    """Technique -> peer at the same format -> what ours keeps more, by the last calibration that both have."""
    made: dict[str, dict[str, Interval]] = {}
    for peer in rows:
        ours, theirs = found.get(peer.ours, {}), found[peer.name]
        both = [name for name in CALIBRATIONS if all(isinstance(one.get(name), Mapping) for one in (ours, theirs))]
        if both:
            pair: list[Any] = [one[both[-1]] for one in (ours, theirs)]
            made.setdefault(peer.ours, {})[peer.name] = more(*pair, dense)
    return made


def table(rows: Sequence[Row], calibrations: Sequence[str], title: str) -> Table:
    """All rows, for a terminal: red where a mark is beyond its interval."""
    made = Table(title=title, title_justify="left")
    made.add_column("technique", no_wrap=True)
    for name in ("size", *(f"{one}, kept %" for one in calibrations), *_gained(calibrations)):
        made.add_column(name, justify="right", no_wrap=True)
    for name in ("KL short", "x elsewhere"):
        made.add_column(f"{name}\n{' '.join(calibrations)}", justify="right", no_wrap=True)
    made.add_column("notes")
    for one in rows:
        failed = any(each.error for each in one.cells.values())
        made.add_row(*map(Text, cells(one, calibrations)), style="red" if failed or one.wrong else "")
    return made


def _gained(calibrations: Sequence[str]) -> list[str]:
    return [f"{MIXED} - {NARROW}"] if {MIXED, NARROW} <= {*calibrations} else []


def cells(one: Row, calibrations: Sequence[str]) -> list[str]:
    """The row as the table's cells, a dash where there is no figure."""
    found = [one.cells.get(name, Cell()) for name in calibrations]
    sizes = [each.size_bytes for each in found if math.isfinite(each.size_bytes)]
    gains = [_percent(one.gains.get(MIXED), sign="+") for _ in _gained(calibrations)]
    short = " ".join(_number(each.kl_short) for each in found)
    elsewhere = " ".join(_number(each.elsewhere.point if each.elsewhere else math.nan) for each in found)
    errors = dict.fromkeys(each.error for each in found if each.error)
    notes = "; ".join([*one.marks, *filter(None, (*errors, one.about))])
    kept = [_percent(each.kept) for each in found]
    return [one.name, size(sizes[-1]) if sizes else "-", *kept, *gains, short, elsewhere, notes]


def _percent(one: Interval | None, sign: str = "") -> str:
    if one is None or not math.isfinite(one.point):
        return "-"
    return f"{100 * one.point:{sign}.1f} ({100 * one.low:{sign}.0f} to {100 * one.high:{sign}.0f})"


def _number(value: float) -> str:
    return format(value, ".3f") if math.isfinite(value) else "-"


def as_json(one: Row) -> dict[str, Any]:
    """A row as JSON has it; what is not finite is null."""
    made: dict[str, Any] = _finite(asdict(one) | {"marks": one.marks})
    return made


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figures(one: Row) -> dict[str, float]:
    """A row's numbers by name, for MLflow."""
    found: dict[str, float] = {}
    for name, each in one.cells.items():
        if each.kept and each.elsewhere:
            found |= {f"{name}/kept": each.kept.point, f"{name}/kept_low": each.kept.low}
            found |= {f"{name}/kl_short": each.kl_short, f"{name}/ratio_elsewhere": each.elsewhere.point}
            found[f"{name}/size_mb"] = each.size_bytes / 1e6
    for name, gain in one.gains.items():
        found |= {f"{name}/more_than_narrow": gain.point, f"{name}/more_than_narrow_low": gain.low}
    return found


def _sorted(report: Mapping[str, Any]) -> list[Document]:
    return sorted(report["documents"], key=lambda document: document["id"])
