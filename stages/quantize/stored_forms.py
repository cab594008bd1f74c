"""A map's weights in one of the stored forms: which scales a form can hold, and its bytes.

Shapes: O outputs, I inputs, G blocks along I, B block length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.algorithms.gptq import gptq
from stages.algorithms.grids import (
    E4M3_LEAST,
    E4M3_TOP,
    FP4_E2M1,
    FP8_E4M3,
    INT4,
    INT8,
    Grid,
    e8m0,
    encode_e2m1,
    nearest_e4m3,
)
from stages.algorithms.rounding import RATIOS, search_scales
from stages.models.layers.quantized_linear import FORMS, pack_int4

_LEAST_HALF = 2.0**-24


@dataclass(frozen=True)
class Rule:
    """How one map's scales are chosen: the grid, the form's own rule, what it can store, the shares tried."""

    grid: Grid
    plain: Callable[[Tensor], Tensor]
    storable: Callable[[Tensor], Tensor]
    ratios: tuple[float, ...]
    whole: Tensor | None = None


def rule(form: str, w_OI: Tensor, *, search: bool) -> Rule:
    """The rule of a form for one map; without `search` the scales that the format's definition names.

    Source: for nvfp4 and mxfp4 see the formats in stages/algorithms/grids.py; MX 1.0 takes as exponent that of the
    largest magnitude less that of the element's largest (2 for E2M1).
    """
    if form == "int4":
        held = lambda scale: scale.half().float().clamp(_LEAST_HALF, 65504.0)  # noqa: E731
        return Rule(INT4, lambda peak: peak / INT4.top, held, RATIOS if search else (1.0,))
    if form == "nvfp4":
        whole = (w_OI.abs().max() / (FP4_E2M1.top * E4M3_TOP)).float()
        whole = torch.where(whole > 0, whole, torch.ones(()))
        of_blocks = lambda scale: nearest_e4m3(scale / whole).clamp_min(E4M3_LEAST) * whole  # noqa: E731
        return Rule(FP4_E2M1, lambda peak: peak / FP4_E2M1.top, of_blocks, RATIOS if search else (1.0,), whole)
    if form == "mxfp4":
        exponent = lambda peak: torch.exp2(torch.floor(torch.log2(peak.clamp_min(2.0**-100))) - 2)  # noqa: E731
        return Rule(FP4_E2M1, exponent, lambda scale: scale, (1.0, 2.0) if search else (1.0,))
    grid = INT8 if form == "int8" else FP8_E4M3
    return Rule(grid, lambda peak: peak / grid.top, lambda scale: scale, (1.0,))


def rounded(
    w_OI: Tensor,
    form: str,
    block: int | None,
    root_II: Tensor | None,
    *,
    search: bool = True,
    stands_OI: Tensor | None = None,
) -> dict[str, Tensor]:
    """The tensors of a map in a form: to nearest, or by GPTQ given the root of its inputs' inverse moment.

    By GPTQ, zeros stay zeros where `stands_OI` is given and false; to nearest they stay anyway.

    Raises:
        ValueError: the block does not divide, or a value is not finite.
    """
    chosen = rule(form, w_OI, search=search)

    def scales(w_OB: Tensor, importance_B: Tensor | None) -> Tensor:
        return search_scales(
            w_OB.float()[:, None],
            chosen.grid,
            None if importance_B is None else importance_B[None],
            ratios=chosen.ratios,
            plain=chosen.plain,
            storable=chosen.storable,
        )[:, 0]

    if root_II is not None:
        v_OI, scale_OG = gptq(w_OI, root_II, chosen.grid.nearest, scales, block, stands_OI)
    else:
        size = block or w_OI.shape[1]
        if w_OI.shape[1] % size or not w_OI.isfinite().all():
            raise ValueError(f"{w_OI.shape[1]} inputs cannot be cut into blocks of {size}, or a weight is not finite")
        parts = w_OI.float().split(size, dim=1)
        scale_OG = torch.stack([scales(part_OB, None) for part_OB in parts], dim=1)
        v_OI = torch.cat(
            [
                chosen.grid.nearest(part_OB / scale_O[:, None])
                for part_OB, scale_O in zip(parts, scale_OG.T, strict=True)
            ],
            dim=1,
        )
    return _stored(form, v_OI, scale_OG if block else scale_OG[:, 0], chosen)


def _stored(form: str, v_OI: Tensor, scale: Tensor, chosen: Rule) -> dict[str, Tensor]:
    if form == "int4":
        return {"weight": pack_int4(v_OI.to(torch.int8)), "weight_scale": scale.to(FORMS[form].scale)}
    if FORMS[form].bits == 4:
        code_OI = encode_e2m1(v_OI)
        packed = code_OI[:, 0::2] | (code_OI[:, 1::2] << 4)
        if chosen.whole is None:
            return {"weight": packed, "weight_scale": e8m0(scale)}
        levels = (scale / chosen.whole).to(torch.float8_e4m3fn)
        return {"weight": packed, "weight_scale": levels, "weight_scale_2": chosen.whole}
    return {"weight": v_OI.to(FORMS[form].dtype), "weight_scale": scale}
