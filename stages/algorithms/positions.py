"""Where the weights of a sparse matrix stand, in as few bytes as two plain forms allow.

Shapes: O outputs, I inputs, n weights that stand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.algorithms.sparsity import packed, unpacked

MASK, COLUMNS = "mask", "columns"
FORMS = {
    MASK: "mask: uint8 [O, ceil(I / 8)], a bit a weight, the first column in the lowest bit",
    COLUMNS: "columns: int16 [n], the column of each weight, row after row; counts: int16 [O], weights of each row",
}
"""Form -> its tensors; values stand in row-major order."""
WIDEST = torch.iinfo(torch.int16).max
VALUE_BYTES = 4


def least(outputs: int, inputs: int, kept: int) -> tuple[str, int]:
    """The smaller form for so many weights that stand, and its bytes; the mask where both are equal."""
    mask, columns = outputs * -(-inputs // 8), 2 * (kept + outputs)
    return (COLUMNS, columns) if columns < mask and inputs <= WIDEST else (MASK, mask)


def affordable(outputs: int, inputs: int, budget: int) -> int:
    """Most weights that fit with their positions in the bytes of `budget` float32 numbers; 0 where none does."""
    left = VALUE_BYTES * (budget - 2)  # each of two tensors of positions is rounded up to a whole number
    by_mask = (left - outputs * -(-inputs // 8)) // VALUE_BYTES
    by_columns = (left - 2 * outputs) // (VALUE_BYTES + 2) if inputs <= WIDEST else 0
    return max(0, min(outputs * inputs, max(by_mask, by_columns)))


def encoded(mask_OI: Tensor, form: str) -> dict[str, Tensor]:
    """A mask as the tensors of a form, by name."""
    if form == MASK:
        return {"mask": packed(mask_OI)}
    return {
        "columns": mask_OI.nonzero()[:, 1].to(torch.int16),
        "counts": mask_OI.sum(1).to(torch.int16),
    }


def decoded(tensors: dict[str, Tensor], outputs: int, inputs: int) -> Tensor:
    """The mask from the tensors of either form.

    Raises:
        ValueError: the columns of a row do not ascend, or one is outside the matrix.
    """
    if "mask" in tensors:
        return unpacked(tensors["mask"], inputs)
    device = tensors["counts"].device
    row_n = torch.arange(outputs, device=device).repeat_interleave(tensors["counts"].long())
    column_n = tensors["columns"].long()
    if len(row_n) != len(column_n) or not bool(((0 <= column_n) & (column_n < inputs)).all()):
        raise ValueError("a sparse matrix has columns outside its shape")
    place_n = row_n * inputs + column_n
    if not bool((place_n.diff() > 0).all()):
        raise ValueError("the columns of a sparse matrix do not ascend")
    mask = torch.zeros(outputs * inputs, dtype=torch.bool, device=device)
    mask[place_n] = True
    return mask.view(outputs, inputs)
