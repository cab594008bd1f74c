"""A model with an encoder and a decoder in two graphs, written and proven.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.runtime.contract import StageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from stages.export.checks import Expected
    from stages.graphs.onnx_graph import Held

_REMEDY = "Take `export` and what follows it out of the recipe, and judge the checkpoint itself."


def refuse_unwritten(chosen: type[PreTrainedModel], task: str, opset: int, *, cache: bool, whole: bool) -> None:
    """Refuse a model with an encoder and a decoder that no graphs are written of.

    Args:
        chosen: its class.
        task: what it is for.
        opset: that is asked for.
        cache: whether graphs may keep what they read.
        whole: whether they compute in 32 bits.
    """
    from stages.export.to_onnx import FUSED_ATTENTION

    name = chosen.__name__
    if task != "translate":
        raise StageError(
            f"{name} has an encoder and a decoder and writes no answer: it cannot be exported yet",
            measured=f"its task is {task}",
            limit="translate",
            remedy=_REMEDY,
        )
    if not chosen._can_set_attn_implementation():
        raise StageError(
            f"{name} has an encoder and a decoder and computes attention by itself: it cannot be exported yet",
            measured="attention of its own",
            limit="transformers' interface of attention functions",
            remedy=_REMEDY,
        )
    if opset < FUSED_ATTENTION:
        raise StageError(
            "an encoder and a decoder need an operator for attention",
            measured=f"opset {opset}",
            limit=f"opset {FUSED_ATTENTION}",
            remedy=f"Set `opset: {FUSED_ATTENTION}`.",
        )
    if not cache:
        raise StageError(
            "a decoder behind an encoder is written with a cache alone",
            measured="cache: false",
            limit="cache: true",
            remedy="Leave `cache` out.",
        )
    if not whole:
        raise StageError(
            "an encoder and a decoder are written in 32-bit floats alone",
            measured="16 bits",
            limit="dtype: fp32",
            remedy="Leave `dtype` out.",
        )


def export_stacks(
    model: PreTrainedModel, graph: Path, wanted: Expected, ids_NT: NDArray[np.int64], most: int
) -> tuple[Held, float, dict[str, Any]]:
    """Write both graphs and prove them; the model is laid out anew in place.

    Args:
        model: from `load_model`.
        graph: where the decoder's goes; the encoder's and the weights stand beside it.
        wanted: what they must hold and say.
        ids_NT: windows by which that is known.
        most: tokens that a text or an answer has at most.

    Returns:
        What was written, the largest logit difference, and what `graph.json` says of it.

    Raises:
        StageError: the exporter refuses, or a check fails.
    """
    from stages.export import cached, to_onnx, two_stacks
    from stages.export.cache_checks import require_answered_numbers
    from stages.export.checks import require_effect
    from stages.graphs import components, onnx_graph
    from stages.serving.translating import whole_manner_of

    how, name = whole_manner_of(model), type(model).__name__
    try:
        own, cross = two_stacks.layer_caches(model)
        made = to_onnx.with_two_stacks(model, (own, cross))
    except cached.NotCached as reason:
        raise StageError(f"{name} cannot be exported", measured=str(reason), remedy=_REMEDY) from reason
    components.save([made["decoder"], made["encoder"]], graph)
    written = onnx_graph.held(*components.load(graph))
    require_effect(written, wanted)
    files = dict(zip(("decoder", "encoder"), components.files(graph), strict=True))
    described = {
        part: {"file": files[part].name, "inputs": inputs, "outputs": outputs, "state": state}
        for part, (inputs, outputs, state) in two_stacks.names(len(own)).items()
    }
    kept = {"dtype": "float32", "maximum": most, "layers": [one.described() for one in own], "rows_apart": True}
    kept["cross"] = [one.described() for one in cross]
    told = {"components": described, "cache": kept, "answers": asdict(how)}
    return written, require_answered_numbers(graph, ids_NT, wanted, how), told
