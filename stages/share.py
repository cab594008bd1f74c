"""share: neighbouring blocks' maps on one common basis, or equal tensors stored once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from stages.runtime.contract import Image, Input, Kind, Metrics, Params, Progress, Stage, StageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Projection = Literal["q+k", "q+k+v", "q", "k", "v", "o", "gate+up", "gate", "up", "down"]


class ShareParams(Params):
    """What is shared.

    Attributes:
        method: `basis` puts the maps of neighbouring blocks on one low-rank basis; `tie` stores equal tensors once.
        keep: basis: largest share of the blocks' parameters that stays.
        group: basis: neighbouring blocks on one basis.
        projections: basis: what may share one; where is chosen by the measured loss. `down` cannot be pruned later.
        windows: basis: calibration windows.
        window_tokens: basis: their length.
    """

    method: Literal["basis", "tie"] = "basis"
    keep: float = Field(default=0.95, gt=0, lt=1)
    group: int = Field(default=2, ge=2)
    projections: tuple[Projection, ...] = Field(default=("q+k", "v", "o", "gate+up"), min_length=1)
    windows: int = Field(default=8, ge=1)
    window_tokens: int = Field(default=512, ge=8)

    @field_validator("projections")
    @classmethod
    def _once(cls, projections: tuple[Projection, ...]) -> tuple[Projection, ...]:
        twice = [role for role, count in Counter("+".join(projections).split("+")).items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]} stands in two projections; it can have one basis")
        return projections


def share(params: ShareParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See ShareParams. The written checkpoint's `structure.json` says what shares, `layers.json` what it lost."""
    from stages.models.anatomy import block_parameters
    from stages.models.loading import load_model, save_model, stored_parameters
    from stages.models.quantized import describe

    model = load_model(inputs["model"])
    if describe(model) is not None:
        raise StageError("the checkpoint is quantized", remedy="Share first, quantize afterwards.")
    before = {"parameters": stored_parameters(inputs["model"]), "block_parameters": block_parameters(model)}
    predicted = _tie(model, progress) if params.method == "tie" else _basis(params, model, inputs, output, progress)
    save_model(model, output, like=inputs["model"])
    after = {
        "parameters": stored_parameters(output),
        "block_parameters": block_parameters(load_model(output)),
    }
    limit = params.keep * before["block_parameters"] if params.method == "basis" else before["parameters"] - 1
    measured = after["block_parameters"] if params.method == "basis" else after["parameters"]
    if measured > limit:
        raise StageError(
            "the written checkpoint shares less than was asked",
            measured=f"{measured} parameters",
            limit=f"{limit:.0f}",
            remedy="This is a defect: please report it with the recipe.",
        )
    return {
        **{name: float(value) for name, value in after.items()},
        **{f"{name}_before": float(value) for name, value in before.items()},
        "predicted_loss_nats": predicted,
    }


def _tie(model: PreTrainedModel, progress: Progress) -> float:
    from stages.algorithms.tie import equal_groups
    from stages.models import anatomy, shared

    # Vectors are left alone: norms that happen to be equal are few bytes and are scaled one by one later.
    found = equal_groups((name, one) for name, one in model.named_parameters() if one.dim() > 1)
    if not found:
        raise StageError(
            "no two tensors of the checkpoint are equal",
            measured="0 groups",
            limit="1 group",
            remedy="Leave the step out, or use `method: basis`.",
        )
    for done, names in enumerate(found, start=1):
        shared.tie(model, names)
        progress.advanced(done, len(found))
    if anatomy.head(model).weight is anatomy.embedding(model).weight:
        model.config.tie_word_embeddings = True
    progress.note("; ".join(" = ".join(names) for names in found))
    return 0.0


def _basis(
    params: ShareParams, model: PreTrainedModel, inputs: Mapping[str, Path], output: Path, progress: Progress
) -> float:
    from stages.algorithms.allocation import allocate
    from stages.models import sharing
    from stages.models.anatomy import block_parameters
    from stages.models.loading import load_tokenizer
    from stages.models.windows import windows

    if "text" not in inputs:
        raise StageError("share by basis needs an input 'text'", remedy="Give a corpus with a `calibrate` split.")
    ids_NT = windows(
        inputs["text"], "calibrate", load_tokenizer(inputs["model"]), params.window_tokens, most=params.windows
    )
    if len(ids_NT) < params.windows:
        progress.note(f"the calibrate split gives {len(ids_NT)} of {params.windows} windows")
    found = sharing.parts(model, ids_NT, params.projections, params.group, progress.advanced)
    total = block_parameters(model)
    best = sum(max((option.saved for option in part.options), default=0) for part in found)
    target = total - int(params.keep * total)
    if best < target:
        raise StageError(
            f"sharing {', '.join(params.projections)} in groups of {params.group} cannot save so much",
            measured=f"keep {1 - best / total:.4f} at best",
            limit=f"keep {params.keep}",
            remedy="Raise `keep`, or allow larger groups or more projections.",
        )
    chosen = allocate([part.options for part in found], target)
    rows = [sharing.share(model, part, one) for part, one in zip(found, chosen, strict=True) if one.rank]
    text = json.dumps({"method": "basis", "layers": rows}, indent=1) + "\n"
    (output / "layers.json").write_text(text, encoding="utf-8")
    progress.note(f"{len(rows)} of {len(found)} groups share a basis")
    return sum(one.damage for one in chosen)


SHARE = Stage(
    name="share",
    params=ShareParams,
    inputs={
        "model": Input(kinds=frozenset({Kind.CHECKPOINT})),
        "text": Input(kinds=frozenset({Kind.CORPUS}), optional=True),
    },
    output=Kind.CHECKPOINT,
    image=Image.TORCH,
    run=share,
)
