"""What a run would do, without a flow around it, which would load Prefect for nothing."""

from __future__ import annotations

from flows.pipeline.champion import facing
from flows.recipe.expand import Expanded
from flows.results import PlanLine
from flows.running.admission import refuse_inadmissible
from flows.running.placement import load_pools
from flows.running.plan import needs
from flows.running.session import Terminal, planned_steps
from flows.settings import Settings, enter


def plan(asked: Expanded, settings: Settings, terminal: Terminal) -> list[PlanLine]:
    """What a run would do, step by step: hit or miss, the first field that differs, what it needs."""
    enter(settings)
    store = settings.connect()
    planned = planned_steps(facing(asked, store), settings, store, terminal.for_step)
    refuse_inadmissible(planned, asked.recipe, store, terminal.line)
    needed = needs(planned.values(), store, load_pools() if settings.launcher == "pool" else None)
    return [
        PlanLine(
            name=name,
            stage=one.order.stage,
            hit=one.hit,
            why="asked for by --force or --from" if one.order.force else one.why,
            fingerprint=one.identity,
            needs=needed[name],
        )
        for name, one in planned.items()
    ]
