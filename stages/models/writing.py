"""Text that a teacher writes itself: as various as what it learned from, where the corpus at hand is not.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.models import anatomy
from stages.models.apart import Apart
from stages.models.resuming import read_record, restore, save_state
from stages.runtime.contract import StageError

TOGETHER = 64
"""Windows written side by side: reading the weights once for each token takes most of the time."""


def written(teacher: Apart, count: int, tokens: int, seed: int, path: Path) -> Tensor:
    """Windows drawn from the teacher's own distribution, from first tokens drawn from the whole vocabulary.

    Args:
        teacher: a decoder.
        count: N.
        tokens: T.
        seed: of all draws.
        path: where they are kept; those kept there are given back.

    Returns:
        ids_NT, int64.

    Raises:
        StageError: the teacher is no decoder.

    Source: Liu et al. 2023, LLM-QAT, section 3.1.
    """
    if any(block.stack == "encoder" for block in anatomy.blocks(teacher.model)):
        raise StageError(f"{type(teacher.model).__name__} cannot write text", remedy="Give `written_windows: 0`.")
    ids_NT = torch.empty(count, tokens, dtype=torch.int64)
    if read_record(path) is None:
        generator = torch.Generator().manual_seed(seed)
        for part_NT in ids_NT.split(TOGETHER):
            _write(teacher, part_NT, generator)
        save_state(path, {"ids": ids_NT}, {})
    restore(path, {"ids": ids_NT})
    return ids_NT


@torch.no_grad()
def _write(teacher: Apart, ids_NT: Tensor, generator: torch.Generator) -> None:
    vocabulary = min(len(teacher.head.weight_VH), teacher.model.config.vocab_size)
    ids_NT[:, 0] = torch.randint(vocabulary, (len(ids_NT),), generator=generator)
    cache: Any = None
    for place in range(1, ids_NT.shape[1]):
        said = teacher.model(input_ids=ids_NT[:, place - 1 : place], past_key_values=cache, use_cache=True)
        cache = said.past_key_values
        p_NV = teacher.head.logits(said.logits[:, -1]).float().softmax(1)
        ids_NT[:, place] = torch.multinomial(p_NV, 1, generator=generator)[:, 0]
