"""A corpus split as token windows: passages joined in order, cut into equal lengths.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
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


def windows(
    corpus: Path,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    *,
    most: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Token windows of a split. Each begins and ends as the tokenizer begins and ends a text, and is text in between.

    Args:
        corpus: folder of a CORPUS artifact.
        split: calibrate, train, validate or test.
        tokenizer: the model's own.
        tokens: T, the length of a window.
        most: at most this many windows, the first ones; None for all.
        progress: told where conversations are read as plain text, for want of a chat template.

    Returns:
        ids_NT (int64). The last, shorter piece is left out.

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
    ids: list[int] = []
    found: list[list[int]] = []
    for piece in _pieces(corpus, split, tokenizer, progress):
        ids += piece
        start = 0
        while len(found) != most:
            if prefix and ids[start : start + len(prefix)] == prefix:
                start += len(prefix)  # a chat template begins a conversation itself
            if len(ids) - start < room:
                break
            found.append([*prefix, *ids[start : start + room], *suffix])
            start += room
        del ids[:start]
        if len(found) == most:
            break
    if not found:
        raise StageError(
            f"split {split!r} is shorter than one window",
            measured=f"{len(ids)} tokens",
            limit=f"{room} tokens",
            remedy="Give the split a larger share, use more text or shorter windows.",
        )
    return torch.tensor(found, dtype=torch.int64)


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


def _pieces(
    corpus: Path, split: str, tokenizer: PreTrainedTokenizerBase, progress: Progress | None
) -> Iterator[list[int]]:
    """The ids of each passage; control tokens are where a chat template puts them, or where the corpus wants them."""
    spelt = None if _parsed(corpus) else spelt_words(tokenizer)
    template = chat_template(tokenizer)
    for passage in passages(corpus, split):
        if "messages" not in passage:
            text = passage["text"]
        elif template:
            yield conversation_ids(tokenizer, template, passage["messages"], passage["id"], parsed=spelt is None)
            continue
        else:
            if progress:
                progress.note("the tokenizer has no chat template: conversations are read as plain text")
                progress = None
            text = plain_text(passage["messages"])
        yield text_ids(tokenizer, f"{text}\n\n", spelt)


def _parsed(corpus: Path) -> bool:
    """Whether words that look like control tokens are parsed as such."""
    return _record(corpus).get("control_tokens") == "parse"


def _record(corpus: Path) -> Mapping[str, Any]:
    path = corpus / "corpus.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
