"""What a gate's measure comes to, from the reports: a value and its interval, over all documents or slice by slice.

Shapes: D documents, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from flows.judging.pairing import Report, check_paired, read_by_both
from stages.measures.interval import Interval
from stages.measures.paired import Document, above_chance, of_documents, slices
from stages.measures.table import BROUGHT, MEASURES, OWN, Measure, measure_of
from stages.runtime.contract import StageError

Reports = Mapping[tuple[str, str], Report]

CHAMPION = "champion"
_LOST = (
    "Its engine must be in the store: run the recipe that made it again, or promote a version whose engine is there."
)
JUDGE_MORE = "Name an executed artifact and its corpora under `judge`, or take the gate out."
_KNOWS_NOTHING = 0.9
"""Share of the surprise of a guess among all tokens from which on a model is said to know nothing of a language."""


@dataclass(frozen=True)
class Found:
    """What was measured.

    Attributes:
        interval: the value with its ends; None where the gate does not apply.
        slice: where it was looked at; empty for all documents.
        why: why it does not apply, or what is to be said of it beside.
        failed: it fails whatever was measured.
    """

    interval: Interval | None
    slice: str = ""
    why: str = ""
    failed: bool = False


class Gate(Protocol):
    """What a recipe demands of a measure; `flows.recipe.model` has the typed record."""

    @property
    def measure(self) -> str:
        """A key of MEASURES, `own.` with the name of one's own, or `size_bytes`."""

    @property
    def against(self) -> str | None:
        """The artifact to divide by, `champion`, or None for the measure itself."""

    @property
    def artifact(self) -> str | None:
        """The judged artifact; None for every one that was executed."""

    @property
    def corpus(self) -> str | None:
        """The corpus; None for every one on which there is such a measure."""

    @property
    def slice(self) -> str | None:
        """The slice of the corpus, None for all of it."""

    @property
    def worst(self) -> bool:
        """Whether each slice must hold."""

    @property
    def at_most(self) -> float | None:
        """Upper limit of the interval."""

    @property
    def at_least(self) -> float | None:
        """Lower limit of the interval."""

    @property
    def value_at_most(self) -> float | None:
        """Upper limit of the value itself."""

    @property
    def value_at_least(self) -> float | None:
        """Lower limit of the value itself."""

    @property
    def low_at_most(self) -> float | None:
        """Upper limit of the interval's low end."""

    @property
    def high_at_least(self) -> float | None:
        """Lower limit of the interval's high end."""


def found(gate: Gate, artifact: str, corpus: str, reports: Reports) -> list[Found]:
    """What a gate on a score looks at: one value, or one of each slice of which the worst must hold.

    Raises:
        StageError: it was not measured, or the documents cannot be paired, or there is no such slice.
    """
    measure, ours = measure_of(gate.measure), reports[artifact, corpus]
    theirs, beside, why = None, ours, ""
    if gate.against is not None:
        if (gate.against, corpus) not in reports:
            remedy = _LOST if gate.against == CHAMPION else f"Judge {gate.against} there too."
            raise StageError(f"{gate.against} was not measured on {corpus}", remedy=remedy)
        which = f"{artifact} and {gate.against} on {corpus}"
        ours, beside, why = read_by_both(ours, reports[gate.against, corpus], which)
        check_paired(ours, beside, which)
        theirs = _sorted(beside)
    elif measure.between:
        raise StageError(f"{gate.measure} is counted between two", remedy="Say `against` which in the gate.")
    mine = _sorted(ours)
    places = _places(gate, measure, corpus, mine)
    looked_at = [at for where in places.values() for at in where]
    _check_measured(measure, artifact, ours, [mine[at] for at in looked_at])
    if theirs is not None and gate.against is not None:
        _check_measured(measure, gate.against, beside, [theirs[at] for at in looked_at])
    if theirs is None or not measure.of_items or measure.between or gate.measure.startswith(BROUGHT):
        values = [Found(of_documents(measure, *_at(mine, theirs, at)), name) for name, at in places.items()]
    else:
        values = _of_answers(gate, measure, (mine, theirs), places, beside)
    return [replace(one, why="; ".join(filter(None, (one.why, why)))) for one in _there(values, measure)]


def _there(looked_at: list[Found], measure: Measure) -> list[Found]:
    """Without the slices in which no item can be typed otherwise, or none of those is right; not where all are so."""
    empty = [one.slice for one in looked_at if one.interval and math.isnan(one.interval.point)]
    if "varied" not in measure.reads or not empty or len(empty) == len(looked_at):
        return looked_at
    why = f"left out, since nothing can be kept there when it is typed otherwise: {', '.join(sorted(empty))}"
    kept = [one for one in looked_at if one.slice not in empty]
    return [replace(one, why="; ".join(filter(None, (one.why, why)))) for one in kept]


def _places(gate: Gate, measure: Measure, corpus: str, mine: Sequence[Document]) -> dict[str, list[int]]:
    """Slice, empty for all, -> the places of the documents that a gate looks at.

    Of the worst slice those count that are measured so: items of another task belong to others.
    """
    if not gate.slice and not gate.worst:
        return {"": list(range(len(mine)))}
    places = slices(mine)
    if not places or (gate.slice and gate.slice not in places):
        have = ", ".join(sorted(places)) or "no slice"
        raise StageError(f"{corpus} has no slice {gate.slice}" if gate.slice else f"{corpus} has no slices", limit=have)
    if gate.slice:
        return {gate.slice: places[gate.slice]}
    having = {name: at for name, at in places.items() if all(measure.score in mine[one] for one in at)}
    return having if measure.of_items and having else places


def _at(
    mine: Sequence[Document], theirs: Sequence[Document] | None, places: Sequence[int]
) -> tuple[list[Document], list[Document] | None]:
    return [mine[at] for at in places], None if theirs is None else [theirs[at] for at in places]


def _of_answers(
    gate: Gate,
    measure: Measure,
    pair: tuple[Sequence[Document], Sequence[Document]],
    places: Mapping[str, Sequence[int]],
    report: Report,
) -> list[Found]:
    """Ratios to another's right answers, where it has more of them than a guess has."""
    knows = {name: above_chance([pair[1][at] for at in where], measure) for name, where in places.items()}
    if not any(knows.values()):
        # Of the set that ships the answers are known to be right: a model may be too small for it.
        untrained = bool(report.get("shipped")) or knows_nothing(report)
        nothing = f"has no {gate.measure} that is surely above 0" if measure.graded else "answers no better than chance"
        why = f"{gate.against} {nothing}"
        if not untrained:
            reads = any("prompt_nll" in one for one in report["documents"])
            why += ", though it can predict their words" if reads else ""
            why += ": look for wrong answers in the set, or take the gate out"
        return [Found(None, gate.slice or "", why, failed=not untrained)]
    left_out = sorted(name for name, better in knows.items() if not better)
    guesses = f"has no {gate.measure}" if measure.graded else "is no better than chance"
    why = f"left out, since {gate.against} {guesses} there: {', '.join(left_out)}" if left_out else ""
    return [
        Found(of_documents(measure, *_at(*pair, where)), name, why) for name, where in places.items() if knows[name]
    ]


def knows_nothing(report: Report) -> bool:
    """Whether a model is as surprised by the items' prompts as one that knows no language: random weights."""
    documents, vocabulary = report["documents"], report.get("vocabulary", 0)
    if vocabulary < 2 or any("prompt_nll" not in one for one in documents):
        return False
    guessed = sum(max(one["tokens"] - 1, 0) for one in documents) * math.log(vocabulary)
    return sum(one["prompt_nll"] for one in documents) >= _KNOWS_NOTHING * guessed


def has_any(report: Report, measure: str) -> bool:
    """Whether a set holds items that are measured so."""
    return any(measure_of(measure).score in one for one in report["documents"])


def on_request(measure: str) -> bool:
    """Whether `judge` has to ask for it, or reports of before have none of it."""
    return measure_of(measure).score.startswith((OWN, "varied", "ended", "spelt", "said", "right_by_length"))


def _sorted(report: Report) -> list[Document]:
    return sorted(report["documents"], key=lambda document: document["id"])


def _check_measured(measure: Measure, artifact: str, report: Report, documents: Sequence[Document]) -> None:
    """Raise StageError where not all of some documents were measured so."""
    lacking = [one for one in documents if measure.score not in one]
    if not lacking:
        return
    remedy = "It was measured before this was: gate against the baseline until a version that has it is promoted."
    if measure.score.startswith((OWN, "varied")):
        remedy = _measurable(report, measure.score)
    elif measure.of_items and report.get("items"):
        keys = {key for one in lacking for key in one}
        fitting = [name for name, one in MEASURES.items() if one.of_items and {one.score, *one.reads} <= keys]
        remedy = f"Gate on what such items are measured by: {', '.join(fitting)}; or name a slice that has it."
    elif artifact != CHAMPION:
        remedy = _measurable(report, measure.score)
    raise StageError(
        f"the report of {artifact} has no {measure.score!r}",
        measured=f"{len(lacking)} of {len(documents)} documents lack it",
        remedy=remedy,
    )


def of_size(artifact: str, against: str | None, sizes: Mapping[str, int]) -> Interval:
    """Bytes of an artifact, or their ratio to those of another."""
    if against is not None and not sizes.get(against):
        remedy = _LOST if against == CHAMPION else JUDGE_MORE
        raise StageError(f"the size of {against} is not known, so nothing can be compared with it", remedy=remedy)
    size = float(sizes[artifact]) / (float(sizes[against]) if against is not None else 1.0)
    return Interval(size, size, size)


def _measurable(report: Report, score: str) -> str:
    fitting = {name: one for name, one in MEASURES.items() if report.get("task", "generate") in one.tasks}
    if score.startswith(OWN):
        return f"It needs `judge: {{own: [{score.removeprefix(OWN)}]}}`."
    if score.startswith("varied"):
        return "It needs `judge: {variants: [typos, case, space]}`, and items that can be typed otherwise."
    if any(one.score == score for one in fitting.values()):
        return "It needs `judge: {baseline: ...}`."
    return f"Gate on what a model of its task, {report['task']}, is measured by: {', '.join(fitting)}."
