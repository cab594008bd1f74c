"""Products of matrices where they are most of the time, and the float in which rough ones take the least of it.

Shapes: M, K, N any.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """A @ b, float32 as exact as torch's own; neither needs a gradient.

    torch gives such products to MKL, which takes twice as long as oneDNN where the processor is not Intel's: 12 against
    6 ms for [1536, 512] by [512, 1536] on two cores of an EPYC. oneDNN's stands under linear maps and no other name.
    """
    if _ONEDNN and a_MK.dtype == b_KN.dtype == torch.float32 and a_MK.numel() and b_KN.numel():
        made: Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")
        return made
    return a_MK @ b_KN


def short_float() -> torch.dtype:
    """bfloat16 where the processor multiplies it, float32 elsewhere.

    Without such instructions a product of bfloat16 takes seven times as long as one of float32.
    """
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


SHORT = short_float()
"""For averages over many products, of which a few digits are exact enough, and for models that learn or write."""
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
