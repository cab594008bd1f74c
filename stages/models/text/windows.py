"""A corpus split as token windows: passages of one source joined in order, cut into equal lengths, sources in turn.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stages.models.text.text_ends import pair_ends, special_ends
from stages.models.text.token_ids import chat_template, conversation_ids, plain_text, spelt_words, text_ids
from stages.runtime.contract import Progress, StageError

SPLITS = ("calibrate", "train", "validate", "test")
_ITEMS = "items"
"""A corpus whose record has this key is asked, see `stages.measures.items`, which lies above this room."""
QUESTION_TOKENS = 12
"""Of a text without questions, the tokens at its beginning that stand for one."""


def check_split(known: Mapping[str, Any], split: str, role: str = "text") -> None:
    """Raise StageError where a text that will be read is known to have no such split; see `stages.admission`."""
    if (have := known.get(role)) is not None and split not in have:
        raise _without(split, have)


def _without(split: str, have: Collection[str]) -> StageError:
    return StageError(
        f"the corpus has no split {split!r}",
        measured=", ".join(sorted(have)) or "none",
        remedy="Give the split a share in `splits`. A set of items has validate and test alone: name a `corpus`.",
    )


def passages(corpus: Path, split: str) -> Iterator[dict[str, Any]]:
    """The passages of one split, in order: `{"id", "text"}`, or `{"id", "messages": [{"role", "content"}]}`.

    Raises:
        StageError: the corpus has no such split, or is a set of items.
    """
    if _ITEMS in _record(corpus):
        raise StageError(
            "a set of items is asked, not read: nothing may calibrate or train on it, and it has no windows",
            measured="a corpus of items",
            limit="a corpus of text",
            remedy="Name a step of `corpus` where this step reads text.",
        )
    path = corpus / f"{split}.jsonl"
    if not path.is_file():
        raise _without(split, [p.stem for p in corpus.glob("*.jsonl") if p.stem in SPLITS])
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


class Each(int):
    """So many windows of each source."""


@dataclass(frozen=True)
class Windows:
    """Windows of a split.

    Attributes:
        ids_NT: int64.
        names: of the source of each; empty where the corpus has one source.
    """

    ids_NT: Tensor
    names: tuple[str, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """The names where there are windows of several sources; nothing where there are not."""
        return self.names if len(set(self.names)) > 1 else ()


def windows(
    corpus: Path,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    *,
    most: int | None = None,
    progress: Progress | None = None,
    task: str = "",
) -> Tensor:
    """The windows of `sliced_windows` alone: ids_NT, int64."""
    return sliced_windows(corpus, split, tokenizer, tokens, most=most, progress=progress, task=task).ids_NT


def sliced_windows(
    corpus: Path,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    *,
    most: int | None = None,
    progress: Progress | None = None,
    task: str = "",
) -> Windows:
    """Token windows of a split. Each begins and ends as the tokenizer begins and ends a text, and is text in between.

    A window holds text of one source alone. However many are taken, they are a mix of the sources by their shares.
    Of a model that finds answers (`answer`) a window is a question and its context: of a conversation what is said
    first and what follows, of other text its first tokens and the rest.

    Args:
        corpus: folder of a CORPUS artifact.
        split: calibrate, train, validate or test.
        tokenizer: the model's own.
        tokens: T, the length of a window.
        most: at most this many windows, the first ones, of all or of Each source; None for all.
        progress: told where conversations are read as plain text, for want of a chat template, and which source has
            no window.
        task: what the model is for; empty for one that reads text as it stands.

    Returns:
        The windows. The last, shorter piece of each source is left out.

    Raises:
        StageError: the split is shorter than one window, or a window has no room for text.
    """
    ends = pair_ends(tokenizer) if task == "answer" else special_ends(tokenizer)
    added = sum(map(len, ends))
    room = tokens - added
    if room < len(ends) - 1:
        raise StageError(
            "a window has no room for text between what the tokenizer begins and ends it with",
            measured=f"{tokens} tokens",
            limit=f"{added + len(ends) - 1} tokens",
            remedy="Make the windows longer.",
        )
    shares, read = _shares(corpus), _Reading(corpus, split, tokenizer, room, progress, task)
    streams = {name: _cut(read.pieces(name), ends, room) for name in shares}
    found, names = _interleaved(streams, shares, most)
    if not found:
        left = sum(len(piece.ids) for name in shares for piece in read.pieces(name))
        raise StageError(
            f"split {split!r} is shorter than one window",
            measured=f"{left} tokens",
            limit=f"{room} tokens",
            remedy="Give the split a larger share, use more text or shorter windows.",
        )
    for name in sorted(shares.keys() - set(names)):
        if progress and next(streams[name], None) is None:
            progress.note(f"source {name} has no window of {tokens} tokens in split {split!r}")
    return Windows(torch.tensor(found, dtype=torch.int64), tuple(names))


def _shares(corpus: Path) -> dict[str, float]:
    """Source -> its share of the characters; without a name where there is one source."""
    sources = _record(corpus).get("sources")
    return {name: float(one["share"]) for name, one in sources.items()} if sources else {"": 1.0}


def _interleaved(
    streams: Mapping[str, Iterator[list[int]]], shares: Mapping[str, float], most: int | None
) -> tuple[list[list[int]], list[str]]:
    """Windows in turn, each of the source that lags its share most, while it has any."""
    got, left, each = dict.fromkeys(shares, 0), dict(shares), isinstance(most, Each)
    found: list[list[int]] = []
    names: list[str] = []
    while left and (each or len(found) != most):
        name = max(left, key=lambda one: left[one] * (len(found) + 1) - got[one])
        ids = None if each and got[name] == most else next(streams[name], None)
        if ids is None:
            del left[name]
            continue
        found.append(ids)
        names.append(name)
        got[name] += 1
    return found, names


def _cut(pieces: Iterator[_Piece], ends: Sequence[Sequence[int]], room: int) -> Iterator[list[int]]:
    """Each window: pieces in order, of which those that have a beginning of their own begin a window.

    Where what is left of a window is too short for such a piece, its beginning fills that, and it stands whole in the
    next one.
    """
    prefix, ids, asked = list(ends[0]), list[int](), 0
    for piece in pieces:
        if piece.begins and ids and len(ids) + len(piece.ids) > room:
            yield _whole(ends, (ids + piece.ids)[:room], asked)
            ids = []
        asked = asked if ids else piece.asked
        ids += piece.ids
        start = 0
        while True:
            if prefix and ids[start : start + len(prefix)] == prefix:
                start += len(prefix)  # a chat template begins a conversation itself
            if len(ids) - start < room:
                break
            yield _whole(ends, ids[start : start + room], asked)
            start, asked = start + room, 0
        del ids[:start]


def _whole(ends: Sequence[Sequence[int]], ids: list[int], asked: int) -> list[int]:
    """A window: its text between two ends; between three a question, as long as is known, and the text after it."""
    if len(ends) == 2:
        return [*ends[0], *ids, *ends[1]]
    at = min(asked or QUESTION_TOKENS, len(ids) // 2)
    return [*ends[0], *ids[:at], *ends[1], *ids[at:], *ends[2]]


@dataclass(frozen=True)
class _Piece:
    """The ids of one passage.

    Attributes:
        ids: of its text.
        begins: a model reads them from the beginning of a window.
        asked: so many of them are a question about the others.
    """

    ids: list[int]
    begins: bool
    asked: int = 0


class _Reading:
    """The passages of a split as a tokenizer writes them for a model of some task."""

    def __init__(
        self,
        corpus: Path,
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        room: int,
        progress: Progress | None,
        task: str,
    ) -> None:
        self._corpus, self._split, self._tokenizer = corpus, split, tokenizer
        self._room, self._progress, self._task = room, progress, task
        self._template = chat_template(tokenizer)
        self._spelt = None if _record(corpus).get("control_tokens") == "parse" else spelt_words(tokenizer)

    def pieces(self, source: str) -> Iterator[_Piece]:
        """Those of one source; control tokens are where a chat template puts them, or where the corpus wants them."""
        for passage in passages(self._corpus, self._split):
            if source and passage.get("source") != source:
                continue
            begins = bool(passage.get("begins"))
            if "messages" not in passage:
                yield _Piece(self._ids(passage["text"]), begins)
            elif self._task == "answer":
                yield self._question(passage["messages"])
            elif self._task == "translate":
                # What is answered is the decoder's: an encoder reads what is asked.
                asked = [one for one in passage["messages"] if one["role"] != "assistant"]
                yield _Piece(self._ids(plain_text(asked)), begins)
            elif self._template:
                ids = conversation_ids(
                    self._tokenizer,
                    self._template,
                    passage["messages"],
                    passage["id"],
                    parsed=self._spelt is None,
                )
                yield _Piece(ids, begins or len(ids) <= self._room)
            else:
                if self._progress:
                    self._progress.note("the tokenizer has no chat template: conversations are read as plain text")
                    self._progress = None
                yield _Piece(self._ids(plain_text(passage["messages"])), begins)

    def _question(self, messages: list[dict[str, str]]) -> _Piece:
        asked, rest = (
            text_ids(self._tokenizer, messages[0]["content"], self._spelt),
            self._ids(plain_text(messages[1:])),
        )
        return _Piece(asked + rest, len(asked) + len(rest) <= self._room, len(asked))

    def _ids(self, text: str) -> list[int]:
        return text_ids(self._tokenizer, f"{text}\n\n", self._spelt)


def _record(corpus: Path) -> dict[str, Any]:
    path = corpus / "corpus.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
