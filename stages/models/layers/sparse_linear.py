"""A linear map of which only the weights that are not zero are stored, and where they stand.

Shapes: O outputs, I inputs, n weights that stand.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.algorithms import positions
from stages.runtime.contract import StageError


class SparseLinear(nn.Module):
    """y = S x: `values` learn, the zeros between them cannot. S is made dense at each call, as quantized weights are.

    Attributes:
        form: how positions are stored: `mask` or `columns`, see `positions.FORMS`.
        values: [n], row after row.
        bias: [O] or None.
    """

    def __init__(self, inputs: int, outputs: int, kept: int, form: str, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form = inputs, outputs, form
        self.values = nn.Parameter(torch.zeros(kept))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        if form == positions.MASK:
            self.register_buffer("mask", torch.zeros(outputs, -(-inputs // 8), dtype=torch.uint8))
        else:
            self.register_buffer("columns", torch.zeros(kept, dtype=torch.int16))
            self.register_buffer("counts", torch.zeros(outputs, dtype=torch.int16))

    def dense(self) -> Tensor:
        """S, [O, I]; gradients reach `values`."""
        mask_OI = positions.decoded(dict(self.named_buffers()), self.out_features, self.in_features)
        return self.values.new_zeros(mask_OI.shape).masked_scatter(mask_OI, self.values)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return functional.linear(x, self.dense(), self.bias)


def tensors(sparse_OI: Tensor) -> dict[str, Tensor]:
    """`values` and positions of the smaller form for a matrix with zeros, by name."""
    mask_OI = sparse_OI != 0
    form, _ = positions.least(len(mask_OI), mask_OI.shape[1], int(mask_OI.sum()))
    return {"values": sparse_OI[mask_OI].float(), **positions.encoded(mask_OI, form)}


def filled(found: Mapping[str, Tensor], outputs: int, inputs: int, bias: nn.Parameter | None) -> SparseLinear:
    """The module that holds what `tensors` gave."""
    form = positions.MASK if "mask" in found else positions.COLUMNS
    made = SparseLinear(inputs, outputs, len(found["values"]), form)
    made.values, made.bias = nn.Parameter(found["values"]), bias
    for name, _ in list(made.named_buffers()):
        setattr(made, name, found[name])
    return made


def check(model: nn.Module) -> None:
    """Raise StageError where positions and values of a sparse map do not belong together."""
    for path, layer in model.named_modules():
        if isinstance(layer, SparseLinear):
            try:
                found = int(positions.decoded(dict(layer.named_buffers()), layer.out_features, layer.in_features).sum())
            except ValueError as error:
                raise StageError(f"{path} is damaged", measured=str(error)) from error
            if found != len(layer.values):
                raise StageError(
                    f"{path} has positions for another number of values",
                    measured=found,
                    limit=len(layer.values),
                    remedy="Make the checkpoint again.",
                )
