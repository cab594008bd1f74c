"""What each map gets before any is rounded: its precision, its rotation, its smoothing and range, and the text for it.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from stages.models.anatomy.blocks import LLAMA_TYPE, blocks
from stages.models.blockwise.block_calls import PROBE
from stages.models.checkpoint.editing import calibration
from stages.models.checkpoint.loading import load_model
from stages.models.layers import rounded_cache
from stages.models.layers.quantization_spec import describe
from stages.models.memory.saved_state import settle
from stages.quantize import cache_ranges, mixed_precision, rotation_choice
from stages.quantize.input_ranges import Decision, How, decided
from stages.quantize.movable_scales import read_together
from stages.quantize.params import QuantizeParams, block_of
from stages.quantize.rounding import Precision, Rounding
from stages.runtime.contract import Progress, StageError
from stages.runtime.progress import Silent

ROUNDED_INPUTS = ("int8_w8a8", "fp8_e4m3")


def opened(folder: Path, scratch: Path) -> PreTrainedModel:
    """The float model of a checkpoint; see `load_model`.

    Raises:
        StageError: it is quantized already.
    """
    model = load_model(folder, scratch=scratch)
    if (spec := describe(model)) is not None:
        refuse_quantized(str(spec.get("scheme", "few bits")))
    return model


def refuse_quantized(scheme: str, layout: str = "") -> None:
    """Raise StageError where a checkpoint is quantized."""
    if scheme:
        raise StageError(
            "the checkpoint is quantized already",
            measured=f"{scheme}, by {layout}" if layout else scheme,
            remedy="Judge, export and compile it as it is, or give the float checkpoint it was made from.",
        )


def by_weights_alone(params: QuantizeParams) -> bool:
    """Whether no map is rounded by what it reads."""
    if params.scheme in (*ROUNDED_INPUTS, "auto"):
        return False
    return params.search == "off" or params.scheme == "int8_weight_only"


def calibration_windows(
    params: QuantizeParams, inputs: Mapping[str, Path], progress: Progress, *, fitted: bool
) -> Tensor | None:
    """ids_NT for maps, where they are fitted, and for the ranges of a rounded cache; None where nothing needs a text.

    Raises:
        StageError: there is none, or it is shorter than one window.
    """
    if not needs_text(params, inputs, fitted=fitted):
        return None
    most = params.windows or (32 if params.scheme in ROUNDED_INPUTS else 8)
    return calibration(inputs, params.window_tokens, most, progress)


def needs_text(params: QuantizeParams, inputs: Mapping[str, Any], *, fitted: bool) -> bool:
    """Whether a text is read, for maps that are fitted or for a rounded cache.

    Raises:
        StageError: it is, and there is none.
    """
    cached = params.kv_cache != "keep"
    if "text" not in inputs and (fitted or cached):
        free = fitted and params.search == "auto" and params.scheme not in (*ROUNDED_INPUTS, "auto") and not cached
        remedy = "Give a corpus with a `calibrate` split" + (", or set `search: off`." if free else ".")
        what = params.scheme if fitted else f"kv_cache {params.kv_cache}"
        raise StageError(f"{what} needs an input 'text'", remedy=remedy)
    return fitted or cached


def check_cache(params: QuantizeParams, model: PreTrainedModel) -> None:
    """Raise StageError now where a cache is to be rounded in a model whose attention is not understood."""
    if params.kv_cache != "keep":
        rounded_cache.attentions(model)


def rounded_caches(params: QuantizeParams, model: PreTrainedModel, ids_NT: Tensor | None) -> list[dict[str, Any]]:
    """Rows of the layers whose keys and values are rounded from now on, by the ranges of the rounded model.

    Raises:
        StageError: keys or values are not finite.
    """
    if params.kv_cache == "keep":
        return []
    assert ids_NT is not None
    return cache_ranges.calibrated(model, ids_NT, params.kv_cache, search=params.search == "auto")


def check_block(params: QuantizeParams, widths: Collection[int], basis: int = 0) -> None:
    """Raise StageError where a block of the scheme does not divide one of these maps' inputs.

    Args:
        params: name the scheme and the block.
        widths: the maps' inputs.
        basis: one of them that the widths of maps yet to be made are multiples of, 0 for none.
    """
    block = _precision(params).block
    if block and (wrong := sorted(width for width in widths if width % block)):
        fits = [str(size) for size in range(2, min(widths) + 1, 2) if not any(width % size for width in widths)]
        four_bits = f"`scheme` to int4_weight_only and `block` to {fits[-1]}, or " if fits else ""
        raise StageError(
            f"blocks of {block} do not divide every layer's inputs",
            measured=f"{', '.join(map(str, wrong))} inputs"
            + (f"; of a map on a basis {basis} or a multiple of it" if basis in wrong else ""),
            limit=f"a common divisor: {', '.join(fits) or 'there is none'}",
            remedy=f"Set {four_bits}`scheme` to int8_weight_only.",
        )


def rotated(
    params: QuantizeParams,
    model: PreTrainedModel,
    names: Sequence[str],
    inputs: Mapping[str, Path],
    folder: Path,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Rotate what is asked for; where nothing is said, heads, if inputs are rounded and the checkpoint lets it.

    Args:
        params: say what is rotated.
        model: is changed.
        names: paths of the maps that will be rounded.
        inputs: of the stage; `auto` needs its text.
        folder: where turned weights lie from now on: a whole model's heads are a good deal beside one block.
        progress: told where heads are not rotated.

    Returns:
        By path of a map: how it was rotated, and for `auto` the errors that decided it.

    Raises:
        StageError: see `rotation_choice.rotate`.
    """
    text = partial(calibration, inputs, params.window_tokens, params.windows or 8, progress)
    asked = dict.fromkeys(names, _precision(params))
    turn = partial(rotation_choice.rotate, model, asked=asked, text=text, searched=params.search == "auto")
    notes = _rotated(params, turn, progress)
    turned = [name for name, note in notes.items() if note["rotation"] != "off"]
    if turned:
        settle(folder / "rotated.safetensors", (model.get_submodule(name).weight for name in turned))
    return notes


def rounding(
    params: QuantizeParams,
    model: PreTrainedModel,
    names: Sequence[str],
    ids_NT: Tensor | None,
    folder: Path,
    progress: Progress,
) -> Rounding:
    """How each of these maps is rounded, with the ranges of what it reads.

    Args:
        params: what is asked for.
        model: rotated already.
        names: paths of the maps.
        ids_NT: calibration windows, where any are needed.
        folder: where what `auto` measures waits.
        progress: told where INT8 ranges are plain, though nobody asked for that.

    Raises:
        StageError: so few bits cannot be had, an activation is not finite, or a range cannot be moved.
    """
    made = Rounding(_precisions(params, model, names, ids_NT, folder), search=params.search == "auto")
    if params.scheme in ROUNDED_INPUTS:
        assert ids_NT is not None
        made.take(_ranges(params, model, names, ids_NT, progress))
    return made


def _precision(params: QuantizeParams) -> Precision:
    return {
        "int8_w8a8": Precision("int8", input_form="int8"),
        "int8_weight_only": Precision("int8"),
        "fp8_e4m3": Precision("fp8_e4m3", input_form="fp8_e4m3"),
        "int4_weight_only": Precision("int4", block=block_of(params)),
        "auto": Precision("int4", block=block_of(params)),
        "nvfp4": Precision("nvfp4", block=block_of(params)),
        "mxfp4": Precision("mxfp4", block=block_of(params)),
    }[params.scheme]


def _rotated(
    params: QuantizeParams, turn: Callable[[rotation_choice.How], dict[str, dict[str, Any]]], progress: Progress
) -> dict[str, dict[str, Any]]:
    if params.rotation is not None:
        return turn(params.rotation)
    if params.search == "off" or params.scheme not in ROUNDED_INPUTS:
        return {}
    try:
        return turn("heads")
    except StageError as error:
        progress.note(f"heads are not rotated: {error.what}")
        return {}


def _precisions(
    params: QuantizeParams, model: PreTrainedModel, names: Sequence[str], ids_NT: Tensor | None, folder: Path
) -> dict[str, Precision]:
    if params.scheme != "auto":
        return dict.fromkeys(names, _precision(params))
    assert ids_NT is not None
    forms = [Precision("int8"), _precision(params)]
    half_NT = ids_NT[: max(2, len(ids_NT) // 2)]
    # What rounds the maps afterwards keeps a decoder's answers to all windows in `folder`: these are to half of them.
    found = mixed_precision.measured(model, half_NT, forms, folder / "measured", Silent().advanced)
    parts = {name: options for name, options in found.items() if name in names}
    if params.loss is not None:
        return mixed_precision.under_loss(parts, forms, params.loss)
    assert params.bits is not None
    return mixed_precision.under_bits(parts, model, forms, params.bits)


def _ranges(
    params: QuantizeParams, model: PreTrainedModel, names: Sequence[str], ids_NT: Tensor, progress: Progress
) -> list[Decision]:
    """Ranges and float inputs of every site, and smoothing where it is known between which maps factors may move."""
    searched, kind = params.search == "auto", model.config.model_type
    known, every = kind in LLAMA_TYPE, None
    if not known and params.scheme == "int8_w8a8":
        refuse_moved(params, model)
        progress.note(f"no range is moved in models of type {kind}: between which maps one could is not known")
    if params.scheme != "int8_w8a8" and not searched:
        return []
    if not known:
        try:
            every = read_together(model, ids_NT[:1, :PROBE])
        except StageError as error:
            progress.note(f"inputs are rounded by the largest of the text: {error.what}")
            return []  # plain ranges are found on the way
    strengths = None if searched and known else (0.0,)
    strengths = strengths if params.smoothing is None else (params.smoothing,)
    observer = params.observer if searched else "minmax"
    how = How(str(_precision(params).input_form), observer, strengths, params.keep)
    return decided(model, names, ids_NT, how, every)


def refuse_moved(params: QuantizeParams, model: PreTrainedModel) -> None:
    """Raise StageError where ranges are asked for that a model of this type cannot have."""
    kind = model.config.model_type
    if params.smoothing:
        raise StageError(
            f"between which maps of a model of type {kind!r} ranges may move is not known",
            measured=f"smoothing: {params.smoothing}",
            limit=", ".join(LLAMA_TYPE),
            remedy="Take `smoothing` out of the step: inputs are then rounded as they are.",
        )
    runs = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
    if params.observer not in ("search", "minmax") and (model.config.is_encoder_decoder or len(blocks(model)) < runs):
        raise StageError(
            f"a model of type {kind!r} runs two stacks, or a block several times: inputs are rounded by their largest",
            measured=f"observer: {params.observer}",
            limit="search or minmax",
            remedy="Take `observer` out of the step.",
        )
