"""Which maps of a block may stand on one basis. Needs no torch."""

from typing import Literal

Projection = Literal[
    "q+k", "q+k+v", "q", "k", "v", "qkv", "o", "gate+up", "gate", "up", "gate_up", "down",
    "cross_q", "cross_k+cross_v", "cross_k", "cross_v", "cross_qkv", "cross_o",
]  # fmt: skip
TOGETHER: tuple[Projection, ...] = (
    "q+k", "v", "qkv", "o", "gate+up", "gate_up", "down", "cross_q", "cross_k+cross_v", "cross_o",
)  # fmt: skip
"""Roles joined by `+` read the same; what a model has not is no part of it."""
