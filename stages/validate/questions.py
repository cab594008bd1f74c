"""Items that are put to a model one small group after another: what it answers, and whether that is right.

A group is always the same items side by side, so that what an item is answered does not depend on which worker asks.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.measures.documents import Document, by_slice, summary
from stages.measures.items import HARNESS, read_items
from stages.measures.leaks import leaks, leaks_across
from stages.measures.own import scored
from stages.models.anatomy import tasks
from stages.models.checkpoint.loading import load_config, load_tokenizer
from stages.models.checkpoint.pooling import Pooling, pooling, reads
from stages.models.text.token_ids import plain_text
from stages.models.text.windows import passages
from stages.runtime.contract import Metrics, Progress, StageError
from stages.serving.engine import Answerer
from stages.serving.generation import Generation
from stages.validate.asking import Question, question
from stages.validate.choosing import chosen
from stages.validate.classifying import check_labels, classified
from stages.validate.continuing import continued
from stages.validate.embedding import VECTORS, check_pairs, compared, embedded, sound
from stages.validate.params import check_beams
from stages.validate.spanning import check_contexts, spans_of
from stages.validate.tagging import check_tags, tags_of
from stages.validate.text import of_engine
from stages.validate.typed_otherwise import by_variant, with_variants
from stages.validate.variants import variant
from stages.validate.written import translated

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from stages.validate.params import ValidateParams

_Ask = Callable[[list[Question], Answerer, Answerer | None], list[Document]]
TOGETHER = 32
"""Items of a group: a model that keeps what it read answers so many nearly as fast as one."""
TAKEN = {
    "generate": frozenset({"answers", "choices", "instructions", "question", "translate", "summarize", HARNESS}),
    "translate": frozenset({"translate", "summarize"}),
    "classify": frozenset({"classify"}),
    "tag": frozenset({"tag"}),
    "answer": frozenset({"question"}),
    "choose": frozenset({"choices"}),
    "embed": frozenset({"similarity", "retrieval"}),
}
"""What a model is for -> the items that can be put to it."""


@dataclass(frozen=True)
class Questions:
    """A set of items, in groups.

    Attributes:
        order: the names of the items as they are written, whose documents the report has.
        own: measures that other packages bring.
        varied: variant -> name of an item -> name of what it is asked as; its groups come last.
    """

    groups: list[list[Question]]
    order: list[str]
    ask: _Ask
    about: Mapping[str, Any]
    seen: tuple[Path, ...]
    task: str
    varied: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    units: str = "groups of items"

    def __len__(self) -> int:
        """How many groups are asked; each by itself."""
        return len(self.groups)

    def scorer(self, judged: Answerer, dense: Answerer | None) -> Callable[[range], Iterator[list[Document]]]:
        """Returns a range of groups -> the documents of each one's items."""

        def score(span: range) -> Iterator[list[Document]]:
            for group in self.groups[span.start : span.stop]:
                yield self.ask(group, judged, dense if self._written(group) else None)

        return score

    def read(self, data: bytes, span: range, *, paired: bool) -> list[list[Document]] | None:
        """The documents of a range of groups as they were written, None unless they are of exactly these."""
        try:
            found: list[list[Document]] = json.loads(data)
            names = [[str(one["id"]) for one in unit] for unit in found]
            written = [self._written(group) for group in self.groups[span.start : span.stop]]
            sound = all(
                _is_sound(one, paired=paired and own) for unit, own in zip(found, written, strict=True) for one in unit
            )
        except (ValueError, TypeError, KeyError):
            return None
        expected = [[one.name for one in group] for group in self.groups[span.start : span.stop]]
        return found if sound and names == expected else None

    def report(self, units: list[list[Document]]) -> dict[str, Any]:
        """What report.json says of all items."""
        by_name = {one["id"]: one for unit in units for one in unit}
        if self.task == "embed":
            by_name = compared(by_name, self.order)
        told = self._told()
        documents = [by_name[name] | {"leaked": int(name in told)} for name in self.order]
        documents = with_variants(documents, self.varied, by_name)
        asked = {one.name: one.item for group in self.groups for one in group}
        documents = [one | scored(self.own, one["answer"], asked[one["id"]]) for one in documents]
        found = {"items": True, **self.about, "documents": documents, "measures": summary(documents)}
        return found | by_slice(documents) | by_variant(documents, [*self.varied])

    def _written(self, group: list[Question]) -> bool:
        """Whether a group is asked as it is written: what is typed otherwise is not held against a baseline."""
        return group[0].name in self._names

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.order)

    def _told(self) -> set[str]:
        """Items that stand with their answers in the text that made the model what it is."""
        written = [one for group in self.groups if self._written(group) for one in group]
        names, items = {one.item.id: one.name for one in written}, [one.item for one in written]
        found = set[str]()
        for corpus in self.seen:
            for path in (corpus / f"{split}.jsonl" for split in ("calibrate", "train")):
                # A window holds text of one source, of passages that follow each other.
                every = groupby(passages(corpus, path.stem) if path.is_file() else (), lambda one: one.get("source"))
                for _, some in every:
                    text = [(one["id"], passage_text(one)) for one in some]
                    found.update(item for item, _ in (*leaks(items, text), *leaks_across(items, text)))
        return {names[item] for item in found}

    def metrics(self, documents: list[Document]) -> Metrics:
        """Figures beside the measures."""
        return {"items": float(len(documents))}


def questions_of(params: ValidateParams, inputs: Mapping[str, Path], progress: Progress | None = None) -> Questions:
    """The items of a set, as the model reads them; those that it cannot read in whole are left out, and said.

    Raises:
        StageError: the model continues no text, or reads none of the items.
    """
    config, tokenizer = load_config(inputs["model"]), load_tokenizer(inputs["model"])
    task = tasks.task(config)
    pooled = (
        pooling(inputs["model"], *([inputs["baseline"]] if "baseline" in inputs else []))
        if task == "embed"
        else Pooling()
    )
    limits = (reads(inputs["model"], config), of_engine(inputs["model"]), pooled.most)
    most = min((one for one in limits if one is not None), default=None)
    items = list(islice(read_items(inputs["text"], params.split), params.items))
    check_task(task, {one.task for one in items})
    check_beams(params, task)
    if task == "answer":
        check_contexts(items)
    found = [question(one, tokenizer, most, task) for one in items]
    asked = [one for one in found if one is not None]
    if missing := [item.id for item, one in zip(items, found, strict=True) if one is None]:
        what = f"{len(missing)} of {len(items)} items are more than the {most} tokens that it reads"
        if not asked:
            raise StageError("the model can read none of the items", measured=what, remedy="Take shorter ones.")
        if progress:
            progress.note(f"{what}, and are left out: {missing[0]} is the first")
    groups, varied = _grouped(asked), dict[str, dict[str, str]]()
    for kind in params.variants:
        typed = [(one, variant(one.item, kind)) for one in asked]
        read = [(one, question(other, tokenizer, most, task)) for one, other in typed if other]
        others = [(one, other) for one, other in read if other]
        varied[kind] = {one.name: other.name for one, other in others}
        groups += _grouped([other for _, other in others])
    seen = tuple(folder for role, folder in inputs.items() if role.startswith("seen."))
    record = json.loads((inputs["text"] / "corpus.json").read_text(encoding="utf-8"))
    about: dict[str, Any] = {"vocabulary": config.get_text_config().vocab_size}
    about["shipped"] = bool(record.get("shipped"))
    if missing:
        about["left_out"] = missing
    # Of a set in which all is answered a model need not know how to say that something is not. All of it counts: a step
    # that is asked some of the items is asked them alike.
    silent = any(one.task == "question" and not one.answers for one in read_items(inputs["text"], params.split))
    if task == "embed":
        check_pairs(asked)
        ask: _Ask = partial(embedded, pooled)
    else:
        ask = _asking(task, config, tokenizer, asked, partial(spans_of, tokenizer, most, silent), params.beams)
    return Questions(groups, [one.name for one in asked], ask, about, seen, task, varied, params.own)


def _grouped(asked: list[Question]) -> list[list[Question]]:
    """Questions of like lengths side by side."""
    apart = sorted(range(len(asked)), key=lambda number: (len(asked[number].ids), number))
    return [[asked[one] for one in apart[start : start + TOGETHER]] for start in range(0, len(asked), TOGETHER)]


def _asking(
    task: str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    spans: _Ask,
    beams: int | None,
) -> _Ask:
    """How a model of a task is put some items, once these are seen to fit it; `spans` is how one of `answer` is."""
    match task:
        case "classify":
            check_labels(config, asked)
            return partial(classified, config)
        case "tag":
            check_tags(config, asked)
            return partial(tags_of, config, tokenizer)
        case "answer":
            return spans
        case "choose":
            return partial(chosen, tokenizer)
        case "translate":
            return partial(translated, tokenizer, Generation(beams=beams))
        case _:
            return partial(continued, tokenizer)


def check_task(task: str, asked: Collection[str]) -> None:
    """Raise StageError where what a model is for is not what the items ask."""
    taken = TAKEN.get(task, frozenset())
    if not taken or not taken.issuperset(asked):
        items = f", the items are of {', '.join(sorted(asked))}" if asked else ""
        raise StageError(
            "the items ask what the model is not for" if taken else "no items can be put to such a model",
            measured=f"its task is {task}{items}",
            limit="; ".join(f"{', '.join(sorted(of))} for one that is to {name}" for name, of in TAKEN.items()),
            remedy="Take the set of items out of `judge`, or judge such a model on text.",
        )


def passage_text(passage: Mapping[str, Any]) -> str:
    """What a passage says, a conversation as well."""
    return str(passage["text"]) if "text" in passage else plain_text(passage["messages"])


def _is_sound(one: Document, *, paired: bool) -> bool:
    if VECTORS in one:
        return sound(one) and (not paired or math.isfinite(one["cosine"]))
    sums = [one[key] for key in ("repeated", "tokens", *(["kl"] if paired else []))]
    numbers = [value for value in one.values() if isinstance(value, int | float)]
    return all(math.isfinite(number) for number in [*sums, *numbers]) and isinstance(one["answer"], str)
