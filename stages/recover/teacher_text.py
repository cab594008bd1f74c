"""Text that a teacher writes itself: as various as what it learned from, where the corpus at hand is not.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.algorithms.drawing import drawn
from stages.models.layers import rounded_cache
from stages.models.memory.saved_state import read_record, restore, save_state
from stages.recover.checks import check_writer
from stages.recover.headless import Apart
from stages.recover.matched_blocks import inputs_of
from stages.recover.teacher_answers import Lessons

TOGETHER = 64
"""Windows written side by side: reading the weights once for each token takes most of the time."""


def write(teacher: Apart, ids_NT: Tensor, seed: int, path: Path, lessons: Lessons, first: int) -> None:
    """Fill windows from the teacher's own distribution, from first tokens drawn from the whole vocabulary.

    What the teacher thought of each token when it wrote it is its answer on these windows: it is not asked again.

    Args:
        teacher: a decoder.
        ids_NT: int64, filled.
        seed: of all draws.
        path: where they are kept; those kept there are taken from there.
        lessons: told the answers.
        first: number of the first of these windows among the lessons'.

    Raises:
        StageError: the teacher is no decoder.

    Source: Liu et al. 2023, LLM-QAT, section 3.1.
    """
    check_writer(teacher.model, teacher.task)
    if read_record(path) is None:
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, len(ids_NT), TOGETHER):
            with rounded_cache.by(teacher.model, rounded_cache.STEPWISE):
                _write(teacher, ids_NT[start : start + TOGETHER], generator, lessons, first + start)
        save_state(path, {"ids": ids_NT}, {})
    restore(path, {"ids": ids_NT})


@torch.no_grad()
def _write(teacher: Apart, ids_NT: Tensor, generator: torch.Generator, lessons: Lessons, first: int) -> None:
    vocabulary = min(len(teacher.head.weight_VH), teacher.model.config.get_text_config().vocab_size)
    ids_NT[:, 0] = torch.randint(vocabulary, (len(ids_NT),), generator=generator)
    cache: Any = None
    answered: list[Tensor] = []
    heard: dict[str, list[Tensor]] = {name: [] for name in lessons.listened}
    for place in range(ids_NT.shape[1]):
        with inputs_of(lessons.listened) as here:
            said = teacher.model(input_ids=ids_NT[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = said.past_key_values
        answered.append(teacher.states(said))
        for name, states in heard.items():
            states.append(here[name])
        if place + 1 < ids_NT.shape[1]:
            p_NV = teacher.head.logits(answered[-1][:, -1]).float().softmax(1)
            ids_NT[:, place + 1] = drawn(p_NV, generator)
    del cache
    hidden_NTH = torch.cat(answered, dim=1)
    states_NTH = {name: torch.cat(states, dim=1) for name, states in heard.items()}
    for n, hidden_TH in enumerate(hidden_NTH):
        lessons.keep(first + n, hidden_TH, {name: state_NTH[n] for name, state_NTH in states_NTH.items()})
