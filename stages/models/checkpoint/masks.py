"""Zeros that `prune` put into single weights: masks travel beside the weights, and each later stage counts the zeros.

`masks.safetensors` holds a bit a weight of each such map, by its name in the model, 1 where a weight stands.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.sparsity import packed, unpacked
from stages.models.checkpoint.layout import MASKS, carry
from stages.models.layers.quantized_linear import QuantizedLinear
from stages.models.memory.pages import forget
from stages.runtime.contract import Metrics, StageError


def carried(before: Path, written: PreTrainedModel, after: Path) -> Metrics:
    """Put the masks that came beside what was written from them, and count zeros; see `counted`.

    Raises:
        StageError: a weight stands where a mask says zero.
    """
    found = counted(before, written, filled=False)
    carry(before, after, (MASKS,))
    return found


def anew(before: Path, written: PreTrainedModel, after: Path) -> Metrics:
    """Write new masks of the maps that had some, of what stands in the written checkpoint; see `counted`."""
    found = counted(before, written)
    if found:
        names = load_file(before / MASKS)
        save({name: _weights(written, name.removesuffix(".weight")) for name in names}, after)
    return found


def save(weights: Mapping[str, Tensor | None], folder: Path) -> None:
    """Write which weights are not zero: a bit each, and the number of columns."""
    maps = {name: w_OI for name, w_OI in weights.items() if w_OI is not None}
    bits: dict[str, Tensor] = {}
    for name, w_OI in maps.items():
        bits[name] = packed(w_OI != 0)
        forget(w_OI)  # else all of a large model's maps would be in memory at once
    # One entry alone: of several the file format leaves the order open.
    columns = json.dumps({name: w_OI.shape[1] for name, w_OI in maps.items()})
    save_file(bits, folder / MASKS, {"columns": columns})


def counted(before: Path, written: PreTrainedModel, *, filled: bool = True) -> Metrics:
    """Zeros of the masked maps as they came, and in the written checkpoint; nothing where no mask came.

    Args:
        before: folder of the checkpoint that came.
        written: the model of the one that was written. A map that is no dense one any more has no zeros.
        filled: whether zeros may be gone.

    Raises:
        StageError: they may not, and a weight stands where a mask says zero.
    """
    if not (before / MASKS).is_file():
        return {}
    zeros_before = zeros = 0
    for name, bits in load_file(before / MASKS).items():
        w_OI = _weights(written, name.removesuffix(".weight"))
        if w_OI is None or len(w_OI) != len(bits) or -(-w_OI.shape[1] // 8) != bits.shape[1]:
            if not filled:
                raise _lost(name, "another map stands in its place")
            zeros_before += 8 * bits.numel() - int(_ones(bits))
            continue
        stands_OI = unpacked(bits, w_OI.shape[1])
        zeros_before += int((~stands_OI).sum())
        zeros += int((w_OI == 0).sum())
        wrong = int(((w_OI != 0) & ~stands_OI).sum())
        if wrong and not filled:
            raise _lost(name, f"{wrong} weights too many")
        forget(w_OI)
    return {"zeros_before": float(zeros_before), "zeros": float(zeros)}


def _weights(model: nn.Module, path: str) -> Tensor | None:
    one = dict(model.named_modules(remove_duplicate=False)).get(path)
    if isinstance(one, QuantizedLinear):
        return one.values()
    if not isinstance(one, nn.Linear):
        return None
    return one.weight.detach()


def _ones(bits: Tensor) -> Tensor:
    return (bits[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).sum()


def _lost(name: str, measured: str) -> StageError:
    return StageError(
        f"{name} does not have the zeros that its mask says",
        measured=measured,
        limit="0 weights too many",
        remedy="This is a defect: please report it with the recipe.",
    )
