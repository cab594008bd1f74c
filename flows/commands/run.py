"""Commands that make something: plan, run, recipes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import (
    JsonOption,
    RecipeArgument,
    SetOption,
    StoreOption,
    cells,
    console,
    say_json,
    show,
    table,
)

if TYPE_CHECKING:
    from flows.recipe.expand import Expanded


def run(
    recipe: RecipeArgument,
    sets: SetOption = None,
    store: StoreOption = None,
    from_step: Annotated[
        str | None, typer.Option("--from", metavar="STEP", help="Make this step and all that read it again.")
    ] = None,
    force: Annotated[list[str] | None, typer.Option("--force", metavar="STEP", help="Make this step again.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="DIR", help="Copy report, recipe, result and each final or judged artifact there."
        ),
    ] = None,
    as_json: JsonOption = False,
    jobs: Annotated[int | None, typer.Option("--jobs", metavar="N", help="Steps that compute at once.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", metavar="N", help="Threads a step may use.")] = None,
    launcher: Annotated[
        str | None, typer.Option("--launcher", metavar="HOW", help="process, inline, or pool: Prefect's work pools.")
    ] = None,
) -> int:
    """Run a recipe; what is sealed is not made again."""
    from flows.recipe.expand import expanded
    from flows.recipe.read import load_recipe
    from flows.reporting.tables import show_result
    from flows.reporting.terminal import TerminalProgress
    from flows.running.placement import judging_gpu
    from flows.settings import enter, settle

    settings = replace(
        settle(store=store, jobs=jobs, threads=threads, launcher=launcher),
        output=output.absolute() if output else None,
        from_step=from_step,
        force=frozenset(force or ()),
    )
    gpu = judging_gpu(settings)
    asked = expanded(load_recipe(recipe, sets or (), gpu), gpu)
    _check_steps(asked, [*(force or ()), *([from_step] if from_step else [])])
    enter(settings)
    if settings.output:
        from flows.pipeline.output_folder import check_output

        check_output(settings.output, asked.recipe, settings.connect())
    from flows.pipeline.drive import optimize

    with TerminalProgress() as terminal:
        result = optimize(asked, settings, terminal)
    if as_json:
        say_json(result)
    else:
        show_result(result, console())
    for gate in result.gates if as_json else ():
        if not gate.passed:
            sys.stderr.write(f"gate failed: {gate.said}\n")
    return 0 if result.passed else 2


def plan(
    recipe: RecipeArgument, sets: SetOption = None, store: StoreOption = None, as_json: JsonOption = False
) -> None:
    """Say what a run would make, why, and what it needs."""
    from flows.pipeline.look_ahead import plan as look_ahead
    from flows.recipe.expand import expanded
    from flows.recipe.read import load_recipe
    from flows.reporting.terminal import TerminalProgress
    from flows.results import PlanResult
    from flows.running.placement import judging_gpu
    from flows.settings import enter, settle

    settings = settle(store=store)
    gpu = judging_gpu(settings)
    asked = expanded(load_recipe(recipe, sets or (), gpu), gpu)
    enter(settings)
    with TerminalProgress() as terminal:
        lines = look_ahead(asked, settings, terminal)
    if as_json:
        say_json(PlanResult(recipe=asked.recipe.name, store=settings.connect().uri, steps=lines))
        return
    shown = table(f"Plan of {asked.recipe.name}", "step", "stage", "sealed", "why it is made", "needs")
    for line in lines:
        shown.add_row(*cells(line.name, line.stage, "yes" if line.hit else "no", line.why, line.needs))
    show(shown)
    missing = sum(not line.hit for line in lines)
    typer.echo(f"{missing} of {len(lines)} steps would be made, {len(lines) - missing} are sealed already")


def recipes() -> None:
    """List the recipes that come with enginery."""
    from flows.recipe.read import SHIPPED, shipped

    for name in shipped():
        lines = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        about = next((line.removeprefix("# ") for line in lines if line.startswith("# ")), "")
        typer.echo(f"{name}: {about}")


def _check_steps(asked: Expanded, names: list[str]) -> None:
    from stages.runtime.contract import StageError

    known = [step.name for step in asked.steps]
    for name in names:
        if name not in known:
            raise StageError(f"the recipe has no step {name!r}", limit=", ".join(known))
