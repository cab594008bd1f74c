"""What a model can do, item by item, beside the dense model: by ability, by step, and what flipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from stages.measures.interval import Interval
from stages.measures.paired import Document, above_chance, of_documents, slices, value_of
from stages.measures.table import MEASURES, title

Reports = Mapping[tuple[str, str], Mapping[str, Any]]
MOST_FLIPS = 60
"""Flips that a page shows; their number is said."""
_MOST_NAMED = 4


@dataclass(frozen=True)
class Cell:
    """One model's right answers of one ability, and their share of dense's."""

    right: int
    ratio: Interval | None


@dataclass(frozen=True)
class Ability:
    """A row: how many items there are, how many dense has right, and what became of them."""

    name: str
    items: int
    dense: int
    chance: float
    known: bool
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Flip:
    """An item that dense and an artifact do not answer alike: one right, the other wrong."""

    artifact: str
    ability: str
    prompt: str
    expected: str
    dense: str
    now: str
    lost: bool


@dataclass(frozen=True)
class Grade:
    """A row of a measure by which items are not right or wrong: dense's value, each step's, and of what is judged the
    ratio to dense's, None where that has none.
    """

    ability: str
    measure: str
    items: int
    dense: float
    values: Mapping[str, float]
    ratios: Mapping[str, Interval | None]


@dataclass(frozen=True)
class ItemSet:
    """A set of items, as a report shows it.

    Attributes:
        corpus: its step.
        baseline: the dense model's step.
        judged: the artifacts with a column.
        abilities: rows of items that are answered right or wrong, the whole first; none where a set has none of these.
        heat: step -> ability -> right answers less dense's, and how many items of it the step was asked.
        flips: the first ones; `flipped` of each artifact, (lost, won).
        alike: of each artifact the share of dense's answers that it gives, too, and of its tokens up to the first that
            differs, None where the reports do not say.
        grades: rows of other measures, the whole first.
    """

    corpus: str
    baseline: str
    judged: Sequence[str]
    abilities: Sequence[Ability]
    heat: Mapping[str, Mapping[str, tuple[int, int]]]
    flips: Sequence[Flip]
    flipped: Mapping[str, tuple[int, int]]
    grades: Sequence[Grade] = ()
    alike: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)


def item_sets(reports: Reports, baseline: str, judged: Sequence[str], chain: Sequence[str]) -> list[ItemSet]:
    """Every set of items that the baseline and something else were asked.

    Args:
        reports: (artifact, corpus) -> content of its `report.json`.
        baseline: the dense model's step.
        judged: the artifacts that were executed.
        chain: the steps from the baseline on, in the order in which they read each other.
    """
    found = []
    for (name, corpus), report in reports.items():
        if name != baseline or not answered(report):
            continue
        asked = {one: paired(reports, one, baseline, corpus) for one, of in reports if of == corpus and one != baseline}
        if any(asked.values()):
            found.append(_set(corpus, baseline, asked, judged, chain))
    return found


def answered(report: Mapping[str, Any]) -> bool:
    """Whether a report is of items that are answered; pairs of texts are only near or far."""
    return bool(report.get("items")) and not any("similarity" in one for one in report["documents"])


def paired(reports: Reports, artifact: str, baseline: str, corpus: str) -> list[tuple[Document, Document]]:
    """Documents of the items that both were asked, the artifact's beside the baseline's, in the set's order."""
    if (artifact, corpus) not in reports or (baseline, corpus) not in reports:
        return []
    theirs = {one["id"]: one for one in reports[baseline, corpus]["documents"]}
    return [(one, theirs[one["id"]]) for one in reports[artifact, corpus]["documents"] if one["id"] in theirs]


def _set(
    corpus: str,
    baseline: str,
    every: Mapping[str, list[tuple[Document, Document]]],
    judged: Sequence[str],
    chain: Sequence[str],
) -> ItemSet:
    grades = _grades({one: every[one] for one in dict.fromkeys((*chain, *judged)) if every.get(one)}, judged)
    asked = {one: _answered(pairs) for one, pairs in every.items()}
    if not any(asked.values()):
        return ItemSet(corpus, baseline, [one for one in judged if every.get(one)], [], {}, [], {}, grades)
    shown = [one for one in judged if asked.get(one)]
    order = [one for one in (*chain, *judged) if asked.get(one)]
    names = _rows([theirs for _, theirs in max(asked.values(), key=len)])
    rows = [_ability(name, {one: _of(asked[one], name) for one in shown}) for name in names] if shown else []
    heat = {
        step: {name: _change(pairs) for name in names if (pairs := _of(asked[step], name))}
        for step in dict.fromkeys(order)
    }
    flips = [
        _flip(one, ours, theirs) for one in shown for ours, theirs in asked[one] if ours["right"] != theirs["right"]
    ]
    flipped = {
        one: (sum(f.lost for f in flips if f.artifact == one), sum(not f.lost for f in flips if f.artifact == one))
        for one in shown
    }
    alike = {one: _alike(asked[one]) for one in shown}
    return ItemSet(corpus, baseline, shown, rows, heat, flips[:MOST_FLIPS], flipped, grades, alike)


def _rows(documents: Sequence[Document]) -> list[str]:
    """The whole, and each ability where there are several."""
    found = slices(documents)
    return ["all", *(found if len(found) > 1 else ())]


def _alike(pairs: Sequence[tuple[Document, Document]]) -> tuple[float, float | None]:
    sides = [list(side) for side in zip(*pairs, strict=True)]
    told = all("said" in one for side in sides for one in side)
    same, begins = (MEASURES[name] for name in ("same_answers", "same_beginning"))
    return of_documents(same, *sides).point, of_documents(begins, *sides).point if told else None


def _answered(pairs: Sequence[tuple[Document, Document]]) -> list[tuple[Document, Document]]:
    """Those of items that are right or wrong; a translation is neither."""
    return [pair for pair in pairs if all("right" in one for one in pair)]


def _grades(asked: Mapping[str, list[tuple[Document, Document]]], judged: Sequence[str]) -> list[Grade]:
    most = max(asked.values(), key=len, default=[])
    found = []
    for name in _rows([theirs for _, theirs in most]):
        for measure, one in MEASURES.items():
            inside = {step: _of(pairs, name) for step, pairs in asked.items()}
            if one.graded and all(one.score in document for pair in _of(most, name) for document in pair):
                found.append(_grade(name, measure, {step: pairs for step, pairs in inside.items() if pairs}, judged))
    return found


def _grade(
    name: str, measure: str, asked: Mapping[str, Sequence[tuple[Document, Document]]], judged: Sequence[str]
) -> Grade:
    one = MEASURES[measure]
    sides = {step: [list(side) for side in zip(*pairs, strict=True)] for step, pairs in asked.items()}
    dense = value_of(one, max((theirs for _, theirs in sides.values()), key=len))
    return Grade(
        ability=name,
        measure=title(measure),
        items=max(map(len, asked.values())),
        dense=dense,
        values={step: value_of(one, ours) for step, (ours, _) in sides.items()},
        ratios={step: of_documents(one, *sides[step]) if dense > 0 else None for step in judged if step in sides},
    )


def _of(pairs: Sequence[tuple[Document, Document]], name: str) -> list[tuple[Document, Document]]:
    return [one for one in pairs if name in ("all", one[0]["slice"])]


def _ability(name: str, cells: Mapping[str, Sequence[tuple[Document, Document]]]) -> Ability:
    dense = [theirs for _, theirs in max(cells.values(), key=len)]
    known = above_chance(dense)
    return Ability(
        name=name,
        items=len(dense),
        dense=sum(one["right"] for one in dense),
        chance=sum(one["chance"] for one in dense) / len(dense),
        known=known,
        cells={
            one: Cell(
                sum(ours["right"] for ours, _ in pairs),
                of_documents(MEASURES["accuracy"], *map(list, zip(*pairs, strict=True))) if known else None,
            )
            for one, pairs in cells.items()
        },
    )


def _change(pairs: Sequence[tuple[Document, Document]]) -> tuple[int, int]:
    return sum(ours["right"] - theirs["right"] for ours, theirs in pairs), len(pairs)


def _flip(artifact: str, ours: Document, theirs: Document) -> Flip:
    return Flip(
        artifact=artifact,
        ability=ours["slice"],
        prompt=ours["prompt"],
        expected=ours["expected"],
        dense=theirs["answer"],
        now=ours["answer"],
        lost=bool(theirs["right"]),
    )


def whereabouts(reports: Reports, chain: Sequence[str]) -> list[str]:
    """Where right answers went, a sentence a set of items.

    Args:
        reports: (artifact, corpus) -> content of its `report.json`.
        chain: from the baseline to an artifact, in the order in which they read each other.
    """
    said = []
    for corpus in dict.fromkeys(corpus for (_, corpus), report in reports.items() if answered(report)):
        asked = [one for one in chain if (one, corpus) in reports]
        if len(asked) < 2 or asked[0] != chain[0]:
            continue
        right, dense = (
            sum(one[side]["right"] for one in _answered(paired(reports, asked[-1], asked[0], corpus)))
            for side in (0, 1)
        )
        steps = [(after, *_lost(reports, before, after, corpus)) for before, after in pairwise(asked)]
        worst, net, abilities = max(steps, key=lambda one: one[1])
        if net <= 0 or right >= dense:
            continue
        named = ", ".join(f"{ability} {count}" for ability, count in abilities[:_MOST_NAMED])
        of = len(paired(reports, worst, asked[asked.index(worst) - 1], corpus))
        said.append(
            f"{corpus}: {asked[-1]} answers {right} right where {asked[0]} answers {dense}; "
            f"most were lost by {worst}, {net} of {of} items ({named})"
        )
    return said


def _lost(reports: Reports, before: str, after: str, corpus: str) -> tuple[int, list[tuple[str, int]]]:
    """Right answers that a step cost, less those that it won; and by ability, the most first."""
    net: dict[str, int] = {}
    for ours, theirs in _answered(paired(reports, after, before, corpus)):
        net[ours["slice"]] = net.get(ours["slice"], 0) + theirs["right"] - ours["right"]
    return sum(net.values()), sorted(((name, count) for name, count in net.items() if count > 0), key=lambda o: -o[1])
