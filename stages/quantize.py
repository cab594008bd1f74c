"""quantize: a checkpoint's weights, and if asked its activations, as small integers with explicit symmetric scales."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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


ROWS = 1024
"""Sampled rows of each layer's inputs on which strengths and ranges are judged."""


def quantize(params: QuantizeParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See QuantizeParams. The function of the float model is kept exactly by every fold; only rounding changes it."""
    from stages.models import anatomy, precision
    from stages.models.folding import sites
    from stages.models.loading import load_model, save_model
    from stages.models.quantized import annotate, describe

    model = load_model(inputs["model"])
    if describe(model) is not None:
        raise StageError("the checkpoint is quantized already", remedy="Give the float checkpoint it was made from.")
    found = sites(model)
    if params.scheme == "int8_weight_only":
        decisions = [precision.as_is(site) for site in found]
    else:
        asked = _precision(params, found)
        observed = _observed(params, model, found, inputs, progress)
        decisions = precision.spare(_decided(params, asked, found, observed, progress), params.keep)
    block_parameters = anatomy.block_parameters(model)
    notes = precision.apply(model, decisions)
    tables = precision.quantize_tables(model) if params.embedding == "int8" else []
    annotate(model, {"scheme": params.scheme}, notes)
    save_model(model, output, like=inputs["model"])
    kept = sum("kept" in note for note in notes.values())
    progress.note(f"{len(notes)} maps and {len(tables)} tables quantized, {kept} maps kept in higher precision")
    return {
        **_proven(inputs["model"], output, [*notes, *tables]),
        "quantized_maps": float(len(notes)),
        "kept_maps": float(kept),
        "block_parameters": float(block_parameters),
        "largest_error_ratio": max((one.error for one in decisions), default=0.0),
    }


def _precision(params: QuantizeParams, found: list[Site]) -> Precision:
    from stages.models.precision import Precision

    if params.scheme == "int8_w8a8":
        return Precision(weight_bits=8, input_bits=8, block=None)
    widths = {reader.in_features for site in found for reader in site.readers.values()}
    if wrong := sorted(width for width in widths if width % params.block):
        fits = [str(block) for block in range(2, min(widths) + 1, 2) if not any(width % block for width in widths)]
        raise StageError(
            f"blocks of {params.block} do not divide every layer's inputs",
            measured=f"{', '.join(map(str, wrong))} inputs",
            limit=f"a common divisor: {', '.join(fits) or 'there is none'}",
            remedy="Set `block` to one of these, or `scheme` to int8_weight_only.",
        )
    return Precision(weight_bits=4, input_bits=None, block=params.block)


def _observed(
    params: QuantizeParams, model: PreTrainedModel, found: list[Site], inputs: Mapping[str, Path], progress: Progress
) -> dict[str, Observed]:
    from stages.models.loading import load_tokenizer
    from stages.models.observing import observe
    from stages.models.windows import windows

    if "text" not in inputs:
        raise StageError(f"{params.scheme} needs an input 'text'", remedy="Give a corpus with a `calibrate` split.")
    ids_NT = windows(
        inputs["text"], "calibrate", load_tokenizer(inputs["model"]), params.window_tokens, most=params.windows
    )
    if len(ids_NT) < params.windows:
        progress.note(f"the calibrate split gives {len(ids_NT)} of {params.windows} windows")
    maps = {}
    for site in found:
        weights = {id(reader.weight) for reader in site.readers.values()}
        maps[site.name] = [one for one in model.modules() if id(getattr(one, "weight", None)) in weights]
    # Reading a text and searching the sites take about equal time.
    return observe(model, maps, ids_NT, rows=ROWS, advanced=lambda done: progress.advanced(done / len(ids_NT), 2))


def _decided(
    params: QuantizeParams, asked: Precision, found: list[Site], observed: dict[str, Observed], progress: Progress
) -> list[Decision]:
    from stages.algorithms.smoothing import STRENGTHS
    from stages.models.precision import decide

    given = () if params.smoothing is None else (params.smoothing,)
    strengths = given or (STRENGTHS if params.search == "auto" else (0.0,))
    decisions: list[Decision] = []
    for done, site in enumerate(found, start=1):
        decisions.append(decide(site, observed[site.name], asked, strengths, clip=params.search == "auto"))
        progress.advanced(1 + done / len(found), 2)
        if done == len(found) or found[done].block != site.block:
            progress.metric("output_error_ratio", decisions[-1].error, site.block)
    return decisions


def _proven(before: Path, after: Path, names: list[str]) -> Metrics:
    """Count integer matrices in the written bytes, and refuse a float copy of any of them."""
    from stages.models.quantized import stored_dtypes

    stored = stored_dtypes(after)
    floats = [name for name in names if stored.get(f"{name}.weight", "I8") not in ("I8", "U8")]
    integers = sum(dtype in ("I8", "U8") for dtype in stored.values())
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (before, after)]
    if floats or not integers or sizes[1] >= sizes[0]:
        raise StageError(
            "the written checkpoint is not quantized",
            measured=f"{integers} integer matrices, {len(floats)} float copies {floats[:3]}, {sizes[1]} bytes",
            limit=f"no float copy, fewer than {sizes[0]} bytes",
            remedy="This is a defect: please report it with the recipe.",
        )
    return {
        "integer_matrices": float(integers),
        "size_bytes": float(sizes[1]),
        "size_bytes_before": float(sizes[0]),
    }


QUANTIZE = Stage(
    name="quantize",
    params=QuantizeParams,
    inputs={
        "model": Input(kinds=frozenset({Kind.CHECKPOINT})),
        "text": Input(kinds=frozenset({Kind.CORPUS}), optional=True),
    },
    output=Kind.CHECKPOINT,
    image=Image.TORCH,
    run=quantize,
)
