"""A step's notes and bar on its page of Prefect."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows.prefect_api.retry import api

if TYPE_CHECKING:
    from uuid import UUID

_BAR_S = 5.0
_ANSWER_S = 2.0
"""How long a stage waits for its bar to be drawn."""
_AWAY_S = 30.0
"""How long a server is left alone that did not answer."""


class RunLog:
    """A step's notes as lines of its Prefect run."""

    def __init__(self, logger: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
        self._logger = logger
        self._tenth = 0

    def advanced(self, done: float, total: float) -> None:
        """See Progress. A line each tenth."""
        tenth = int(10 * done / total) if total else 0
        if tenth > self._tenth:
            self._tenth = tenth
            self._logger.info("%d%%", 10 * tenth)

    def metric(self, name: str, value: float, step: int) -> None:
        """See Progress. Curves are MLflow's."""

    def note(self, text: str) -> None:
        """See Progress."""
        self._logger.info(text)


class Bar:
    """A step's bar on its run's page. It is for the eye: a server that is away for a moment stops no stage."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._artifact: UUID | None = None
        self._shown = self._again = 0.0

    def advanced(self, done: float, total: float) -> None:
        """See Progress."""
        now = time.monotonic()
        if total <= 0 or now < self._again or (now - self._shown < _BAR_S and done < total):
            return
        share = 100 * min(1.0, done / total)
        self._shown = now
        try:
            with api(_ANSWER_S):
                if self._artifact is None:
                    self._artifact = create_progress_artifact(share, description=self._description)  # type: ignore[assignment]
                else:
                    update_progress_artifact(self._artifact, share)
        except httpx.HTTPStatusError:
            self._artifact = None  # a person removed it
        except httpx.HTTPError:
            self._again = time.monotonic() + _AWAY_S

    def metric(self, name: str, value: float, step: int) -> None:
        """See Progress."""

    def note(self, text: str) -> None:
        """See Progress."""
