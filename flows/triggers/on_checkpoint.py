"""The flow that an automation starts for a checkpoint that arrived: it claims the arrival and runs the recipe on it."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.pipeline.optimize import RUNNER, as_recipe, drive, recipe_of_run
from flows.recipe.model import Recipe
from flows.settings import settle
from flows.triggers.arrival_records import begin


@flow(name="optimize", flow_run_name=recipe_of_run, task_runner=RUNNER)
def optimize_checkpoint(recipe: Recipe | str, checkpoint: str) -> dict[str, Any] | State[Any]:
    """Optimize a checkpoint that arrived as a recipe says, unless another flow run has it.

    Args:
        recipe: what to do: the name of a shipped recipe, the s3:// URI of its YAML, or the recipe itself.
        checkpoint: a source for the recipe's fetch step, with `#KEY` after it where it arrived.
    """
    asked, holder = begin(settle().connect().objects, as_recipe(recipe), checkpoint, str(flow_run.get_id()))
    if holder:
        return Completed(message=f"Flow run {holder} has this checkpoint; retry that one to run it again.")
    return drive(asked)
