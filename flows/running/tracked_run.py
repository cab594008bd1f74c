"""A run as MLflow's users look for it: the recipe's params, what is read, and a description of how it ended."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from flows.prefect_api.retry import AWAY_S, patiently
from flows.recipe.expand import Expanded
from flows.recipe.model import Gate, Recipe
from flows.reporting.verdict_text import broken, described
from flows.results import RunResult
from flows.running.loose_ends import LooseEnds
from flows.running.plan import Planned
from flows.running.run_records import Record, as_yaml
from flows.tracking.connect import Tracking
from flows.tracking.datasets import Dataset
from flows.tracking.ends import End
from flows.tracking.leftovers import GONE, end_leftovers
from flows.tracking.runs import Close, RecipeRun, Start, recipe_run
from stages import stage
from stages.runtime.contract import Interrupted, Kind
from stages.runtime.execute import commit

CHECKPOINT = "checkpoint"
T = TypeVar("T")


def tracked_run(
    opening: Callable[[], Tracking],
    asked: Expanded,
    planned: Mapping[str, Planned],
    store: str,
    loose: LooseEnds,
    ended: Sequence[RunResult],
    unopened: Callable[[], object],
) -> AbstractContextManager[RecipeRun]:
    """MLflow's run of a recipe run, closed by how the block ends.

    Args:
        opening: opens MLflow; called in a thread, beside which steps can begin.
        asked: the recipe and the steps that run for it.
        planned: those steps with their identities.
        store: its URI.
        loose: hears what did not come about in MLflow.
        ended: holds the run's result once nothing undoes it.
        unopened: ends what the run does, as MLflow could not be opened.
    """
    told = _Told(store, loose, ended)
    made = commit()

    def again(ask: Callable[[], T], stopped: threading.Event | None = None) -> T:
        return patiently(ask, away_s=AWAY_S, say=loose.heard, stopped=stopped)

    start = Start(
        recipe=asked.recipe.name,
        run=loose.record.name,
        tags={"enginery.store": store, **({"mlflow.source.git.commit": made} if made else {})},
        text=as_yaml(asked.recipe),
        params=recipe_params(asked.recipe, planned),
        read=datasets(asked, planned),
    )
    close = Close(end=told.end, known=told.known, told=told.broken, again=again, unopened=unopened)
    return recipe_run(opening, start, close)


def end_killed(tracking: Tracking, scratch: Path, store: str) -> None:
    """End in MLflow what runs of this machine that were killed left running, as their records say.

    Raises:
        Unavailable: MLflow does not answer.
    """
    nobody = LooseEnds(Record(scratch / "runs" / "none"), lambda _: None)
    end_leftovers(tracking, _Told(store, nobody, ()).known)


def recipe_params(recipe: Recipe, planned: Mapping[str, Planned]) -> dict[str, Any]:
    """What two runs of a recipe can differ in: `int8.scheme`, `int8.inputs.model`, `judge.split`, `gate.perplexity...`.

    With a step's defaults and the digest of its source, so that a param is missing only where the step is.
    """
    found: dict[str, Any] = {}
    for step in recipe.steps:
        inputs = {"inputs": step.inputs} if step.inputs else {}
        found[step.name] = {"stage": step.stage, **inputs, **planned[step.name].order.work.params, **step.params}
    if recipe.judge:
        found["judge"] = recipe.judge.model_dump(mode="json")
    for gate in recipe.gates:
        for name, limit in _bounds(gate):
            alike = sum(other.partition("#")[0] == name for other in found)
            found[f"{name}#{alike + 1}" if alike else name] = limit
    if recipe.register_as:
        found["register"] = recipe.register_as.model_dump(mode="json")
    return found


def datasets(asked: Expanded, planned: Mapping[str, Planned]) -> dict[str, tuple[Dataset, ...]]:
    """Step -> the texts and source checkpoints that it reads; under the empty name what the run reads in all."""
    read: dict[str, list[tuple[str, str]]] = {}
    for step in asked.steps:
        for role, source in step.inputs.items():
            for context in _contexts(planned[step.name], role, planned[source]):
                read.setdefault(step.name, []).append((source, context))
    everything = [one for pairs in read.values() for one in pairs]
    sources = {step.name: _source(step.params) for step in asked.steps}
    return {
        name: tuple(
            Dataset(
                name=source,
                fingerprint=planned[source].identity,
                source=sources[source],
                contexts=tuple(dict.fromkeys(context for other, context in pairs if other == source)),
            )
            for source in dict.fromkeys(source for source, _ in pairs)
        )
        for name, pairs in {"": everything, **read}.items()
    }


def _source(params: Mapping[str, Any]) -> str:
    """Where a step's bytes come from; of several sources all of them."""
    several = params.get("sources") or [params]
    return ", ".join(str(one.get("source", "")) for one in several)


@dataclass(frozen=True)
class _Told:
    """What MLflow's page says of this run and of earlier ones beside the store."""

    store: str
    loose: LooseEnds
    ended: Sequence[RunResult]

    def end(self, tracking: Tracking, run_id: str, error: BaseException | None) -> End:
        """A result stands whatever came after it: an interrupt undoes no promotion."""
        record = self.loose.record
        if self.ended:
            return self._of_result(tracking, run_id, self.ended[-1], record)
        if error is None:
            return End("FINISHED", self._page(tracking, run_id, "**ended** without a verdict", record))
        interrupted = isinstance(error, KeyboardInterrupt | Interrupted)
        return self._of_error(tracking, run_id, str(error) or type(error).__name__, record, interrupted=interrupted)

    def known(self, tracking: Tracking, run_id: str, run: str) -> End | None:
        """The end of an earlier run by its record, where it is beside this store."""
        record = Record(self.loose.record.folder.parent / run) if run else None
        if record is None or not record.facts:
            return None
        end, line, result = GONE, record.line(), record.result
        if result:
            end = self._of_result(tracking, run_id, result, record)
        elif line.state in ("error", "interrupted"):
            end = self._of_error(tracking, run_id, line.error, record, interrupted=line.state == "interrupted")
        heard = max([line.started, *(str(event["at"]) for event in record.events())])
        return replace(end, at_ms=round(datetime.fromisoformat(heard).timestamp() * 1000))

    def broken(self, what: str, error: Exception) -> None:
        """Tell of it; nothing of the run hangs on it."""
        remedy = "The next run on this machine ends what stays open there."
        self.loose.tell(error, what, remedy, stands=bool(self.ended))

    def _of_result(self, tracking: Tracking, run_id: str, result: RunResult, record: Record) -> End:
        page = self._page(tracking, run_id, described(result), record, "report.html")
        return End("FINISHED" if result.passed else "FAILED", page)

    def _of_error(self, tracking: Tracking, run_id: str, error: str, record: Record, *, interrupted: bool) -> End:
        words = broken(error, interrupted=interrupted)
        return End("KILLED" if interrupted else "FAILED", self._page(tracking, run_id, words, record))

    def _page(self, tracking: Tracking, run_id: str, words: str, record: Record, *files: str) -> str:
        links = ", ".join(f"[{name}]({tracking.page(run_id, name)})" for name in (*files, "recipe.yaml"))
        made, again = commit(), shlex.join(["enginery", "run", "recipe.yaml", "--store", self.store])
        at = f" at commit `{made[:12]}`" if made else ""
        return (
            f"{words}\n\nRun `{record.name}` in `enginery runs`{at}. Files: {links}.\n\n"
            f"To do it again, with that recipe:\n\n```\n{again}\n```\n"
        )


def _bounds(gate: Gate) -> Iterator[tuple[str, float]]:
    named = [gate.measure, gate.artifact, gate.corpus, f"against {gate.against}" if gate.against else None]
    name = ".".join(["gate", *filter(None, named)])
    for bound in ("at_most", "at_least"):
        limit = getattr(gate, bound)
        if limit is not None:
            yield f"{name}.{bound}", limit


def _contexts(reader: Planned, role: str, source: Planned) -> tuple[str, ...]:
    """What for a step reads what another one brings from outside; nothing for what is made here."""
    kind = stage(source.order.stage).output
    if kind is not Kind.CORPUS:
        return (CHECKPOINT,) if kind is Kind.CHECKPOINT and not source.after else ()
    if "split" in reader.order.work.params:
        return (str(reader.order.work.params["split"]),)
    if reader.order.stage == "recover":
        return ("validate",) if role == "other" else ("train", "validate")
    return ("calibrate",)
