"""fuse: several checkpoints of one architecture into one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from stages.runtime.contract import Image, Input, Kind, Metrics, Params, Progress, Stage, StageError

if TYPE_CHECKING:
    from stages.models.checkpoint.subject import Subject

_FROM_BASE = ("ties", "dare", "dare_ties")


class FuseParams(Params):
    """How the checkpoints become one.

    Attributes:
        method: `soup` is the mean, `slerp` the point on the arc between two; `ties`, `dare` and `dare_ties` add to the
            input `base` what the checkpoints changed of it: trimmed to the largest changes, with one sign an element
            (ties); kept by chance and rescaled (dare); kept by chance, with one sign an element (dare_ties).
        weights: one a checkpoint, in the order of `models`; by default all equal. Their sum does not matter.
        keep: ties: share of each checkpoint's changes, the largest ones; dare: chance of each change.
        scale: ties and dare: factor of what is added to the base.
        seed: dare: of the dice.
    """

    method: Literal["soup", "slerp", "ties", "dare", "dare_ties"] = "soup"
    weights: tuple[float, ...] = ()
    keep: float = Field(default=0.2, gt=0, le=1)
    scale: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _weighs(self) -> FuseParams:
        if self.weights and (min(self.weights) < 0 or not sum(self.weights) > 0):
            raise ValueError("weights are not negative, and not all zero")
        return self


def fuse(params: FuseParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See FuseParams. `layers.json` says what became of each tensor. It takes seconds a gigabyte and starts over."""
    from stages.fuse import merging
    from stages.models.checkpoint import editing, kept_zeros, layout, loading, same_answers
    from stages.models.checkpoint.files import stored_parameters

    roles = sorted((role for role in inputs if role != "base"), key=lambda role: int(role.partition(".")[2]))
    models, base = [inputs[role] for role in roles], inputs.get("base")
    _check(params, len(models), base)
    merging.check_alike([*models, *([base] if base else [])])
    weights = params.weights or (1.0,) * len(models)
    fusion = merging.Fusion(params.method, weights, params.keep, params.scale, params.seed)
    rows = merging.fuse(fusion, models, base, output / layout.WEIGHTS, progress.advanced)
    layout.carry(models[0], output, (layout.CONFIG, *layout.travelling(models[0])))
    editing.write_table(output, rows, method=params.method)
    changed = _proven(output, [*models, *([base] if base else [])])
    written = loading.reopened(output)
    same_answers.speaks(written, progress)
    zeros = kept_zeros.anew(models[0], written, output)
    return {"parameters": float(stored_parameters(output)), "changed_tensors": float(changed), **zeros, **_means(rows)}


def admit(params: FuseParams, known: Mapping[str, Any]) -> Subject:
    """The first checkpoint, if the others are like it."""
    from stages.fuse import merging

    models: list[Subject] = [one for role, one in known.items() if role.startswith("models")]
    _check(params, len(models), known.get("base") and known["base"].folder)
    merging.check_known([*models, *([known["base"]] if "base" in known else [])])
    return models[0]


def _check(params: FuseParams, count: int, base: Path | None) -> None:
    most = 2 if params.method == "slerp" else None
    if count < 2 or (most and count > most):
        raise StageError(f"{params.method} cannot fuse so many checkpoints", measured=count, limit=most or "2 or more")
    if params.weights and len(params.weights) != count:
        raise StageError("there is not one weight a checkpoint", measured=f"{len(params.weights)} weights", limit=count)
    if (params.method in _FROM_BASE) != (base is not None):
        needs = "needs an input 'base'" if base is None else "takes no input 'base'"
        raise StageError(
            f"fuse by {params.method} {needs}", remedy="The base is the checkpoint that the others were trained from."
        )


def _proven(output: Path, inputs: list[Path]) -> int:
    """Of the written tensors, how many differ from the first input's; raise where all are those of one input."""
    import torch

    from stages.models.checkpoint import files
    from stages.models.memory.pages import forget

    written, counts = files.read(output), list[int]()
    for folder in inputs:
        stored, differ = files.read(folder), 0
        for name, tensor in written.items():
            differ += not torch.equal(tensor, stored[name])
            finite = not tensor.is_floating_point() or bool(torch.stack(torch.aminmax(tensor.float())).isfinite().all())
            if not finite:
                raise StageError(f"{name} is not finite after fusing", remedy="Lower `scale`, or raise `keep`.")
            forget(tensor)
            forget(stored[name])
        counts.append(differ)
        if not differ:
            raise StageError(
                "the fused checkpoint is one of those it was made from",
                measured=f"0 of {len(written)} tensors differ",
                limit=1,
                remedy="Give checkpoints that differ, and no weight of zero beside a single other.",
            )
    return counts[0]


def _means(rows: list[dict[str, Any]]) -> Metrics:
    names = [name for name in rows[0] if name != "tensor"]
    return {f"mean_{name}": sum(row[name] for row in rows) / len(rows) for name in names}


FUSE = Stage(
    name="fuse",
    params=FuseParams,
    inputs={
        "models": Input(kinds=frozenset({Kind.CHECKPOINT}), many=True),
        "base": Input(kinds=frozenset({Kind.CHECKPOINT}), optional=True),
    },
    output=Kind.CHECKPOINT,
    image=Image.TORCH,
    run=fuse,
    admit=admit,
)
