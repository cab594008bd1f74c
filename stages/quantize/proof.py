"""What is proven of a quantized checkpoint from its bytes, and how many bits its maps take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.files import dtypes
from stages.models.checkpoint.layout import read_header
from stages.models.layers.quantized_linear import quantized_modules
from stages.runtime.contract import Metrics, StageError

SMALL = ("I8", "U8", "F8_E4M3", "I32")


def proven(before: Path, after: Path, names: Sequence[str]) -> Metrics:
    """Count integer matrices in the written bytes.

    Args:
        before: the checkpoint that came.
        after: the one that was written.
        names: paths of what was rounded.

    Scales and the names of tensors do not count: beside rows of a few numbers they may outweigh what is saved.

    Raises:
        StageError: there is none, one of `names` is there in float, or the weights did not shrink.
    """
    stored = dtypes(after)
    floats = [name for name in names if stored.get(f"{name}.weight", "I8") not in SMALL]
    integers = sum(dtype in SMALL and name.endswith((".weight", ".weight_packed")) for name, dtype in stored.items())
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (before, after)]
    weights = [_weights(before), _weights(after)]
    if floats or not integers or weights[1] >= weights[0]:
        raise StageError(
            "the written checkpoint is not quantized",
            measured=f"{integers} integer matrices, {len(floats)} float copies {floats[:3]}, {weights[1]} bytes",
            limit=f"no float copy, fewer than {weights[0]} bytes",
            remedy="This is a defect: please report it with the recipe.",
        )
    return {
        "integer_matrices": float(integers),
        "size_bytes": float(sizes[1]),
        "size_bytes_before": float(sizes[0]),
    }


def _weights(folder: Path) -> int:
    """Bytes of a checkpoint's tensors but for what says how few bits are read."""
    return sum(
        one["data_offsets"][1] - one["data_offsets"][0]
        for file in folder.glob("*.safetensors")
        for name, one in read_header(file).items()
        if "_scale" not in name.rpartition(".")[2] and not name.endswith("weight_shape")
    )


def bits_per_weight(model: PreTrainedModel) -> float:
    """Stored bits of the blocks' maps with their scales, a weight."""
    stored = weights = 0
    for block in anatomy.blocks(model):
        for one in quantized_modules(block.module).values():
            tensors = (one.weight, one.weight_scale)
            stored += sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors)
            weights += int(one.in_features) * int(one.out_features)  # type: ignore[arg-type]
    return stored / max(1, weights)
