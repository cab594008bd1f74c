"""How a run ends in MLflow, said before it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class End:
    """MLflow's status, what the run's page says of it in Markdown, and when it was, where that is not now."""

    status: Status
    description: str = ""
    at_ms: int | None = None
