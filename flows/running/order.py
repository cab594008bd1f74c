"""An order: one step to run, whoever runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from stages.runtime.contract import Params, Progress, Work
from stages.runtime.execute import Outcome


@dataclass(frozen=True, kw_only=True)
class Order:
    """One step to run: the definition's name, pinned params, identity."""

    step: str
    stage: str
    params: Params
    work: Work
    force: bool = False

    def as_json(self) -> dict[str, Any]:
        """The order as JSON values, with where bytes lie, which the identity leaves out."""
        return {
            "work": self.work.model_dump(mode="json"),
            "params": self.params.model_dump(mode="json"),
            "step": self.step,
            "stage": self.stage,
            "force": self.force,
        }


class Pool(Protocol):
    """Who brings an order to machines that are not this one."""

    def launch(self, order: Order, progress: Progress) -> Outcome:
        """Bring one step to its sealed artifact."""

    def stop(self) -> None:
        """Cancel what runs; sealed artifacts and partial state stay."""
