"""What recovery did to a checkpoint, read from the bytes before and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.models.checkpoint import kept_zeros
from stages.models.checkpoint.editing import write_table
from stages.models.checkpoint.files import stored_parameters
from stages.models.checkpoint.loading import load_model
from stages.recover.held_out import Score, left, mean_kl, worst
from stages.recover.student import Goal, Record
from stages.runtime.contract import Metrics, Progress, StageError

ROUNDING = 0.05
"""Share by which a text may score worse when it is scored again: where a run goes on on another machine."""


def won(record: Record, after: Mapping[str, Score], goal: Goal, progress: Progress) -> Metrics:
    """What each held-out text won, and told where there are several.

    Args:
        record: where the run ended.
        after: the scores of the student that is kept.
        goal: what it was judged by.
        progress: told.

    Raises:
        StageError: the student that is kept is worse on one of the texts than the one that was chosen.
    """
    before, chosen, now = (goal.of_each(scores) for scores in (record.before, record.best, after))
    limit = worst(chosen, before) + ROUNDING
    rest = left(now, before)
    if wrong := [name for name, part in rest.items() if not part <= limit]:
        raise StageError(
            f"the student that is kept is worse on {wrong[0]} than the one that was chosen at step {record.best_step}",
            measured=f"{rest[wrong[0]]:.4f} of what was lost",
            limit=f"{limit:.4f}",
            remedy="Run the step again with --force; if this comes back, please report it with the recipe.",
        )
    gained: Metrics = {"kl_before": mean_kl(record.before), "kl_after": mean_kl(record.best)}
    for when, scores in (("before", record.before), ("after", after)):
        for name, one in scores.items():
            gained[f"kl_{name}_{when}"] = one.kl
            gained |= {f"excess_{name}_{when}": one.excess} if goal.kl_weight < 1 else {}
    if len(after) > 1:
        each = ", ".join(f"{name} {before[name]:.4f} to {now[name]:.4f}" for name in now)
        last = max(rest, key=lambda name: rest[name])
        progress.note(
            f"{goal.judged} by source: {each}; {last} won least, {rest[last]:.0%} of what it had lost is left"
        )
        gained["worst_after"] = rest[last]
    return gained


def proven(update: str, before: Path, after: Path, written: PreTrainedModel, mended: bool) -> Metrics:
    """Write what became of each tensor, and count those that changed between the two checkpoints on disk.

    Raises:
        StageError: see `changes`.
    """
    rows = changes(load_model(before, dtype=None), written, zeros_stay=update == "sparse", mended=mended)
    zeros = kept_zeros.carried(before, written, after)
    write_table(after, rows, update=update)
    changed = sum(row["relative_change"] > 0 for row in rows)
    return {"changed_tensors": float(changed), "parameters": float(stored_parameters(after)), **zeros}


def changes(
    before: PreTrainedModel, after: PreTrainedModel, *, zeros_stay: bool, mended: bool = True
) -> list[dict[str, Any]]:
    """A row a tensor: how far it moved relative to its norm, and its share of zeros.

    Args:
        before: the checkpoint that came.
        after: the one that was written.
        zeros_stay: whether the zeros of sparse matrices had to.
        mended: whether training found anything better than what came.

    Raises:
        StageError: no tensor changed, the structure did, or a zero that had to stay is none.
    """
    old, new = (dict(model.named_parameters()) for model in (before, after))
    rows = [_row(name, old[name].detach(), new[name].detach()) for name in old if name in new]
    changed = sum(row["relative_change"] > 0 for row in rows)
    if new.keys() != old.keys() or bool(changed) != mended:
        raise StageError(
            "recovery changed no tensor of the checkpoint, or its structure, or what it meant to leave",
            measured=f"{changed} of {len(old)} tensors differ, {len(new)} written",
            limit="the same tensors with other values",
        )
    if zeros_stay:
        wrong = [
            name for name in old if kept_zeros.is_pruned(old[name]) and int(((old[name] == 0) & (new[name] != 0)).sum())
        ]
        if wrong:
            raise StageError(
                f"{wrong[0]} lost zeros that had to stay",
                measured=f"{len(wrong)} tensors",
                limit=0,
                remedy="This is a defect: please report it with the recipe.",
            )
    return rows


def _row(name: str, old: Tensor, new: Tensor) -> dict[str, Any]:
    gone = (new.float() - old.float()).norm() / old.float().norm().clamp_min(1e-30)
    return {
        "tensor": name,
        "relative_change": 0.0 if torch.equal(old, new) else float(gone),
        "zeros": float((new == 0).float().mean()),
    }
