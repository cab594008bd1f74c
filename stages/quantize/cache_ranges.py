"""Static ranges of the keys and values of every layer, measured on a text.

Shapes: N sequences, G heads of keys and values, T tokens, D their size, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.grids import E4M3_TOP, INT8
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.blockwise.block_calls import arguments, embedded, together
from stages.models.blockwise.run import check_finite, in_short, output
from stages.models.checkpoint.files import read
from stages.models.layers import rounded_cache
from stages.models.layers.rounded_cache import rounded
from stages.models.memory.pages import release
from stages.runtime.contract import Metrics, StageError

AT_ONCE = 2
"""Windows in one call of a block, and of the text on which ranges are judged: the last ones."""
TOPS = {"int8": INT8.top, "fp8_e4m3": E4M3_TOP}
RANGES = {
    "int8": tuple(1 - step / 10 for step in range(7)),
    "fp8_e4m3": tuple(2 ** (step / 4) for step in range(5)),
}
"""Ranges tried, as shares of the largest magnitude. INT8 gains by cutting off; of a float only the phase within an
octave matters, and where it reaches further nothing saturates."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass
class _Heard:
    """What one layer's attention was given."""

    name: str
    key_peak: float = 0.0
    value_peak: float = 0.0
    key: Tensor = field(default_factory=lambda: torch.zeros(0))
    value: Tensor = field(default_factory=lambda: torch.zeros(0))
    attention: Callable[[Tensor, Tensor], Tensor] = lambda key, value: key

    def __call__(
        self, _module: nn.Module, key: Tensor, value: Tensor, attention: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        check_finite(f"the keys of {self.name}", key)
        check_finite(f"the values of {self.name}", value)
        self.key_peak = max(self.key_peak, float(key.abs().max()))
        self.value_peak = max(self.value_peak, float(value.abs().max()))
        self.key, self.value, self.attention = key, value, attention


@torch.no_grad()
def calibrated(model: PreTrainedModel, ids_NT: Tensor, form: str, *, search: bool) -> list[dict[str, Any]]:
    """Give every layer scales of its keys and values, found with the caches of all layers in float.

    Args:
        model: a decoder, with its maps rounded already; its attention modules get scales.
        ids_NT: windows of a text.
        form: `int8` or `fp8_e4m3`.
        search: the range with the least error of the attention's outputs; otherwise the largest magnitude seen.

    Returns:
        A row a layer: scales, ranges as shares of the largest magnitude, and the relative squared errors of keys,
        values and the attention's outputs on the last windows.

    Raises:
        StageError: the model's attention is not understood, or keys or values are not finite.
    """
    paths = rounded_cache.attentions(model)
    calls, x_NTH = arguments(model, ids_NT.shape[1]), embedded(model, ids_NT)
    rows: list[dict[str, Any]] = []
    for block, kwargs in zip(anatomy.blocks(model), calls, strict=True):
        heard = _Heard(paths[block.index])
        _run(model, block, x_NTH, kwargs, heard)
        rows.append({"layer": heard.name, "block": block.index, "format": form, **_decided(heard, form, search)})
        release(block.module)
    rounded_cache.put(model, form, {row["layer"]: (row["key_scale"], row["value_scale"]) for row in rows})
    return rows


def proven(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Metrics:
    """The written checkpoint holds the scales of every layer, the ones in the table.

    Raises:
        StageError: it does not.
    """
    stored = read(folder)
    for name, column in zip(rounded_cache.SCALES, ("key_scale", "value_scale"), strict=True):
        found = sorted(float(tensor) for key, tensor in stored.items() if key.endswith(f".{name}"))
        if found != sorted(row[column] for row in rows) or not all(scale > 0 for scale in found):
            raise StageError(
                "the written checkpoint does not hold the scales of its cache",
                measured=f"{len(found)} of {name}",
                limit=f"{len(rows)}, as in layers.json",
                remedy="This is a defect: please report it with the recipe.",
            )
    return {"rounded_caches": float(len(rows)), "largest_cache_error_ratio": max(row["error"] for row in rows)}


def _run(model: PreTrainedModel, block: Block, x_NTH: Tensor, kwargs: Mapping[str, Any], heard: _Heard) -> None:
    with rounded_cache.listening(model, heard):
        for batch in x_NTH.split(AT_ONCE):
            with in_short():
                batch.copy_(output(block.module(batch, **together(kwargs, len(batch)))))


def _decided(heard: _Heard, form: str, search: bool) -> dict[str, float]:
    tried = RANGES[form] if search else (1.0,)
    key, value = heard.key.float(), heard.value.float()
    wanted = heard.attention(key, value)

    def missed(key_scale: float | None, value_scale: float | None) -> float:
        near_key = key if key_scale is None else rounded(key, key_scale, form)
        near_value = value if value_scale is None else rounded(value, value_scale, form)
        return _error(heard.attention(near_key, near_value), wanted)

    key_plain, value_plain = (peak / TOPS[form] or 1.0 for peak in (heard.key_peak, heard.value_peak))
    key_range = min(tried, key=lambda share: missed(share * key_plain, None))
    value_range = min(tried, key=lambda share: missed(None, share * value_plain))
    # As float32, so that the table says what the checkpoint holds.
    key_scale, value_scale = torch.tensor([key_range * key_plain, value_range * value_plain]).tolist()
    return {
        "key_scale": key_scale,
        "value_scale": value_scale,
        "key_range": round(key_range, 6),
        "value_range": round(value_range, 6),
        "key_error": _error(rounded(key, key_scale, form), key),
        "value_error": _error(rounded(value, value_scale, form), value),
        "error": missed(key_scale, value_scale),
    }


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum().clamp_min(_TINY))
