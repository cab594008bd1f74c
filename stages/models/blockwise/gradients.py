"""What the loss's gradient says of each weight, one block's graph alive at a time.

Shapes: N windows, T tokens, H hidden, I inputs, O outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise.block_calls import answers, arguments, embedded
from stages.models.blockwise.run import run
from stages.models.memory.pages import release
from stages.models.memory.spill import Shelf


def gradients(
    model: PreTrainedModel, ids_NT: Tensor, folder: Path, advanced: Callable[[float, float], None]
) -> Iterator[dict[str, Tensor]]:
    """Path -> mean over windows of |dL/dw|, [O, I], of each block's maps, from the last block to the first.

    L is the next token's cross-entropy, mean over a window. Each block's inputs wait in `folder` for their turn.

    Raises:
        StageError: an activation is not finite.
    """
    model.requires_grad_(False)
    blocks, calls = anatomy.blocks(model), arguments(model, ids_NT.shape[1])
    x_NTH, inputs, total = embedded(model, ids_NT), Shelf(folder), 3 * len(blocks)
    for block, kwargs in zip(blocks, calls, strict=True):
        inputs.put(block.index, {"input": x_NTH})
        x_NTH = run(block, x_NTH, kwargs)
        release(block.module)
        advanced(block.index + 1, total)
    g_NTH = torch.stack([_at_the_end(model, x_TH, ids_T) for x_TH, ids_T in zip(x_NTH, ids_NT, strict=True)])
    for block, kwargs in zip(reversed(blocks), reversed(calls), strict=True):
        maps = {name: one for name, one in block.module.named_modules() if isinstance(one, nn.Linear)}
        sums = {name: torch.zeros_like(one.weight) for name, one in maps.items()}
        weights = [one.weight.requires_grad_() for one in maps.values()]
        outgoing = []
        for x_TH, g_TH in zip(inputs.get(block.index, "input"), g_NTH, strict=True):
            x_1TH = x_TH[None].detach().requires_grad_()
            returned = block.module(x_1TH, **kwargs)
            y_1TH = returned[0] if isinstance(returned, tuple) else returned
            g_1TH, *found = torch.autograd.grad(y_1TH, [x_1TH, *weights], g_TH[None])
            outgoing.append(g_1TH[0])
            for name, g_OI in zip(maps, found, strict=True):
                sums[name] += g_OI.abs() / len(ids_NT)
        block.module.requires_grad_(False)
        release(block.module)
        g_NTH = torch.stack(outgoing)
        advanced(total - 2 * block.index, total)
        yield {f"{block.name}.{name}": sum_OI for name, sum_OI in sums.items()}


def _at_the_end(model: PreTrainedModel, x_TH: Tensor, ids_T: Tensor) -> Tensor:
    x = x_TH.detach().requires_grad_()
    (logits_1TV,) = answers(model, [ids_T[None]], [x[None]])
    return torch.autograd.grad(nn.functional.cross_entropy(logits_1TV[0, :-1], ids_T[1:]), x)[0]
