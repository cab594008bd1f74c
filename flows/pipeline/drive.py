"""Who drives a run: threads of this process, or Prefect where a server is named, for then somebody looks there."""

from __future__ import annotations

from flows.pipeline.champion import facing
from flows.pipeline.output_folder import check_room, copied
from flows.pipeline.steps import end, run_steps
from flows.prefect_api.events import has_server
from flows.recipe.expand import Expanded
from flows.results import RunResult
from flows.running.session import Session, Terminal, opened
from flows.settings import Settings


def optimize(asked: Expanded, settings: Settings, terminal: Terminal) -> RunResult:
    """Run a recipe and return what it came to.

    Without a Prefect server nothing of Prefect is loaded: a temporary one would cost ten seconds a run, and nobody
    could look at it. `enginery ui` shows the run in Prefect's pages from its record.

    Raises:
        StageError: a step failed; everything sealed before stays.
        KeyboardInterrupt: stopped by a person; running steps were ended.
    """
    with opened(asked, settings, terminal, facing) as session:
        if settings.output:
            made = {name: session.planned[name].manifest for name in copied(asked.recipe)}
            check_room(settings.output, {name: one.size_bytes for name, one in made.items() if one})
        if has_server():
            return _by_prefect(session)
        run_steps(session)
        return end(session)


def _by_prefect(session: Session) -> RunResult:
    # Prefect takes two seconds to load.
    from flows.pipeline.optimize import as_flow

    return as_flow(session)
