"""Blocks that read one window after another, as every pass over them needs.

Shapes: N windows, T tokens, H hidden.
"""

from __future__ import annotations

from torch import Tensor

from stages.runtime.contract import StageError


def require_order(block: str, x_1TH: Tensor, tokens: int, remedy: str) -> None:
    """Raise StageError where what enters a block for one window is laid out otherwise (XLNet, Gemma 3n).

    Args:
        block: whose.
        x_1TH: what entered.
        tokens: of the window; a model may fill it up.
        remedy: what helps.
    """
    if x_1TH.dim() != 3 or len(x_1TH) != 1:
        raise StageError(
            f"{block} reads its tokens in another order than one window after another",
            measured=f"{list(x_1TH.shape)} of one window of {tokens} tokens",
            limit="[windows, tokens, hidden]",
            remedy=remedy,
        )
