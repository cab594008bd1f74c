"""How little of a model's blocks may stay, and the error where so much cannot go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.runtime.contract import StageError

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Asked:
    """How little may stay: parameters in blocks, what widths are multiples of, what blocks are chosen by, state.

    `uneven`: each block loses as much as costs least. `sources`: of each calibration window, where there are several.
    """

    limit: int
    multiple: int
    by: str
    partial: Path
    uneven: bool = False
    sources: Sequence[str] = ()


def cannot(what: str, best: int, total: int, asked: Asked) -> StageError:
    """The error of a target that cannot be met."""
    return StageError(
        f"pruning {what} cannot remove so much",
        measured=f"keep {best / total:.4f} at best",
        limit=f"keep {asked.limit / total:.4f}",
        remedy=f"Set `keep` to {math.ceil(best / total * 1e4) / 1e4} or more, or prune by another method as well."
        if best < total
        else f"Set `multiple` to a divisor of the width: nothing below it is a multiple of {asked.multiple}.",
    )
