"""Paragraphs without duplicates, passages of them, and passages dealt to splits by share.

A *paragraph* stands between blank lines; a *passage* is a run of consecutive paragraphs of one document and goes to one
split whole. A conversation is one passage; what many have in common, as a system's words, may stand in two splits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any

from stages.adapters import texts
from stages.algorithms.prefix_filter import first_of_each, shingles
from stages.corpus.params import CorpusParams
from stages.measures.items import Item
from stages.measures.leaks import leaks, leaks_across
from stages.runtime import rows
from stages.runtime.contract import Progress, StageError

SHORT_WORDS = 8
"""Shorter paragraphs are duplicates only when equal: three words in common say too little."""
_SHINGLE_WORDS = 3
_WORDS = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\\s\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]+")
"""What stands between white space; of scripts without it each character."""
_LONGEST = 4
"""A paragraph of more than so many passages is taken apart."""


@dataclass(frozen=True)
class Source:
    """What was read of one source.

    Attributes:
        name: of its passages; empty for the only source.
        share: of the characters of every split.
        documents: its texts and conversations.
        digest: the identity of its content.
        nulls: rows that have nothing where their text should stand.
        written: what is known of text that a model wrote; empty of any other. Each such text is one passage.
    """

    name: str
    share: float
    documents: Sequence[texts.Document]
    digest: str
    nulls: int = 0
    written: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Passage:
    """A run of consecutive paragraphs of one document, or a conversation.

    Attributes:
        name: unique in the corpus.
        text: what it says.
        messages: of a conversation.
        source: name of its source; empty for the only one.
        begins: a model reads it from its beginning, since one wrote it from there.
    """

    name: str
    text: str
    messages: tuple[rows.Message, ...] = ()
    source: str = ""
    begins: bool = False

    def line(self) -> str:
        """Its line of a split."""
        said: dict[str, Any] = {"id": self.name}
        if self.source:
            said["source"] = self.source
        if self.messages:
            said["messages"] = [asdict(one) for one in self.messages]
        else:
            said["text"] = self.text
        return json.dumps(said | ({"begins": True} if self.begins else {}), ensure_ascii=False)


@dataclass(frozen=True)
class Dealt:
    """The passages of every split, a source's after another's, and how much was left out.

    Attributes:
        splits: name -> its passages.
        duplicates: paragraphs that stand elsewhere.
        telling: passages that tell an item with its answer.
    """

    splits: dict[str, list[Passage]]
    duplicates: int
    telling: int


def dealt(sources: Sequence[Source], params: CorpusParams, items: Sequence[Item], progress: Progress) -> Dealt:
    """Deal what the sources hold.

    A paragraph that stands in two sources is the first one's. A passage that tells any of the items is out, and so is
    one that does with the passage that is read before it. Of several sources as much is taken of each as its share of a
    mix is that none is too short for.

    Raises:
        StageError: there is no text, or nothing of a source is left for a split.
    """
    kept, removed = _without_duplicates(sources, params)
    every = [list(_passages(one, paragraphs, params)) for one, paragraphs in zip(sources, kept, strict=True)]
    told = {passage for _, passage in leaks(items, ((p.name, p.text) for found in every for p in found))}
    passages = [[p for p in found if p.name not in told] for found in every]
    for one, found in zip(sources, passages, strict=True):
        if not found:
            what = f"source {one.name} has no text of its own" if one.name else "the corpus is empty"
            measured, remedy = "0 paragraphs", "Give a source with text."
            if told:
                measured = f"0 passages, since {len(told)} tell items with their answers"
                remedy = "Give a text that does not hold the items that a model is judged by."
            raise StageError(what, measured=measured, limit=1, remedy=remedy)
    parts, shortest = _taken(sources, passages, progress)
    splits: dict[str, list[Passage]] = {str(name): [] for name in params.splits}
    for number, (found, part) in enumerate(zip(passages, parts, strict=True)):
        given = _dealt(found, {str(name): share * part for name, share in params.splits.items()})
        # Where all of it would do, it is the source that it is cut for that is too small.
        whole = _dealt(found, {str(name): share for name, share in params.splits.items()})
        at = shortest if all(whole.values()) else number
        _check_dealt(given, sources[at].name, len(passages[at]), params)
        for name, share in given.items():
            apart = _apart(share, items)
            told |= {p.name for p in share} - {p.name for p in apart}
            splits[name] += apart
    if told:
        progress.note(f"{len(told)} passages tell items with their answers and are left out: {min(told)} is one")
    return Dealt(splits, removed, len(told))


def _apart(passages: list[Passage], items: Sequence[Item]) -> list[Passage]:
    """Without those that answer what the passage before them asks; it is read before another one then."""
    while told := {name for _, name in leaks_across(items, [(p.name, p.text) for p in passages])}:
        passages = [p for p in passages if p.name not in told]
    return passages


def _without_duplicates(
    sources: Sequence[Source], params: CorpusParams
) -> tuple[list[dict[str, list[texts.Paragraph]]], int]:
    """Of each source each document's paragraphs that stand nowhere earlier, and how many were left out."""
    longest = _LONGEST * params.passage_characters
    parts = [(n, d.name, p) for n, one in enumerate(sources) for d in one.documents for p in texts.parts(d, longest)]
    seen: set[bytes] = set()
    fresh, found = [], []
    for number, name, part in parts:
        words = _WORDS.findall(part.compared.lower())
        same = blake2b(" ".join(words).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if same not in seen:
            seen.add(same)
            fresh.append((number, name, part))
            found.append(shingles(words if len(words) >= SHORT_WORDS else (), _SHINGLE_WORDS))
    kept: list[dict[str, list[texts.Paragraph]]] = [{} for _ in sources]
    keep = first_of_each(found, params.near_duplicate)
    for (number, name, part), alone in zip(fresh, keep, strict=True):
        if alone:
            kept[number].setdefault(name, []).append(part)
    return kept, len(parts) - sum(keep)


def _passages(
    source: Source, documents: Mapping[str, list[texts.Paragraph]], params: CorpusParams
) -> Iterator[Passage]:
    begins = bool(source.written)
    for document, parts in documents.items():
        name = f"{source.name}/{document}" if source.name else document
        if parts[0].messages:
            yield Passage(f"{name}#0", parts[0].text, parts[0].messages, source.name, begins)
            continue
        number, text = 0, ""
        for part in parts:
            if text and not begins and len(text) + len(part.text) > params.passage_characters:
                yield Passage(f"{name}#{number}", text, source=source.name)
                number, text = number + 1, ""
            text += (part.glue if text else "") + part.text
        yield Passage(f"{name}#{number}", text, source=source.name, begins=begins)


def _taken(sources: Sequence[Source], passages: Sequence[list[Passage]], progress: Progress) -> tuple[list[float], int]:
    """The part of each source that its share of the mix is; number of the shortest for its share, which gives all."""
    lengths = [sum(len(passage.text) for passage in found) for found in passages]
    whole = [length / one.share for one, length in zip(sources, lengths, strict=True)]
    mix = min(whole)
    shortest = whole.index(mix)
    parts = [mix / other for other in whole]
    for one, length, part in zip(sources, lengths, parts, strict=True):
        if part < 0.995:  # a difference of less is a passage's
            progress.note(
                f"{(1 - part) * length:,.0f} of the {length:,} characters of source {one.name} are left out: source "
                f"{sources[shortest].name} is too short for its share of {sources[shortest].share:g}"
            )
    return parts, shortest


def _dealt(passages: list[Passage], splits: Mapping[str, float]) -> dict[str, list[Passage]]:
    """Each passage to the split that lags its share of the characters most: every share is met within a passage."""
    shares = dict(splits)
    rest = 1 - sum(shares.values())
    if rest > 1e-9:
        shares[""] = rest
    found: dict[str, list[Passage]] = {name: [] for name in shares}
    got = dict.fromkeys(shares, 0)
    total = 0
    for passage in passages:
        total += len(passage.text)
        behind = max(shares, key=lambda name: shares[name] * total - got[name])
        found[behind].append(passage)
        got[behind] += len(passage.text)
    found.pop("", None)
    return found


def _check_dealt(given: Mapping[str, list[Passage]], source: str, passages: int, params: CorpusParams) -> None:
    empty = [name for name, share in given.items() if not share]
    if empty:
        whose = f"source {source}" if source else "the corpus"
        raise StageError(
            f"{whose} is too small for its splits: nothing is left for {', '.join(empty)}",
            measured=f"{passages} passages",
            limit=f"about {round(1 / min(params.splits.values()))} of {params.passage_characters} characters",
            remedy="Use more text, larger shares or a smaller passage_characters.",
        )
