"""A corpus split as token windows: passages of one source joined in order, cut into equal lengths, sources in turn.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stages.models.text.token_ids import chat_template, conversation_ids, plain_text, spelt_words, text_ids
from stages.runtime.contract import Progress, StageError

SPLITS = ("calibrate", "train", "validate", "test")
_ITEMS = "items"
"""A corpus whose record has this key is asked, see `stages.measures.items`, which lies above this room."""
_WORDS = ("the", "a", "0")
"""Asked in turn, then the vocabulary's own: one that knows no character of a word may say nothing."""


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
) -> Tensor:
    """The windows of `sliced_windows` alone: ids_NT, int64."""
    return sliced_windows(corpus, split, tokenizer, tokens, most=most, progress=progress).ids_NT


def sliced_windows(
    corpus: Path,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    *,
    most: int | None = None,
    each: int | None = None,
    progress: Progress | None = None,
) -> Windows:
    """Token windows of a split. Each begins and ends as the tokenizer begins and ends a text, and is text in between.

    A window holds text of one source alone. However many are taken, they are a mix of the sources by their shares.

    Args:
        corpus: folder of a CORPUS artifact.
        split: calibrate, train, validate or test.
        tokenizer: the model's own.
        tokens: T, the length of a window.
        most: at most this many windows, the first ones; None for all.
        each: at most this many of each source, its first ones; None for all.
        progress: told where conversations are read as plain text, for want of a chat template, and which source has
            no window.

    Returns:
        The windows. The last, shorter piece of each source is left out.

    Raises:
        StageError: the split is shorter than one window, or a window has no room for text.
    """
    prefix, suffix = special_ends(tokenizer)
    room = tokens - len(prefix) - len(suffix)
    if room < 1:
        raise StageError(
            "a window has no room for text between what the tokenizer begins and ends it with",
            measured=f"{tokens} tokens",
            limit=f"{len(prefix) + len(suffix) + 1} tokens",
            remedy="Make the windows longer.",
        )
    shares, read = _shares(corpus), _Reading(corpus, split, tokenizer, room, progress)
    streams = {name: _cut(read.pieces(name), prefix, room) for name in shares}
    found, names = _interleaved(streams, shares, most, each)
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
    return Windows(torch.tensor([[*prefix, *ids, *suffix] for ids in found], dtype=torch.int64), tuple(names))


def _shares(corpus: Path) -> dict[str, float]:
    """Source -> its share of the characters; without a name where there is one source."""
    sources = _record(corpus).get("sources")
    return {name: float(one["share"]) for name, one in sources.items()} if sources else {"": 1.0}


def _interleaved(
    streams: Mapping[str, Iterator[list[int]]], shares: Mapping[str, float], most: int | None, each: int | None
) -> tuple[list[list[int]], list[str]]:
    """Windows in turn, each of the source that lags its share most, while it has any."""
    got, left = dict.fromkeys(shares, 0), dict(shares)
    found: list[list[int]] = []
    names: list[str] = []
    while left and len(found) != most:
        name = max(left, key=lambda one: left[one] * (len(found) + 1) - got[one])
        ids = None if got[name] == each else next(streams[name], None)
        if ids is None:
            del left[name]
            continue
        found.append(ids)
        names.append(name)
        got[name] += 1
    return found, names


def _cut(pieces: Iterator[_Piece], prefix: list[int], room: int) -> Iterator[list[int]]:
    """The text of each window: pieces in order, of which those that have a beginning of their own begin a window.

    Where what is left of a window is too short for such a piece, its beginning fills that, and it stands whole in the
    next one.
    """
    ids: list[int] = []
    for piece in pieces:
        if piece.begins and ids and len(ids) + len(piece.ids) > room:
            yield (ids + piece.ids)[:room]
            ids = []
        ids += piece.ids
        start = 0
        while True:
            if prefix and ids[start : start + len(prefix)] == prefix:
                start += len(prefix)  # a chat template begins a conversation itself
            if len(ids) - start < room:
                break
            yield ids[start : start + room]
            start += room
        del ids[:start]


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after every text, found by asking it.

    Returns:
        ids before and ids after; both empty for a tokenizer that adds nothing.
    """
    for word in chain(_WORDS, _own_words(tokenizer)):
        bare = list(tokenizer(word, add_special_tokens=False)["input_ids"])
        whole = list(tokenizer(word)["input_ids"])
        if bare:
            break
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise StageError(
        "the tokenizer writes a word otherwise where it adds special tokens",
        measured=f"{whole} for {word!r}",
        limit=f"{bare} within",
        remedy="Take a checkpoint whose tokenizer adds special tokens around a text only.",
    )


def _own_words(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    special = set(tokenizer.all_special_ids)
    for one in range(len(tokenizer)):
        if one not in special:
            yield str(tokenizer.decode([one]))


@dataclass(frozen=True)
class _Piece:
    """The ids of one passage, and whether a model reads them from the beginning of a window."""

    ids: list[int]
    begins: bool


class _Reading:
    """The passages of a split as a tokenizer writes them."""

    def __init__(
        self, corpus: Path, split: str, tokenizer: PreTrainedTokenizerBase, room: int, progress: Progress | None
    ) -> None:
        self._corpus, self._split, self._tokenizer = corpus, split, tokenizer
        self._room, self._progress = room, progress
        self._template = chat_template(tokenizer)
        self._spelt = None if _record(corpus).get("control_tokens") == "parse" else spelt_words(tokenizer)

    def pieces(self, source: str) -> Iterator[_Piece]:
        """Those of one source; control tokens are where a chat template puts them, or where the corpus wants them."""
        for passage in passages(self._corpus, self._split):
            if source and passage.get("source") != source:
                continue
            begins = bool(passage.get("begins"))
            if "messages" not in passage:
                yield _Piece(text_ids(self._tokenizer, f"{passage['text']}\n\n", self._spelt), begins)
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
                yield _Piece(text_ids(self._tokenizer, f"{plain_text(passage['messages'])}\n\n", self._spelt), begins)


def _record(corpus: Path) -> dict[str, Any]:
    path = corpus / "corpus.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
