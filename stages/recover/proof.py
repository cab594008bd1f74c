"""What recovery did to a checkpoint, read from the bytes before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.models.checkpoint import kept_zeros
from stages.models.checkpoint.editing import write_table
from stages.models.checkpoint.files import stored_parameters
from stages.models.checkpoint.loading import load_model
from stages.runtime.contract import Metrics, StageError


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
