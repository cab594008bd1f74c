"""factorize: the blocks' maps as products of two thin ones, their ranks chosen by the measured loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from stages.runtime.contract import PARTIAL, Image, Input, Kind, Metrics, Params, Progress, Stage


class FactorizeParams(Params):
    """How much goes.

    Attributes:
        keep: largest share of the blocks' parameters that stays, those of maps that are skipped included.
        layers: paths of the maps that may go, with `*` for anything; every map of the blocks by default.
        skip: paths of maps that stay as they are: `*.down_proj`.
        windows: calibration windows.
        window_tokens: their length.
    """

    keep: float = Field(default=0.8, gt=0, lt=1)
    layers: tuple[str, ...] = Field(default=("*",), min_length=1)
    skip: tuple[str, ...] = ()
    windows: int = Field(default=16, ge=1)
    window_tokens: int = Field(default=512, ge=8)


def factorize(params: FactorizeParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See FactorizeParams. `structure.json` says what is factorized, `layers.json` each rank and what it lost."""
    from stages.models import surgery
    from stages.models.anatomy import block_parameters
    from stages.models.loading import save_model
    from stages.models.low_rank import Asked, compressed
    from stages.models.planning import dense

    model = surgery.opened(inputs["model"], "factorize")
    asked = Asked(ROLES, params.keep, names=surgery.matching(dense(model), params.layers, params.skip))
    ids_NT = surgery.calibration(inputs, params.window_tokens, params.windows, progress)
    before = block_parameters(model)
    done = compressed(model, ids_NT, asked, output / PARTIAL, progress)
    surgery.write_table(output, done.rows, method="svd")
    save_model(model, output, like=inputs["model"])
    found = surgery.proven(inputs["model"], before, output, params.keep * before)
    return {**found, "predicted_loss_nats": done.predicted}


ROLES = ("q", "k", "v", "o", "gate", "up", "down")

FACTORIZE = Stage(
    name="factorize",
    params=FactorizeParams,
    inputs={"model": Input(kinds=frozenset({Kind.CHECKPOINT})), "text": Input(kinds=frozenset({Kind.CORPUS}))},
    output=Kind.CHECKPOINT,
    image=Image.TORCH,
    run=factorize,
)
