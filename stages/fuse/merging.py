"""Several checkpoints of one architecture, tensor by tensor and piece by piece, into one.

Shapes: M checkpoints, N elements of a piece.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from stages.algorithms import merging
from stages.models.checkpoint import files
from stages.models.checkpoint.layout import QUANTIZATION, STRUCTURE
from stages.models.checkpoint.loading import load_config, load_tokenizer
from stages.models.checkpoint.subject import Subject
from stages.models.memory.pages import forget
from stages.runtime.contract import StageError

Method = Literal["soup", "slerp", "ties", "dare", "dare_ties"]
PIECE = 1 << 21
"""Elements computed at once: memory does not grow with the tensors."""
_LIKE_ANY = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
"""Fields of a configuration that change no output; ids of special tokens are the generation's."""
_LEARNING = ("dropout", "_pdrop", "layerdrop", "initializer", "init_std", "problem_type", "gradient_checkpointing")
"""Parts of the names of fields that speak of how a model learned."""
_TOKENIZES = ("model", "normalizer", "pre_tokenizer", "added_tokens")


@dataclass(frozen=True)
class Fusion:
    """What is done.

    Attributes:
        method: see `stages.algorithms.merging`.
        weights: one a checkpoint.
        keep: ties: share of the largest changes; dare: share of changes kept by chance.
        scale: factor of the merged change before it is added to the base.
        seed: of dare.
    """

    method: Method
    weights: tuple[float, ...]
    keep: float
    scale: float
    seed: int


@dataclass
class _Seen:
    elements: int = 0
    conflicts: int = 0
    kept: int = 0
    changed: float = 0.0
    before: float = 0.0
    inputs: list[float] = field(default_factory=list)

    def row(self, name: str, against: str) -> dict[str, Any]:
        """A row for the table."""
        row: dict[str, Any] = {
            "tensor": name,
            f"relative_change_of_{against}": (self.changed / self.before) ** 0.5 if self.before else 0.0,
        }
        if against == "base":
            row |= {
                "sign_conflict_share": self.conflicts / max(1, self.elements),
                "kept_share": self.kept / max(1, self.elements),
            }
        return row


@dataclass(frozen=True)
class _Kind:
    """What checkpoints to fuse must have in common; None for what is not known."""

    fields: Mapping[str, Any] | None
    shapes: Mapping[str, Any]
    tokens: Mapping[str, Any] | None


def check_alike(folders: Sequence[Path]) -> None:
    """Raise StageError unless the checkpoints are float models of one architecture and tokenizer, tensor for tensor."""
    for folder in folders:
        for name in (STRUCTURE, QUANTIZATION):
            if (folder / name).is_file():
                raise _changed(name)
    _compare([_Kind(_fields(load_config(one)), files.shapes(one), _tokens(one)) for one in folders])


def check_known(models: Sequence[Subject]) -> None:
    """The same of checkpoints that are not made yet, as far as configurations, shapes and tokenizers say it."""
    for one in models:
        if one.scheme or one.structured:
            raise _changed(QUANTIZATION if one.scheme else STRUCTURE)
    # A GGUF file's configuration and tokenizer are written when it is fetched.
    read = not any(one.folder.is_file() for one in models)
    several = read and len({one.folder for one in models}) > 1
    _compare(
        [
            _Kind(
                _fields(one.model.config) if read else None,
                {name: list(tensor.shape) for name, tensor in one.model.named_parameters()},
                _tokens(one.folder) if several else None,
            )
            for one in models
        ]
    )


def _changed(name: str) -> StageError:
    return StageError(
        f"a checkpoint to fuse has a {name}", remedy="Fuse first, then share, prune unevenly and quantize."
    )


def _compare(kinds: Sequence[_Kind]) -> None:
    first, *others = kinds
    remedy = "Fuse checkpoints that were trained from one and the same."
    for place, one in enumerate(others, start=1):
        fields, theirs = first.fields or {}, one.fields or {}
        if unlike := sorted(name for name in fields.keys() | theirs.keys() if fields.get(name) != theirs.get(name)):
            raise StageError(
                f"checkpoint {place} is of another architecture than the first: {unlike[0]} differs",
                measured=theirs.get(unlike[0]),
                limit=fields.get(unlike[0]),
                remedy=remedy,
            )
        for name in sorted(first.shapes.keys() | one.shapes.keys()):
            if first.shapes.get(name) != one.shapes.get(name):
                raise StageError(
                    f"checkpoint {place} is unlike the first in {name}",
                    measured=one.shapes.get(name, "absent"),
                    limit=first.shapes.get(name, "absent"),
                    remedy=remedy,
                )
        if first.tokens != one.tokens:
            raise StageError(f"checkpoint {place} has another tokenizer than the first", remedy=remedy)


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    found: dict[str, Any] = config.to_dict()
    return {
        name: value
        for name, value in found.items()
        if name not in _LIKE_ANY and not name.endswith("_token_id") and not any(part in name for part in _LEARNING)
    }


def _tokens(folder: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(folder)
    found: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
    with suppress(AttributeError):  # a tokenizer in Python alone has a vocabulary and no more
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        found |= {name: whole.get(name) for name in _TOKENIZES}
    return found


def fuse(
    fusion: Fusion, models: Sequence[Path], base: Path | None, path: Path, advanced: Callable[[float, float], None]
) -> list[dict[str, Any]]:
    """Write the fused weights; a row for each tensor.

    Raises:
        StageError: tensors that are no floats differ between the checkpoints.
        ValueError: the weights do not fit.
    """
    stored = [files.read(folder) for folder in models]
    origin = files.read(base) if base else None
    like, rows, done = stored[0], dict[str, dict[str, Any]](), 0
    total = sum(tensor.numel() for tensor in like.values())
    least = [_least(fusion, one, origin) for one in stored] if origin and fusion.method == "ties" else []

    def parts(name: str) -> Iterator[Tensor]:
        nonlocal done
        given, start = [one[name].reshape(-1) for one in stored], origin[name].reshape(-1) if origin else None
        seen = _Seen()
        if like[name].is_floating_point():
            yield from _pieces(fusion, name, given, start, least, seen)
        elif any(not torch.equal(given[0], one) for one in given[1:]):
            raise StageError(f"{name} holds no floats and differs between the checkpoints", measured=like[name].dtype)
        else:
            yield given[0]
        for one in (*given, *([] if start is None else [start])):
            forget(one)
        rows[name] = seen.row(name, "base" if base else "first")
        done += like[name].numel()
        advanced(done, total)

    files.write_parts(path, {name: (one.dtype, tuple(one.shape)) for name, one in like.items()}, parts)
    return [rows[name] for name in like]


def _pieces(
    fusion: Fusion, name: str, given: Sequence[Tensor], start: Tensor | None, least: Sequence[float], seen: _Seen
) -> Iterator[Tensor]:
    combine = _combination(fusion, name, given, least)
    for first in range(0, len(given[0]), PIECE):
        pieces = [one[first : first + PIECE].float() for one in given]
        origin_N = pieces[0] if start is None else start[first : first + PIECE].float()
        changes = pieces if start is None else [one - origin_N for one in pieces]
        made_N, kept = combine(changes)
        out_N = made_N if start is None else origin_N + fusion.scale * made_N
        out_N = out_N.to(given[0].dtype)
        seen.elements += len(out_N)
        seen.kept += kept
        seen.conflicts += int(merging.conflicts(changes).sum()) if start is not None else 0
        seen.changed += float((out_N.float() - origin_N).double().square().sum())
        seen.before += float(origin_N.double().square().sum())
        yield out_N


Combination = Callable[[Sequence[Tensor]], tuple[Tensor, int]]


def _combination(fusion: Fusion, name: str, given: Sequence[Tensor], least: Sequence[float]) -> Combination:
    """What is done to each piece: -> the merged piece, and how many of its elements some checkpoint changed."""
    if fusion.method == "slerp":
        one, other = _arc(given, fusion.weights)
        return lambda pieces: (one * pieces[0] + other * pieces[1], 0)
    dice = [_generator(fusion.seed, place, name) for place in range(len(given))]
    merge = merging.elected if fusion.method in ("ties", "dare_ties") else merging.soup

    def combine(pieces: Sequence[Tensor]) -> tuple[Tensor, int]:
        if fusion.method == "ties":
            pieces = [merging.trim(one, bar) for one, bar in zip(pieces, least, strict=True)]
        elif fusion.method in ("dare", "dare_ties"):
            pieces = [merging.dare(one, fusion.keep, die) for one, die in zip(pieces, dice, strict=True)]
        made = merge(pieces, fusion.weights)
        return made, int((made != 0).sum())

    return combine


def _arc(given: Sequence[Tensor], weights: Sequence[float]) -> tuple[float, float]:
    products = torch.zeros(3, dtype=torch.float64)
    for first in range(0, len(given[0]), PIECE):
        a_N, b_N = (one[first : first + PIECE].double() for one in given)
        products += torch.stack([a_N @ b_N, a_N @ a_N, b_N @ b_N])
    product, square_a, square_b = products.tolist()
    return merging.arc(product, square_a, square_b, merging.normalized(weights, 2)[1])


def _generator(seed: int, place: int, name: str) -> torch.Generator:
    # Of the name and not of the order, so that a tensor's dice do not depend on what was computed before.
    digest = hashlib.sha256(f"{seed}:{place}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _least(fusion: Fusion, stored: Mapping[str, Tensor], origin: Mapping[str, Tensor]) -> float:
    def changes() -> Iterable[Tensor]:
        for name, tensor in stored.items():
            if not tensor.is_floating_point():
                continue
            mine_N, base_N = tensor.reshape(-1), origin[name].reshape(-1)
            for first in range(0, len(mine_N), PIECE):
                yield mine_N[first : first + PIECE].float() - base_N[first : first + PIECE].float()
            forget(tensor)
            forget(origin[name])

    return merging.threshold(changes, fusion.keep)
