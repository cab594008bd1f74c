"""share: maps on common bases, the same weights for neighbouring blocks, or equal tensors stored once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from stages.models.low_rank.kinds import TOGETHER, Projection
from stages.runtime.contract import PARTIAL, Image, Input, Kind, Metrics, Params, Progress, Stage, StageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.models.checkpoint.subject import Subject

Method = Literal["basis", "recursive", "tie"]


class ShareParams(Params):
    """What is shared.

    Attributes:
        method: `basis` puts maps on low-rank bases, of their own or common to neighbouring blocks; `recursive` gives
            neighbouring blocks the same weights and each a difference of low rank; `tie` stores equal tensors once.
        tables: tie: embedding tables and head that differ stay apart (`equal`), or each becomes the mean of an
            encoder's table, a decoder's and the head (`mean`), which loses much until the model is trained again.
        keep: largest share of the blocks' parameters that stays; not of `tie`.
        group: basis: most neighbouring blocks on one basis; recursive: neighbouring blocks on the same weights.
        projections: basis: what may stand on one; where, with which others, or whether at all, is chosen by the
            measured loss. By default all that the blocks have, fused maps (`qkv`, `gate_up`) and those that read an
            encoder (`cross_...`) too; what is named otherwise must be there.
        windows: calibration windows.
        window_tokens: their length.
    """

    method: Method = "basis"
    tables: Literal["equal", "mean"] = "equal"
    keep: float = Field(default=0.95, gt=0, lt=1)
    group: int = Field(default=2, ge=2)
    projections: tuple[Projection, ...] = Field(default=TOGETHER, min_length=1)
    windows: int = Field(default=16, ge=1)
    window_tokens: int = Field(default=512, ge=8)

    @field_validator("projections")
    @classmethod
    def _once(cls, projections: tuple[Projection, ...]) -> tuple[Projection, ...]:
        twice = [role for role, count in Counter("+".join(projections).split("+")).items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]} stands in two projections; it can have one basis")
        return projections

    @model_validator(mode="after")
    def _tables_of_tie(self) -> ShareParams:
        if self.tables != "equal" and self.method != "tie":
            raise ValueError(f"{self.method} leaves the tables alone; `tables` goes with tie")
        if self.projections != TOGETHER and self.method != "basis":
            raise ValueError(f"{self.method} takes whole blocks; `projections` goes with basis")
        if self.method == "tie" and (self.keep, self.group) != (0.95, 2):
            raise ValueError("tie stores once what is equal, whatever that saves; leave `keep` and `group` out")
        return self


def share(params: ShareParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See ShareParams. The written checkpoint's `structure.json` says what shares, `layers.json` what it lost."""
    from stages.models.anatomy.blocks import block_parameters
    from stages.models.checkpoint import editing
    from stages.models.checkpoint.loading import save_model

    model = editing.opened(inputs["model"], "share", output / PARTIAL)
    before, tied = block_parameters(model), params.method == "tie"
    predicted = _tie(params, model, output, progress) if tied else _thinned(params, model, inputs, output, progress)
    written = save_model(model, output, like=inputs["model"], progress=progress)
    found = editing.proven(inputs["model"], before, output, written, before if tied else params.keep * before)
    if tied:
        editing.refuse_above(int(found["parameters"]), found["parameters_before"] - 1, "parameters")
    return {**found, "predicted_loss_nats": predicted}


def admit(params: ShareParams, known: Mapping[str, Any]) -> Subject:
    """The shared checkpoint, as far as shapes say it."""
    from stages.models.blockwise.run import check_order
    from stages.models.checkpoint import editing
    from stages.models.low_rank.planning import RANK_STEP
    from stages.models.text.windows import check_split

    given: Subject = known["model"]
    given.require_float("share")
    if params.method == "tie":
        return replace(given, masked=False)
    _check(params, given.model)
    check_order(given.model)
    editing.check_text(known)
    check_split(known, "calibrate")
    return replace(given, loose=RANK_STEP, masked=False)


def _check(params: ShareParams, model: PreTrainedModel) -> None:
    from stages.models.low_rank import looped, projections

    if params.method == "recursive":
        looped.check(model)
    else:
        chosen = params.projections != ShareParams.model_fields["projections"].default
        projections.check(model, params.projections, chosen=chosen)


def _tie(params: ShareParams, model: PreTrainedModel, output: Path, progress: Progress) -> float:
    from stages.algorithms.tie import equal_groups
    from stages.models.anatomy import classes
    from stages.models.checkpoint import editing
    from stages.models.layers import low_rank_linear

    changed = low_rank_linear.averaged(model) if params.tables == "mean" else {}
    # Vectors are left alone: norms that happen to be equal are few bytes and are scaled one by one later. So are tables
    # that no file holds.
    equal = equal_groups(
        (name, one)
        for name, one in model.named_parameters()
        if one.dim() > 1 and not classes.left_out(model, name, one)
    )
    if not equal:
        raise StageError(
            "no two tensors of the checkpoint are equal",
            measured="0 groups",
            limit="1 group",
            remedy="Leave the step out, or use `method: basis`.",
        )
    rows = []
    for done, names in enumerate(equal, start=1):
        low_rank_linear.tie(model, names)
        for name in names:
            others = [other for other in names if other != name]
            rows.append({"layer": name, "shares_with": others, "relative_change": changed.get(name, 0.0)})
        progress.advanced(done, len(equal))
    low_rank_linear.tie_tables(model)
    editing.write_table(output, rows, method=params.method)
    progress.note("; ".join(" = ".join(names) for names in equal))
    return 0.0


def _thinned(
    params: ShareParams, model: PreTrainedModel, inputs: Mapping[str, Path], output: Path, progress: Progress
) -> float:
    from stages.models.checkpoint import editing
    from stages.models.low_rank.looped import looped
    from stages.models.low_rank.products import Asked, compressed

    _check(params, model)
    ids_NT = editing.calibration(inputs, params.window_tokens, params.windows, progress)
    state = output / PARTIAL
    if params.method == "recursive":
        done = looped(model, ids_NT, params.group, params.keep, state, progress)
    else:
        done = compressed(model, ids_NT, Asked(params.keep, params.projections, params.group), state, progress)
    editing.write_table(output, done.rows, method=params.method)
    return done.predicted


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
    admit=admit,
)
