"""A corpus split as token windows: passages joined in order, cut into equal lengths.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stages.runtime.contract import StageError

SPLITS = ("calibrate", "train", "validate", "test")


def passages(corpus: Path, split: str) -> Iterator[str]:
    """The texts of one split, in order. Each line of `<split>.jsonl` is `{"id": ..., "text": ...}`.

    Raises:
        StageError: the corpus has no such split.
    """
    path = corpus / f"{split}.jsonl"
    if not path.is_file():
        have = ", ".join(sorted(p.stem for p in corpus.glob("*.jsonl") if p.stem in SPLITS))
        raise StageError(
            f"the corpus has no split {split!r}", measured=have or "none", remedy="Give the split a share in `splits`."
        )
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and behind every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def windows(
    corpus: Path, split: str, tokenizer: PreTrainedTokenizerBase, tokens: int, *, most: int | None = None
) -> Tensor:
    """Token windows of a split.

    Args:
        corpus: folder of a CORPUS artifact.
        split: calibrate, train, validate or test.
        tokenizer: the model's own.
        tokens: T, the length of a window.
        most: at most this many windows, the first ones; None for all.

    Returns:
        ids_NT (int64). The last, shorter piece is left out.

    Raises:
        StageError: the split is shorter than one window.
    """
    ids: list[int] = []
    for text in passages(corpus, split):
        ids += tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
        if most is not None and len(ids) >= most * tokens:
            break
    count = len(ids) // tokens if most is None else min(most, len(ids) // tokens)
    if count == 0:
        raise StageError(
            f"split {split!r} is shorter than one window",
            measured=f"{len(ids)} tokens",
            limit=f"{tokens} tokens",
            remedy="Give the split a larger share, use more text or shorter windows.",
        )
    return torch.tensor(ids[: count * tokens], dtype=torch.int64).view(count, tokens)
