"""Products of matrices where they are most of the time, and the float in which rough ones take the least of it.

Shapes: M, K, N any.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """A @ b, float32 as exact as torch's own; neither needs a gradient.

    torch gives such products to MKL, which knows AVX512 on Intel's processors alone: on two cores of an EPYC that has
    it 12 against oneDNN's 6 ms for [1536, 512] by [512, 1536]. Without AVX512 MKL takes two thirds of oneDNN's time,
    which is hundreds of times as much for parts of a matrix. oneDNN's stands under linear maps and no other name.
    """
    if _ONEDNN and a_MK.dtype == b_KN.dtype == torch.float32 and a_MK.numel() and b_KN.numel():
        made: Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")
        return made
    return a_MK @ b_KN


def gram(x_MN: Tensor) -> Tensor:
    """x^T x, [N, N], float32 and exactly symmetric; x needs no gradient.

    Strips of it from the diagonal on: five eighths of the work of a product that does not know that it is symmetric.
    """
    size = x_MN.shape[1]
    made_NN, x_NM = x_MN.new_empty(size, size), x_MN.T.contiguous() if _ONEDNN else x_MN.T
    edges = [size * strip // _STRIPS for strip in range(_STRIPS + 1)]
    for start, stop in pairwise(edges):
        made_NN[start:stop, start:] = product(x_NM[start:stop], x_NM[start:].T)
        made_NN[start:stop, :start] = made_NN[:start, start:stop].T
    return made_NN


def short_float() -> torch.dtype:
    """bfloat16 where the processor multiplies it, float32 elsewhere.

    Without such instructions a product of bfloat16 takes seven times as long as one of float32.
    """
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


SHORT = short_float()
"""For averages over many products, of which a few digits are exact enough, and for models that learn or write."""
_STRIPS = 4
_ONEDNN = bool(
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.cpu.get_capabilities().get("avx512_f")
)
