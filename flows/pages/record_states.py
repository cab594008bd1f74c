"""What a run's record says, in Prefect's words: states with their own times, lines of the log, artifacts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal

import yaml

from flows.recipe.expand import expanded
from flows.recipe.model import Recipe
from flows.reporting.verdict_text import described, summary
from flows.results import RunLine, RunResult
from flows.running.run_records import Record
from stages.measures.table import foremost, title
from stages.runtime.contract import StageError

Type = Literal["PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED", "CRASHED"]
Event = Mapping[str, Any]
_TICK = timedelta(milliseconds=1)
"""What Prefect can tell apart in a SQLite database."""
INFO, ERROR = 20, 40
"""Levels of a line, as `logging` numbers them."""


@dataclass(frozen=True)
class State:
    """What Prefect shows as the state of a run, from `at` on."""

    type: Type
    name: str
    at: datetime
    message: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a log; `step` is empty for the run's own."""

    at: datetime
    text: str
    step: str = ""
    level: int = INFO


@dataclass(frozen=True)
class Artifact:
    """What a run's page shows beside its log; `data` is Markdown, or the rows of a table as JSON."""

    what: str
    type: Literal["table", "markdown"]
    data: str
    description: str


@dataclass(frozen=True)
class StepRun:
    """A step: `after` names the steps it reads."""

    name: str
    stage: str
    after: tuple[str, ...]
    states: tuple[State, ...]


@dataclass(frozen=True, kw_only=True)
class FlowRun:
    """A run as Prefect's pages show it."""

    key: str
    name: str
    parameters: Mapping[str, Any]
    states: tuple[State, ...]
    steps: tuple[StepRun, ...]
    lines: tuple[Line, ...]
    artifacts: tuple[Artifact, ...]

    @property
    def goes_on(self) -> bool:
        """Whether the record holds no end yet."""
        return self.states[-1].type == "RUNNING"


@dataclass(frozen=True, kw_only=True)
class Told:
    """A record as it was at one moment.

    Attributes:
        steps: name -> stage and the steps it reads, in the order of the recipe; empty where it cannot be read.
    """

    line: RunLine
    result: RunResult | None
    events: Sequence[Event]
    command: Sequence[str] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)


def read(record: Record) -> Told:
    """A record, once.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no record of this version.
    """
    recipe = yaml.safe_load(record.recipe())
    return Told(
        line=record.line(),
        result=record.result,
        events=list(record.events()),
        command=[str(word) for word in record.facts.get("command", ())],
        recipe=recipe,
        steps=_planned(recipe),
    )


def _planned(recipe: Mapping[str, Any]) -> dict[str, tuple[str, tuple[str, ...]]]:
    try:
        steps = expanded(Recipe.model_validate(recipe)).steps
    except (ValueError, StageError, KeyError):  # a recipe of another version: what its log says is enough
        return {}
    return {one.name: (one.stage, tuple(one.inputs.values())) for one in steps}


def flow_run(told: Told) -> FlowRun:
    """A record in Prefect's words. It says nothing that the record does not say."""
    began = datetime.fromisoformat(told.line.started)
    end = _end(told)
    running = State("RUNNING", "Running", began)
    names = {**told.steps, **{name: ("", ()) for name in _heard_of(told) if name not in told.steps}}
    steps = tuple(
        StepRun(name, stage, after, tuple(_one_after_another(_step(told, name, end))))
        for name, (stage, after) in names.items()
    )
    return FlowRun(
        key=told.line.run,
        name=told.line.recipe,
        parameters={"recipe": told.recipe},
        states=tuple(_one_after_another([running, end] if end else [running])),
        steps=steps,
        lines=tuple(_lines(told, began, end)),
        artifacts=tuple(_artifacts(told, steps, end)),
    )


def _end(told: Told) -> State | None:
    """The state that a run ended in, None while it goes on."""
    state, result = told.line.state, told.result
    if state == "running":
        return None
    at = _ended_at(told)
    if result:
        came_to = summary(result)
        return State("COMPLETED", "Completed", at, came_to) if result.passed else State("FAILED", "Failed", at, came_to)
    if state == "interrupted":
        return State("CANCELLED", "Cancelled", at, "interrupted")
    if state == "error":
        return State("FAILED", "Failed", at, told.line.error)
    return State("CRASHED", "Crashed", at, "its process ended without a word; it was last heard of at this time")


def _ended_at(told: Told) -> datetime:
    """When a run said that it ends; of one that did not, the last that was heard of it."""
    ends = [event["at"] for event in told.events if _is_end(event)]
    if ends:
        return datetime.fromisoformat(ends[0])
    heard = datetime.fromisoformat(max([told.line.started, *(event["at"] for event in told.events)]))
    if told.line.seconds is None:
        return heard
    return max(heard, datetime.fromisoformat(told.line.started) + timedelta(seconds=told.line.seconds))


def _is_end(event: Event) -> bool:
    return event["event"] in ("finished", "error", "interrupted") and not event.get("step")


def _heard_of(told: Told) -> list[str]:
    return list(dict.fromkeys(event["step"] for event in told.events if event.get("step")))


def _step(told: Told, name: str, end: State | None) -> Iterator[State]:
    """The states of one step, from the run's beginning on."""
    yield State("PENDING", "Pending", datetime.fromisoformat(told.line.started))
    begun, done = False, False
    for event in told.events:
        if event.get("step") != name:
            continue
        at, what = datetime.fromisoformat(event["at"]), event["event"]
        if not begun and what in ("started", "sealed", "failed", "interrupted"):
            begun = True
            yield State("RUNNING", "Running", at, str(event.get("why", "")))
        if done or what not in ("sealed", "failed", "interrupted"):
            continue
        done = True
        if what == "sealed":
            sealed = f"sealed as {event['fingerprint'][:12]}"
            yield State("COMPLETED", "Cached" if event["cached"] else "Completed", at, sealed)
        elif what == "failed":
            yield State("FAILED", "Failed", at, str(event.get("what", "")))
        else:
            yield State("CANCELLED", "Cancelled", at, "interrupted")
    if end and not done:
        yield _cut_off(told, end) if begun else State("CANCELLED", "Cancelled", end.at, "never started")


def _one_after_another(states: Iterable[State]) -> Iterator[State]:
    """The same states, each later than the one before: Prefect takes no two of a run at one time."""
    last: datetime | None = None
    for state in states:
        last = state.at if last is None else max(state.at, last + _TICK)
        yield replace(state, at=last)


def _cut_off(told: Told, end: State) -> State:
    """The last state of a step that began and said nothing more: it broke with the run, or was cut off by it."""
    owned = any(event["event"] == "failed" for event in told.events)
    if end.type == "FAILED" and (owned or told.result):
        return State("CANCELLED", "Cancelled", end.at, "cut off when the run ended")
    return State(end.type if end.type != "COMPLETED" else "CANCELLED", end.name, end.at, end.message)


def _lines(told: Told, began: datetime, end: State | None) -> Iterator[Line]:
    """The log; what is told after the end, such as a loose end, stands behind it, so that it only grows."""
    last = Line(end.at, end.message, level=INFO if end.type == "COMPLETED" else ERROR) if end else None
    yield Line(began, f"run {told.line.run}: {shlex.join(told.command)}")
    for event in told.events:
        at, step, what = datetime.fromisoformat(event["at"]), str(event.get("step", "")), event["event"]
        if what == "started":
            yield Line(at, f"{step}: started" + (f": {event['why']}" if event.get("why") else ""), step)
        elif what == "note":
            yield Line(at, f"{step}: {event['text']}", step)
        elif what == "sealed":
            how = "is sealed already" if event["cached"] else "sealed"
            yield Line(at, f"{step}: {how}: {event['fingerprint'][:12]}", step)
        elif what == "failed":
            yield Line(at, f"{step}: {event.get('what', 'failed')}", step, ERROR)
        elif what == "interrupted" and step:
            yield Line(at, f"{step}: interrupted", step, ERROR)
        elif what == "loose end":
            yield Line(at, f"{event['what']} did not come about ({event['error']}). {event['remedy']}", level=ERROR)
        elif _is_end(event) and last:
            yield last
            last = None
    if last:
        yield last


def _artifacts(told: Told, steps: Sequence[StepRun], end: State | None) -> Iterator[Artifact]:
    """Nothing of it changes once it is there: they are the end's."""
    if end is None:
        return
    yield Artifact("steps", "table", json.dumps(_rows(told, steps)), "Every step: how it ended, seconds, size")
    yield Artifact("verdict", "markdown", _verdict(told, end), end.message)


def _rows(told: Told, steps: Sequence[StepRun]) -> list[dict[str, object]]:
    results = {one.name: one for one in told.result.steps} if told.result else {}
    shown = foremost(*(one.metrics for one in results.values()))
    rows: list[dict[str, object]] = []
    for step in steps:
        states, done = step.states, results.get(step.name)
        ran = states[-1].at - states[1].at if len(states) > 2 else timedelta()
        metrics = done.metrics if done else {}
        rows.append(
            {
                "step": step.name,
                "stage": step.stage,
                "state": states[-1].name,
                "seconds": round(ran.total_seconds(), 1) if len(states) > 2 else "",
                "size, MB": round(metrics["size_bytes"] / 1e6, 1) if "size_bytes" in metrics else "",
                title(shown): round(metrics[shown], 3) if shown in metrics else "",
                "fingerprint": done.fingerprint[:12] if done else "",
            }
        )
    return rows


def _verdict(told: Told, end: State) -> str:
    """What the run came to, and where more of it stands, in Markdown."""
    run = told.line.run
    if told.result is None:
        said, links = f": {end.name.lower()}\n\n{end.message}", []
    else:
        said, links = f"\n\n{described(told.result)}", [f"[The report](/runs/{run}/report.html)"]
    links.append(f"[Its page in MLflow](/runs/{run}/mlflow)")
    return f"# {told.line.recipe}{said}\n\n{', '.join(links)}\n"
