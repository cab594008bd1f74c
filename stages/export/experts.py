"""Mixtures of experts as a graph holds them: every expert computes every token, and the router's shares weigh them.

Which expert a token goes to is known when it is computed, and a graph has no loop that ends with it. What is not asked
for is weighed with nothing: the numbers are the same, at the cost of all experts.

Shapes: T tokens, K experts of each, E experts, H hidden, F inside an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_NAME = "enginery_every"


def use_every(model: PreTrainedModel) -> None:
    """Let the model compute its experts so, where it has any; it is of use for the exporter alone afterwards."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation(_NAME)


def _every(self: Any, hidden_TH: Tensor, chosen_TK: Tensor, shares_TK: Tensor) -> Tensor:
    first = "gate_up_proj" if self.has_gate else "up_proj"
    inside_ETF = _each(self, first, hidden_TH[None])
    inside_ETF = self._apply_gate(inside_ETF) if self.has_gate else self.act_fn(inside_ETF)
    found_ETH = _each(self, "down_proj", inside_ETF)
    if self.has_post_expert_norm:
        found_ETH = self.post_expert_norm(found_ETH)
    is_chosen_TKE = chosen_TK[:, :, None] == torch.arange(found_ETH.shape[0])
    share_TE = (is_chosen_TKE * shares_TK[:, :, None]).sum(1)
    return (found_ETH * share_TE.T[:, :, None]).sum(0).to(hidden_TH.dtype)


def _each(self: Any, name: str, x: Tensor) -> Tensor:
    """[1 or E, T, inputs] by each expert's map."""
    weight = getattr(self, name)
    y = torch.matmul(x, weight if self.is_transposed else weight.transpose(1, 2))
    return y + getattr(self, f"{name}_bias")[:, None] if self.has_bias else y


ALL_EXPERTS_FUNCTIONS.register(_NAME, _every)
