"""The numbers that weights are rounded to: integers, eight-bit floats, and four-bit floats under block scales.

A *grid* is what one code can stand for at scale 1. `nearest` rounds half to even, as the formats' definitions say, and
saturates.

Shapes: O outputs, I inputs, G blocks along I, ... any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the eight non-negative codes of a four-bit float, by code; code + 8 is the negative."""
E4M3_TOP, E4M3_LEAST = 448.0, 2.0**-9
E8M0_BIAS = 127

Name = Literal["int8", "int4", "fp8_e4m3", "fp4_e2m1"]


@dataclass(frozen=True)
class Grid:
    """One format of an element.

    Attributes:
        name: as in `quantization.json`.
        top: the largest magnitude of both signs.
        nearest: x -> the nearest value at scale 1, same type as x.
    """

    name: Name
    top: float
    nearest: Callable[[Tensor], Tensor]


def _integers(bits: int) -> Callable[[Tensor], Tensor]:
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    return lambda x: x.round().clamp_(low, high)


def nearest_e4m3(x: Tensor) -> Tensor:
    """The nearest FP8 E4M3 value (no infinities, largest 448), half to even, saturating.

    Source: Micikevicius et al. 2022, FP8 Formats for Deep Learning, section 3.
    """
    return x.clamp(-E4M3_TOP, E4M3_TOP).to(torch.float8_e4m3fn).to(x.dtype)


def nearest_e2m1(x: Tensor) -> Tensor:
    """The nearest FP4 E2M1 value, half to even, saturating at 6.

    Source: OCP Microscaling Formats (MX) 1.0, section 5.3.3.
    """
    size = x.abs()
    # The distance of neighbours is 0.5 below 2, 1 below 4, then 2; `round` is half to even in each of them.
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    return torch.copysign((size / step).round_().mul_(step).clamp_(max=6.0), x)


INT8 = Grid("int8", 127.0, _integers(8))
INT4 = Grid("int4", 7.0, _integers(4))
FP8_E4M3 = Grid("fp8_e4m3", E4M3_TOP, nearest_e4m3)
FP4_E2M1 = Grid("fp4_e2m1", 6.0, nearest_e2m1)
GRIDS = {grid.name: grid for grid in (INT8, INT4, FP8_E4M3, FP4_E2M1)}


def encode_e2m1(value: Tensor) -> Tensor:
    """Codes 0..15 (uint8) of values that lie on the grid; -0 is code 8."""
    magnitudes = torch.tensor(E2M1, dtype=value.dtype, device=value.device)
    code = torch.searchsorted(magnitudes, value.abs().contiguous()).to(torch.uint8)
    return code + 8 * torch.signbit(value).to(torch.uint8)


def decode_e2m1(code: Tensor) -> Tensor:
    """float32 values of codes 0..15."""
    table = torch.tensor((*E2M1, *(-value for value in E2M1)), device=code.device)
    return table[code.long()]


def e8m0(scale: Tensor) -> Tensor:
    """Codes (uint8) of scales that are powers of two, 2^-127 to 2^127.

    Source: OCP Microscaling Formats (MX) 1.0, section 5.4.1.
    """
    return (torch.log2(scale).round() + E8M0_BIAS).clamp(0, 254).to(torch.uint8)


def power_of_two(code: Tensor) -> Tensor:
    """float32 scales of E8M0 codes."""
    return torch.ldexp(torch.ones(code.shape, device=code.device), code.int() - E8M0_BIAS)
