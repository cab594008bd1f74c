"""quantize: a checkpoint's weights, and if asked its activations, as small integers with explicit symmetric scales."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.runtime.contract import Image, Input, Kind, Metrics, Params, Progress, Stage, StageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.models.folding import Site
    from stages.models.observing import Observed
    from stages.models.precision import Decision, Precision


class QuantizeParams(Params):
    """How weights and activations are rounded.

    Attributes:
        scheme: INT8 weights and activations; INT8 weights; INT4 weights in blocks.
        smoothing: strength of moving outliers from activations into weights, 0 to 1; None searches it for each layer.
        block: INT4 only: inputs that share a scale.
        embedding: INT8 rows for the token table and the head, or left as they are.
        keep: largest share of the blocks' weights whose worst layers stay in higher precision.
        windows: calibration windows.
        window_tokens: their length.
        search: `auto` tries clipped ranges and, unless given, smoothing strengths; `off` takes the plain ranges.
    """

    scheme: Literal["int8_w8a8", "int8_weight_only", "int4_weight_only"] = "int8_w8a8"
    smoothing: float | None = Field(default=None, ge=0, le=1)
    block: int = Field(default=64, ge=2)
    embedding: Literal["int8", "keep"] = "int8"
    keep: float = Field(default=0.07, ge=0, le=0.5)
    windows: int = Field(default=16, ge=1)
    window_tokens: int = Field(default=512, ge=8)
    search: Literal["auto", "off"] = "auto"


ROWS = 384
"""Sampled rows of each layer's inputs on which strengths and ranges are judged: more changed no choice by a step."""


def run_quantize(params: QuantizeParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See QuantizeParams. The function of the float model is kept exactly by every fold; only rounding changes it."""
    from stages.models import anatomy, precision
    from stages.models.folding import sites
    from stages.models.loading import load_model, save_model
    from stages.models.quantized import annotate, describe

    model = load_model(inputs["model"])
    if describe(model) is not None:
        raise StageError("the checkpoint is quantized already", remedy="Give the float checkpoint it was made from.")
    found = sites(model)
    asked = _precision(params, found)
    before = anatomy.block_parameters(model)
    decisions = _decisions(params, asked, found, _observed(params, model, found, inputs, progress), progress)
    if asked != precision.SPARED:
        decisions = precision.spare(decisions, params.keep)
    notes: dict[str, Any] = {}
    for one in decisions:
        notes |= precision.apply(model, one)
    tables = precision.quantize_tables(model) if params.embedding == "int8" else []
    annotate(model, {"scheme": params.scheme}, notes)
    save_model(model, output, like=inputs["model"])
    kept = sum("kept" in note for note in notes.values())
    progress.note(f"{len(notes)} maps and {len(tables)} tables quantized, {kept} maps kept in higher precision")
    return {
        **_proven(inputs["model"], output, [*notes, *tables]),
        "quantized_maps": float(len(notes)),
        "kept_maps": float(kept),
        "block_parameters": float(before),
        "largest_error_ratio": max((one.found.error for one in decisions), default=0.0),
    }


def _precision(params: QuantizeParams, found: list[Site]) -> Precision:
    from stages.models.precision import SPARED, Precision

    if params.scheme != "int4_weight_only":
        return Precision(8, 8, None) if params.scheme == "int8_w8a8" else SPARED
    for site in found:
        for name, reader in site.readers.items():
            if reader.in_features % params.block or reader.in_features % 2:
                fits = [b for b in (16, 32, 64, 128, 256) if not any(_widths(found) % b)]
                raise StageError(
                    f"blocks of {params.block} do not divide the inputs of {name}",
                    measured=f"{reader.in_features} inputs",
                    limit=f"a common divisor: {', '.join(map(str, fits)) or 'none'}",
                    remedy="Set `block` to one of these, or `scheme: int8_weight_only`.",
                )
    return Precision(4, None, params.block)
