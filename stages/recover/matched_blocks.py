"""Which blocks of a student came from which of its teacher, and what they read while both run.

Shapes: S blocks of the student, B of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.alignment import increasing
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block

ROWS = 8
"""Rows of each tensor that tell two blocks apart."""
MOST = 6
"""Blocks that are listened to at most: each keeps 2 H bytes a token on disk."""


def matched(student: PreTrainedModel, teacher: PreTrainedModel) -> list[int]:
    """For each block of the student, the teacher's that it came from: the nearest in weights, in order."""
    mine, theirs = anatomy.blocks(student), anatomy.blocks(teacher)
    if len(mine) >= len(theirs):
        return [min(index, len(theirs) - 1) for index in range(len(mine))]
    return increasing(torch.tensor([[_distance(one, other) for other in theirs] for one in mine]))


def listened(student: PreTrainedModel, teacher: PreTrainedModel) -> list[tuple[Block, Block]]:
    """Pairs whose inputs should agree: where blocks are missing before, else three over the whole depth.

    Of two stacks, blocks of the decoder: what the encoder gives is in what they read.
    """
    mine, theirs, origin = anatomy.blocks(student), anatomy.blocks(teacher), matched(student, teacher)
    last = [n for n, one in enumerate(mine) if one.stack == mine[-1].stack]
    found = [n for n in last[1:] if origin[n] != origin[n - 1] + 1]
    if not found:
        found = sorted({last[0] + round(len(last) * share / 4) for share in (1, 2, 3)} - {last[0], len(mine)})
    if len(found) > MOST:
        found = [found[round(n * (len(found) - 1) / (MOST - 1))] for n in range(MOST)]
    return [(mine[n], theirs[origin[n]]) for n in found]


@contextmanager
def inputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What each of the modules reads, by name, as they run within the context."""
    heard: dict[str, Tensor] = {}

    def hear(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heard[name] = args[0] if args else kwargs["hidden_states"]

    hooks = [
        module.register_forward_pre_hook(lambda _m, args, kwargs, name=name: hear(name, args, kwargs), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _distance(one: Block, other: Block) -> float:
    """Mean relative distance of the tensors that both blocks have in one shape; 1 where there is none."""
    theirs = dict(other.module.named_parameters())
    ratios = []
    for name, tensor in one.module.named_parameters():
        if name in theirs and theirs[name].shape == tensor.shape:
            a, b = tensor.detach()[:ROWS].float(), theirs[name].detach()[:ROWS].float()
            ratios.append(float((a - b).norm() / b.norm().clamp_min(1e-12)))
    return sum(ratios) / len(ratios) if ratios else 1.0
