"""How a run ends in MLflow, said before it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class End:
    """MLflow's status, and what the run's page says of it in Markdown."""

    status: Status
    description: str = ""
