"""factorize: the blocks' maps as products of two thin ones, and if asked single weights beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from stages.runtime.contract import PARTIAL, Image, Input, Kind, Metrics, Params, Progress, Stage

if TYPE_CHECKING:
    from stages.models.checkpoint.subject import Subject


class FactorizeParams(Params):
    """How much goes.

    Attributes:
        keep: largest share of the blocks' parameters that stays, those of maps that are skipped included.
        sparse: share of what a factorized map keeps that goes to single weights beside its product, their positions
            paid for; a map whose product alone loses less has none. Far less is lost in the same bytes of a checkpoint,
            but nothing is saved where the map runs: it is made dense, in a graph, too.
        layers: paths of the maps that may go, with `*` for anything; every map of the blocks by default.
        skip: paths of maps that stay as they are: `*.down_proj`.
        windows: calibration windows.
        window_tokens: their length.
    """

    keep: float = Field(default=0.8, gt=0, lt=1)
    sparse: float = Field(default=0.0, ge=0, lt=1)
    layers: tuple[str, ...] = Field(default=("*",), min_length=1)
    skip: tuple[str, ...] = ()
    windows: int = Field(default=16, ge=1)
    window_tokens: int = Field(default=512, ge=8)


def factorize(params: FactorizeParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See FactorizeParams. `structure.json` says what is factorized, `layers.json` each rank and what it lost."""
    from stages.models.anatomy.blocks import block_parameters
    from stages.models.checkpoint import editing
    from stages.models.checkpoint.files import shapes
    from stages.models.checkpoint.loading import save_model
    from stages.models.low_rank.planning import dense
    from stages.models.low_rank.products import Asked, compressed

    model = editing.opened(inputs["model"], "factorize", output / PARTIAL)
    names = editing.matching(dense(model), params.layers, params.skip)
    asked = Asked(params.keep, names=names, sparse=params.sparse)
    ids_NT = editing.calibration(inputs, params.window_tokens, params.windows, progress)
    before = block_parameters(model)
    done = compressed(model, ids_NT, asked, output / PARTIAL, progress)
    editing.write_table(output, done.rows, method="svd+sparse" if params.sparse else "svd")
    written = save_model(model, output, like=inputs["model"], progress=progress)
    found = editing.proven(inputs["model"], before, output, written, params.keep * before)
    weights = sum(shape[0] for name, shape in shapes(output).items() if name.endswith(".dense.values"))
    return {**found, "predicted_loss_nats": done.predicted, "sparse_weights": float(weights)}


def admit(params: FactorizeParams, known: Mapping[str, Any]) -> Subject:
    """The factorized checkpoint, as far as shapes say it."""
    from stages.models.blockwise.run import check_order
    from stages.models.checkpoint.editing import matching
    from stages.models.low_rank.planning import RANK_STEP, dense
    from stages.models.text.windows import check_split

    given: Subject = known["model"]
    given.require_float("factorize")
    matching(dense(given.model), params.layers, params.skip)
    check_order(given.model)
    check_split(known, "calibrate")
    return replace(given, loose=RANK_STEP, masked=False)


FACTORIZE = Stage(
    name="factorize",
    params=FactorizeParams,
    inputs={"model": Input(kinds=frozenset({Kind.CHECKPOINT})), "text": Input(kinds=frozenset({Kind.CORPUS}))},
    output=Kind.CHECKPOINT,
    image=Image.TORCH,
    run=factorize,
    admit=admit,
)
