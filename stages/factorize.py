"""factorize: the blocks' maps as products of two thin ones, their ranks chosen by the measured loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from stages.runtime.contract import PARTIAL, Image, Input, Kind, Metrics, Params, Progress, Stage, StageError


class FactorizeParams(Params):
    """How much goes.

    Attributes:
        keep: largest share of the blocks' parameters that stays.
        windows: calibration windows.
        window_tokens: their length.
    """

    keep: float = Field(default=0.8, gt=0, lt=1)
    windows: int = Field(default=16, ge=1)
    window_tokens: int = Field(default=512, ge=8)


def factorize(params: FactorizeParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See FactorizeParams. `structure.json` says what is factorized, `layers.json` each rank and what it lost."""
    from stages.models.anatomy import block_parameters
    from stages.models.loading import load_model, load_tokenizer, save_model, stored_parameters
    from stages.models.low_rank import compressed
    from stages.models.quantized import describe
    from stages.models.windows import windows

    model = load_model(inputs["model"])
    if describe(model) is not None:
        raise StageError("the checkpoint is quantized", remedy="Factorize first, quantize afterwards.")
    ids_NT = windows(
        inputs["text"], "calibrate", load_tokenizer(inputs["model"]), params.window_tokens, most=params.windows
    )
    if len(ids_NT) < params.windows:
        progress.note(f"the calibrate split gives {len(ids_NT)} of {params.windows} windows")
    before = block_parameters(model)
    done = compressed(model, ids_NT, ROLES, 1, params.keep, output / PARTIAL, progress)
    text = json.dumps({"method": "svd", "layers": done.rows}, indent=1) + "\n"
    (output / "layers.json").write_text(text, encoding="utf-8")
    save_model(model, output, like=inputs["model"])
    after = block_parameters(load_model(output))
    if after > params.keep * before:
        raise StageError(
            "the written checkpoint lost less than was asked",
            measured=f"{after} parameters in blocks",
            limit=f"{params.keep * before:.0f}",
            remedy="This is a defect: please report it with the recipe.",
        )
    return {
        "block_parameters": float(after),
        "block_parameters_before": float(before),
        "parameters": float(stored_parameters(output)),
        "parameters_before": float(stored_parameters(inputs["model"])),
        "predicted_loss_nats": done.predicted,
    }


ROLES = ("q", "k", "v", "o", "gate", "up", "down")

FACTORIZE = Stage(
    name="factorize",
    params=FactorizeParams,
    inputs={"model": Input(kinds=frozenset({Kind.CHECKPOINT})), "text": Input(kinds=frozenset({Kind.CORPUS}))},
    output=Kind.CHECKPOINT,
    image=Image.TORCH,
    run=factorize,
)
