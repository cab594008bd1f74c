"""What a model is asked, and what is right: one item a line of a set of items.

A set is a corpus whose lines are items instead of text. Its splits are `validate`, which steps may look at while they
choose, and `test`, which only the stage `validate` reads; no step calibrates or trains on either.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, FiniteFloat, model_validator

from stages.runtime.contract import Frozen, StageError

ITEMS = "items"
"""The key of corpus.json that says so: its tasks."""
HARNESS = "harness"
"""The key of corpus.json that holds a task of lm-evaluation-harness, and the folder of its files."""
SOURCES_OF_SLICES = ("abilities", "sources")
"""The keys of corpus.json that name slices: what is asked, and where text is from, each with how much is of a split."""

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])")
"""In a `plain_number`; no letter follows it, but one of scripts without spaces, as a unit may."""

Kind = Literal[
    "answers",
    "choices",
    "instructions",
    "classify",
    "tag",
    "question",
    "translate",
    "summarize",
    "similarity",
    "retrieval",
]
WRITTEN = ("translate", "summarize")
"""Tasks of items that are neither right nor wrong: what is written is held against references."""
Demand = Literal[
    "words_at_most",
    "words_at_least",
    "lines",
    "contains",
    "omits",
    "starts_with",
    "ends_with",
    "case",
    "json",
    "language",
]

_NUMBERS = ("words_at_most", "words_at_least", "lines")
_VALUES = {"case": ("upper", "lower"), "language": ("en", "zh")}


class ItemSplits(frozenset[str]):
    """The splits that a set of items will have, where admission looks ahead: no text.

    `tasks` are those of its items, empty where that is not known yet.
    """

    tasks: frozenset[str] = frozenset()


class Check(Frozen):
    """What an answer to an instruction must be.

    Attributes:
        demand: what is looked at.
        value: a number of words or lines; what must or must not stand there; `upper` or `lower`; `en` or `zh`; None
            for `json`.
    """

    demand: Demand
    value: int | str | None = None

    @model_validator(mode="after")
    def _sensible(self) -> Check:
        allowed = _VALUES.get(self.demand)
        if self.demand in _NUMBERS:
            good, wanted = isinstance(self.value, int) and self.value >= 0, "a number"
        elif self.demand == "json":
            good, wanted = self.value is None, "nothing"
        else:
            good = isinstance(self.value, str) and (self.value in allowed if allowed else bool(self.value.strip()))
            wanted = " or ".join(allowed) if allowed else "a text"
        if not good:
            raise ValueError(f"the check {self.demand} takes {wanted} for its value")
        return self


def plain_number(text: str) -> str:
    """A text as numbers are looked for in it: of one width, with one sign for less than nothing."""
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-").strip()


class Item(Frozen):
    """One question.

    Attributes:
        id: unique in its set.
        ability: the slice it belongs to.
        language: of what is asked.
        task: how it is asked and judged.
        prompt: what the model reads, as it stands; for `instructions`, `translate` and `summarize` what a user says to
            it.
        answers: of `answers`: what is accepted; the first is the reference. Of `classify`: the text's class. Of
            `question`: what is accepted, none where the context does not answer it. Of `translate` and `summarize`: the
            references, whose language `language` is.
        match: of `answers`: the beginning of the answer must be one of them, it must stand anywhere in the answer's
            first line, or the first number there must equal one of them.
        choices: of `choices`: what may follow the prompt, with whatever space must stand between: the stage `items`
            puts it there.
        right: of `choices`: the number of the right one.
        checks: of `instructions`: all must hold.
        context: of `question`: the text that it is about.
        words: of `tag`: what is labelled; by default the words of the prompt, and of Chinese its characters.
        labels: of `tag`: one of each word.
        other: of `similarity`: the text that the prompt is compared with; of `retrieval`: the document that it seeks.
        score: of `similarity`: how near people found both, in any unit.
    """

    id: str = Field(min_length=1)
    ability: str = Field(min_length=1)
    language: Literal["en", "zh"] = "en"
    task: Kind = "answers"
    prompt: str = Field(min_length=1)
    answers: tuple[str, ...] = ()
    match: Literal["exact", "contains", "numeric"] = "exact"
    choices: tuple[str, ...] = ()
    right: int = Field(0, ge=0)
    checks: tuple[Check, ...] = ()
    context: str = ""
    words: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    other: str = ""
    score: FiniteFloat | None = None

    @model_validator(mode="after")
    def _whole(self) -> Item:
        if self.task == "answers" and not all(one.strip() for one in self.answers or ("",)):
            raise ValueError(f"item {self.id} accepts no answer, or an empty one")
        if self.task == "classify" and len(self.answers) != 1:
            raise ValueError(f"item {self.id} must have one class in `answers`")
        if self.task == "choices" and (len({*self.choices}) < 2 or self.right >= len(self.choices)):
            raise ValueError(f"item {self.id} needs two different choices, and the number of one of them in `right`")
        if self.task == "instructions" and not self.checks:
            raise ValueError(f"item {self.id} has nothing to check")
        if self.task == "tag" and (not self.tagged or len(self.tagged) != len(self.labels)):
            raise ValueError(f"item {self.id} has {len(self.tagged)} words and {len(self.labels)} labels")
        if self.task in WRITTEN and not (self.answers and all(one.strip() for one in self.answers)):
            raise ValueError(f"item {self.id} has no reference in `answers`, or an empty one")
        if self.task in ("similarity", "retrieval") and not self.other.strip():
            raise ValueError(f"item {self.id} has no `other` text")
        if self.task == "similarity" and self.score is None:
            raise ValueError(f"item {self.id} has no `score`")
        return self

    @model_validator(mode="after")
    def _numbers(self) -> Item:
        compared = self.answers if self.task == "answers" and self.match == "numeric" else ()
        if strange := [one for one in compared if not NUMBER.fullmatch(plain_number(one))]:
            raise ValueError(f"item {self.id} is compared as a number and accepts {strange[0]!r}, which is none")
        return self

    @property
    def tagged(self) -> tuple[str, ...]:
        """Of `tag`: what each label is of."""
        if self.words:
            return self.words
        return tuple("".join(self.prompt.split()) if self.language == "zh" else self.prompt.split())

    @property
    def chance(self) -> float:
        """The share of such items that a guess gets right."""
        return 1 / len(self.choices) if self.task == "choices" else 0.0


def holds_items(corpus: Path) -> bool:
    """Whether a corpus is a set of items."""
    path = corpus / "corpus.json"
    return path.is_file() and ITEMS in json.loads(path.read_text(encoding="utf-8"))


def holds_harness(corpus: Path) -> bool:
    """Whether a corpus is a task of lm-evaluation-harness."""
    return holds_items(corpus) and HARNESS in json.loads((corpus / "corpus.json").read_text(encoding="utf-8"))


def not_items() -> StageError:
    """The refusal of text where a set of items is expected."""
    return StageError("this is text, and a set of items is expected", remedy="Name a step of the stage items.")


def every_item(corpus: Path) -> Iterator[Item]:
    """The items of all splits of a set.

    Raises:
        StageError: it is text.
    """
    if not holds_items(corpus):
        raise not_items()
    for path in sorted(corpus.glob("*.jsonl")):
        yield from read_items(corpus, path.stem)


def read_items(corpus: Path, split: str) -> Iterator[Item]:
    """The items of one split, in order.

    Raises:
        StageError: the set has no such split.
    """
    path = corpus / f"{split}.jsonl"
    if not path.is_file():
        raise StageError(
            f"the set of items has no split {split!r}",
            measured=", ".join(sorted(one.stem for one in corpus.glob("*.jsonl"))) or "none",
        )
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield Item.model_validate_json(line)
