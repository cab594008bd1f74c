"""quantize: a checkpoint's weights, and if asked what they read, in few bits with explicit symmetric scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from stages.runtime.contract import PARTIAL, Image, Input, Kind, Metrics, Params, Progress, Stage, StageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stages.quantize.input_ranges import Decision
    from stages.quantize.rounding import Precision

Scheme = Literal[
    "int8_w8a8", "int8_weight_only", "fp8_e4m3", "int4_weight_only", "nvfp4", "mxfp4", "auto", "fp16", "bf16"
]


ROUNDED_INPUTS = ("int8_w8a8", "fp8_e4m3")
SIXTEEN_BITS = ("fp16", "bf16")
FITTED = 4
"""Where inputs are rounded, one window in so many fits maps: the fit wants fewer than the ranges, and costs more."""
SMALL = ("I8", "U8", "F8_E4M3", "I32")


class QuantizeParams(Params):
    """How weights and activations are rounded.

    Attributes:
        scheme: INT8 or FP8 weights and activations, with static ranges; weights alone as INT8 rows, INT4 blocks, or
            four-bit floats in NVFP4 or MXFP4 blocks; or `auto`: INT4 blocks where they lose least, INT8 rows elsewhere;
            or every number of the checkpoint in 16 bits, which transformers and any engine load as they are.
        smoothing: int8_w8a8: strength of moving outliers from activations into weights, 0 to 1; None searches it for
            each layer.
        block: INT4: inputs that share a scale.
        bits: auto: most bits a weight of the blocks on average, scales counted.
        loss: auto: instead of `bits`, the largest predicted loss in nats a token, at the least size.
        embedding: INT8 rows for the token table and the head, or left as they are; fp16 and bf16 cast them, too.
        observer: int8_w8a8: how the range of inputs is chosen: `search` for the least error of the outputs, or
            `minmax`, `percentile`, `mse`, `entropy` of the inputs.
        keep: int8_w8a8, fp8_e4m3: largest share of the blocks' weights whose inputs stay float, where that saves most.
        layers: paths of the maps that are quantized, with `*` for anything; every map of the blocks by default.
        skip: paths of maps that stay float: `*.down_proj`.
        windows: calibration windows; None takes 8, or 32 where inputs are rounded: all set the ranges then, and a
            quarter of them fits the maps. More lose less and take longer.
        window_tokens: their length.
        kv_cache: keys and values in eight bits as they are cached, with static scales of each layer.
        search: `auto` fits each map to the dense model's outputs, by columns, and searches scales, ranges and
            smoothing; `off` rounds to nearest with the plain ranges of the format's definition.
        rotation: mixes the values between v and o by a Hadamard matrix (`heads`), the residual stream, too (`stream`; a
            tied table becomes two), or the heads of the blocks where rounding then loses less on the text (`auto`), so
            that no channel stands out. It folds into the weights: before rounding the model gives the same. None
            rotates heads where inputs are rounded, the search is on and no tied tensor is in the way.
        layout: how the checkpoint is laid out: our own way, or as vLLM and transformers load it, which holds no
            quantized table and no shared, factorized or unevenly pruned layers; vLLM wants q, k and v in one form, and
            gate and up, which `auto` does not promise.
    """

    scheme: Scheme = "int8_w8a8"
    smoothing: float | None = Field(default=None, ge=0, le=1)
    block: int = Field(default=64, ge=2)
    bits: float | None = Field(default=None, gt=0)
    loss: float | None = Field(default=None, ge=0)
    embedding: Literal["int8", "keep"] = "int8"
    keep: float = Field(default=0.07, ge=0, le=0.5)
    observer: Literal["search", "minmax", "percentile", "mse", "entropy"] = "search"
    layers: tuple[str, ...] = Field(default=("*",), min_length=1)
    skip: tuple[str, ...] = ()
    windows: int | None = Field(default=None, ge=1)
    window_tokens: int = Field(default=512, ge=8)
    kv_cache: Literal["keep", "int8", "fp8_e4m3"] = "keep"
    search: Literal["auto", "off"] = "auto"
    rotation: Literal["off", "heads", "stream", "auto"] | None = None
    layout: Literal["enginery", "compressed-tensors"] = "enginery"

    @model_validator(mode="after")
    def _one_limit(self) -> QuantizeParams:
        given = [name for name in ("bits", "loss") if getattr(self, name) is not None]
        if self.scheme == "auto" and len(given) != 1:
            raise ValueError("scheme auto needs one of `bits` and `loss`")
        if self.scheme != "auto" and given:
            raise ValueError(f"`{given[0]}` belongs to scheme auto")
        if self.layout == "compressed-tensors" and self.scheme in SIXTEEN_BITS:
            raise ValueError(f"layout compressed-tensors holds no {self.scheme}: engines load it as it is")
        if self.rotation not in (None, "off") and self.scheme in SIXTEEN_BITS:
            raise ValueError(f"`rotation` spreads what few bits lose; {self.scheme} has no use for it")
        if self.layout == "compressed-tensors" and self.embedding == "int8":
            raise ValueError("layout compressed-tensors holds no INT8 table: set `embedding: keep`")
        return self


def quantize(params: QuantizeParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See QuantizeParams. `layers.json` says for each map how it was rounded and what that lost."""
    from stages.models.anatomy import blocks as anatomy
    from stages.models.checkpoint import compressed_tensors, editing
    from stages.models.checkpoint.loading import load_model, save_model
    from stages.models.layers import rounded_cache as kv_cache
    from stages.models.layers.quantized_linear import annotate, describe
    from stages.models.memory import saved_state
    from stages.quantize import cache_ranges, half_precision
    from stages.quantize import rounding as precision

    model = load_model(inputs["model"])
    if describe(model) is not None:
        raise StageError("the checkpoint is quantized already", remedy="Give the float checkpoint it was made from.")
    block_parameters = anatomy.block_parameters(model)
    asked_for = editing.matching(precision.names(model), params.layers, params.skip)
    _check_block(params, model, asked_for)
    text_NT = _windows(params, inputs, progress)
    if params.kv_cache != "keep":
        kv_cache.attentions(model)  # refuses now what is not understood
    cast = params.scheme in SIXTEEN_BITS
    text = partial(editing.calibration, inputs, params.window_tokens, params.windows or 8, progress)
    alike = {} if cast else dict.fromkeys(asked_for, _precision(params))
    rotated = _rotated(params, model, alike, text, progress)
    if any(note["rotation"] != "off" for note in rotated.values()):
        # A whole model's heads are a good deal beside one block: they go the way of the other weights.
        turned = (model.get_submodule(name).weight for name, note in rotated.items() if note["rotation"] != "off")
        saved_state.settle(output / PARTIAL / "rotated.safetensors", turned)
    rounding = precision.Rounding(
        {} if cast else _asked(params, model, asked_for, text_NT, output / PARTIAL), search=params.search == "auto"
    )
    if params.scheme in ROUNDED_INPUTS:
        assert text_NT is not None
        rounding.take(_ranges(params, model, asked_for, text_NT))
    if _by_weights_alone(params):
        rows = precision.plainly(model, rounding)
    else:
        from stages.models.blockwise.compress import compress

        assert text_NT is not None
        fitted_NT = text_NT[: max(2, len(text_NT) // FITTED)] if rounding.notes else text_NT
        rows = compress(model, fitted_NT, rounding, output / PARTIAL, progress)
    names = [row["layer"] for row in rows]
    for row in rows:
        row |= rotated.get(row["layer"], {})
    tables = precision.quantize_tables(model) if params.embedding == "int8" and not cast else []
    caches = _caches(params, model, text_NT)
    if cast:  # last: arithmetic of 16 bits is slow where ranges are measured
        rows = half_precision.store(model, params.scheme, asked_for)
    notes = rounding.notes | {name: {**rounding.notes.get(name, {}), **note} for name, note in rotated.items()}
    annotate(model, {"scheme": params.scheme, **kv_cache.described(model)}, notes)
    save_model(model, output, like=inputs["model"], layout=params.layout)
    if params.layout == compressed_tensors.METHOD and (unlike := compressed_tensors.unlike(model)):
        progress.note(
            f"vLLM needs one form for q, k and v, and for gate and up; {len(unlike)} modules mix: {unlike[0]}"
        )
    editing.write_table(output, [*rows, *caches], scheme=params.scheme)
    kept = sum("kept" in note for note in rounding.notes.values())
    progress.note(
        f"{len(asked_for)} maps and all else in 16 bits"
        if cast
        else f"{len(rows)} maps and {len(tables)} tables quantized, {kept} maps kept in higher precision"
    )
    return {
        **(
            half_precision.proven(inputs["model"], output, params.scheme, rows)
            if cast
            else _proven(inputs["model"], output, [*names, *tables])
        ),
        **(cache_ranges.proven(output, caches) if caches else {}),
        "quantized_maps": float(len(asked_for) if cast else len(rows)),
        "kept_maps": float(kept),
        "rotated_maps": float(sum(one["rotation"] != "off" for one in rotated.values())),
        "block_parameters": float(block_parameters),
        "bits_per_weight": 16.0 if cast else _bits(model),
        "largest_error_ratio": max((row["error"] for row in rows), default=0.0),
    }


def _rotated(
    params: QuantizeParams,
    model: PreTrainedModel,
    asked: dict[str, Precision],
    text: Callable[[], Tensor],
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Rotate what is asked for; where nothing is said, heads, if inputs are rounded and the checkpoint lets it."""
    from stages.quantize.rotation_choice import rotate

    searched = params.search == "auto"
    if params.rotation is not None:
        return rotate(model, params.rotation, asked, text, searched=searched)
    if not searched or params.scheme not in ROUNDED_INPUTS:
        return {}
    try:
        return rotate(model, "heads", asked, text, searched=searched)
    except StageError as error:
        progress.note(f"heads are not rotated: {error.what}")
        return {}


def _caches(params: QuantizeParams, model: PreTrainedModel, ids_NT: Tensor | None) -> list[dict[str, Any]]:
    """Rows of the layers whose keys and values are rounded from now on, by the ranges of the rounded model."""
    from stages.quantize import cache_ranges

    if params.kv_cache == "keep":
        return []
    assert ids_NT is not None
    return cache_ranges.calibrated(model, ids_NT, params.kv_cache, search=params.search == "auto")


def _asked(
    params: QuantizeParams, model: PreTrainedModel, names: list[str], ids_NT: Tensor | None, partial: Path
) -> dict[str, Precision]:
    from stages.quantize import mixed_precision
    from stages.quantize.rounding import Precision

    if params.scheme != "auto":
        return dict.fromkeys(names, _precision(params))
    assert ids_NT is not None
    forms = [Precision("int8"), Precision("int4", block=params.block)]
    found = mixed_precision.measured(
        model, ids_NT[: max(2, len(ids_NT) // 2)], forms, partial, lambda done, total: None
    )
    parts = {name: options for name, options in found.items() if name in names}
    if params.loss is not None:
        return mixed_precision.under_loss(parts, forms, params.loss)
    assert params.bits is not None
    return mixed_precision.under_bits(parts, model, forms, params.bits)


def _precision(params: QuantizeParams) -> Precision:
    from stages.quantize.rounding import Precision

    return {
        "int8_w8a8": Precision("int8", input_form="int8"),
        "int8_weight_only": Precision("int8"),
        "fp8_e4m3": Precision("fp8_e4m3", input_form="fp8_e4m3"),
        "int4_weight_only": Precision("int4", block=params.block),
        "auto": Precision("int4", block=params.block),
        "nvfp4": Precision("nvfp4", block=16),
        "mxfp4": Precision("mxfp4", block=32),
    }[params.scheme]


def _check_block(params: QuantizeParams, model: PreTrainedModel, names: list[str]) -> None:
    widths = {int(model.get_submodule(name).in_features) for name in names}
    block = None if params.scheme in SIXTEEN_BITS else _precision(params).block
    if block and (wrong := sorted(width for width in widths if width % block)):
        fits = [str(size) for size in range(2, min(widths) + 1, 2) if not any(width % size for width in widths)]
        raise StageError(
            f"blocks of {block} do not divide every layer's inputs",
            measured=f"{', '.join(map(str, wrong))} inputs",
            limit=f"a common divisor: {', '.join(fits) or 'there is none'}",
            remedy="Set `scheme` to int4_weight_only and `block` to one of these, or `scheme` to int8_weight_only.",
        )


def _windows(params: QuantizeParams, inputs: Mapping[str, Path], progress: Progress) -> Tensor | None:
    from stages.models.checkpoint.editing import calibration

    fitted, cached = not _by_weights_alone(params), params.kv_cache != "keep"
    if "text" not in inputs and (fitted or cached):
        free = fitted and params.search == "auto" and params.scheme not in (*ROUNDED_INPUTS, "auto") and not cached
        remedy = "Give a corpus with a `calibrate` split" + (", or set `search: off`." if free else ".")
        what = params.scheme if fitted else f"kv_cache {params.kv_cache}"
        raise StageError(f"{what} needs an input 'text'", remedy=remedy)
    if not fitted and not cached:
        return None
    most = params.windows or (32 if params.scheme in ROUNDED_INPUTS else 8)
    return calibration(inputs, params.window_tokens, most, progress)


def _by_weights_alone(params: QuantizeParams) -> bool:
    """Whether no map is rounded by what it reads."""
    if params.scheme in (*ROUNDED_INPUTS, "auto"):
        return False
    return params.search == "off" or params.scheme in ("int8_weight_only", *SIXTEEN_BITS)


def _ranges(params: QuantizeParams, model: PreTrainedModel, names: list[str], ids_NT: Tensor) -> list[Decision]:
    """Smoothing, ranges and float inputs of every site, where it is known between which maps factors may move."""
    from stages.models.anatomy.blocks import LLAMA_TYPE, check_type
    from stages.quantize.input_ranges import How, decided

    searched = params.search == "auto"
    if params.scheme == "int8_w8a8":
        check_type(model.config.model_type)
    elif not searched or model.config.model_type not in LLAMA_TYPE:
        return []  # plain ranges are found on the way
    strengths = None if searched else (0.0,)
    strengths = strengths if params.smoothing is None else (params.smoothing,)
    observer = params.observer if searched else "minmax"
    how = How(str(_precision(params).input_form), observer, strengths, params.keep)
    return decided(model, names, ids_NT, how)


def _bits(model: PreTrainedModel) -> float:
    """Stored bits of the blocks' maps with their scales, a weight."""
    from stages.models.anatomy import blocks as anatomy
    from stages.models.layers.quantized_linear import quantized_modules

    stored = weights = 0
    for block in anatomy.blocks(model):
        for one in quantized_modules(block.module).values():
            tensors = (one.weight, one.weight_scale)
            stored += sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors)
            weights += int(one.in_features) * int(one.out_features)  # type: ignore[arg-type]
    return stored / max(1, weights)


def _proven(before: Path, after: Path, names: list[str]) -> Metrics:
    """Count integer matrices in the written bytes, and refuse a float copy of any of them."""
    from stages.models.layers.quantized_linear import stored_dtypes

    stored = stored_dtypes(after)
    floats = [name for name in names if stored.get(f"{name}.weight", "I8") not in SMALL]
    integers = sum(dtype in SMALL and name.endswith((".weight", ".weight_packed")) for name, dtype in stored.items())
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
