"""Zeros that `prune` put into single weights: they are the mask, and each later stage counts them.

`zeros.json` says in which weights, by their names in the model, and how many. Where they stand the weights say: what is
zero in a checkpoint that comes has to be zero in the one that is written.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.sparsity import is_sparse
from stages.models.checkpoint.filling import PRUNED
from stages.models.checkpoint.json_files import read_json, write_json
from stages.models.checkpoint.layout import ZEROS, carry
from stages.models.checkpoint.loading import load_model
from stages.models.layers.quantized_linear import QuantizedLinear
from stages.models.memory.pages import forget
from stages.runtime.contract import Metrics, StageError


def is_pruned(weight: Tensor) -> bool:
    """Whether zeros were put into a weight: its checkpoint says so, or it has more than chance and rounding leave."""
    return hasattr(weight, PRUNED) or is_sparse(weight.detach())


def carried(before: Path, written: PreTrainedModel, after: Path) -> Metrics:
    """Put what says which weights were pruned beside what was written from them, and count zeros; see `counted`.

    Raises:
        StageError: a weight stands where a zero came.
    """
    found = counted(before, written, filled=False)
    carry(before, after, (ZEROS,))
    return found


def anew(before: Path, written: PreTrainedModel, after: Path) -> Metrics:
    """Say how many zeros the pruned weights have in the written checkpoint; see `counted`."""
    found = counted(before, written)
    if found:
        save(written, read_json(before / ZEROS), after)
    return found


def save(written: PreTrainedModel, names: Iterable[str], folder: Path) -> None:
    """Write how many zeros the weights of these names have, but for those that have none."""
    maps = _maps(written)
    zeros = {name: _zeros(maps[name]) for name in names if name in maps}
    write_json(folder / ZEROS, {name: count for name, count in zeros.items() if count})


def counted(before: Path, written: PreTrainedModel, *, filled: bool = True) -> Metrics:
    """Zeros of the pruned weights as they came, and in the written checkpoint; nothing where none was pruned.

    Args:
        before: folder of the checkpoint that came.
        written: the model of the one that was written. A map that is no dense one any more has no zeros.
        filled: whether zeros may be gone.

    Raises:
        StageError: they may not, and a weight stands where a zero came; or fewer came than were put there.
    """
    put = read_json(before / ZEROS, optional=True)
    came, stand = (_maps(load_model(before, dtype=None)), _maps(written)) if put else ({}, {})
    zeros_before = zeros = 0
    for name, least in put.items():
        old, new = came[name], stand.get(name)
        old_OI = _values(old)
        if (here := int((old_OI == 0).sum())) < least:
            raise StageError(
                f"{name} of {before} has not the zeros that {ZEROS} says",
                measured=f"{here} zeros",
                limit=f"{least} or more",
                remedy=f"Prune again; or, if it was trained since and is to be dense, delete {before / ZEROS}.",
            )
        zeros_before += here
        wrong = None if new is None or _shape(new) != _shape(old) else _standing(new, old_OI)
        if wrong != 0 and not filled:
            raise StageError(
                f"{name} lost zeros that were put there",
                measured="another map stands in its place" if wrong is None else f"{wrong} weights too many",
                limit="0 weights too many",
                remedy="This is a defect: please report it with the recipe.",
            )
        zeros += 0 if new is None or wrong is None else _zeros(new)
        forget(old.weight)
    return {"zeros_before": float(zeros_before), "zeros": float(zeros)} if put else {}


def _maps(model: nn.Module) -> dict[str, nn.Linear | QuantizedLinear]:
    """The linear maps by the names of their weights."""
    named = model.named_modules(remove_duplicate=False)
    return {f"{path}.weight": one for path, one in named if isinstance(one, nn.Linear | QuantizedLinear)}


def _shape(one: nn.Linear | QuantizedLinear) -> tuple[int, int]:
    return one.out_features, one.in_features


def _values(one: nn.Linear | QuantizedLinear) -> Tensor:
    return one.values() if isinstance(one, QuantizedLinear) else one.weight.detach()


def _zeros(one: nn.Linear | QuantizedLinear) -> int:
    count = int((_values(one) == 0).sum())
    forget(one.weight)  # else all of a large model's maps would be in memory at once
    return count


def _standing(one: nn.Linear | QuantizedLinear, old_OI: Tensor) -> int:
    """Weights where a zero came."""
    return int(((_values(one) != 0) & (old_OI == 0)).sum())
