"""A checkpoint's maps in few bits, from the float checkpoint to the written one.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise.compress import compress
from stages.models.checkpoint import compressed_tensors, editing, kept_zeros
from stages.models.checkpoint.loading import save_model
from stages.models.layers import rounded_cache
from stages.models.layers.quantization_spec import annotate
from stages.quantize import cache_ranges, plan, proof, rounding
from stages.quantize.params import QuantizeParams
from stages.quantize.rounding import Rounding
from stages.runtime.contract import PARTIAL, Metrics, Progress

FITTED = 4
"""Where inputs are rounded, one window in so many fits maps: the fit wants fewer than the ranges, and costs more."""


def in_few_bits(params: QuantizeParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Plan, round and write; see QuantizeParams.

    Raises:
        StageError: the checkpoint is quantized already, a text is missing, what is asked for does not go with the
            model, or the written bytes do not show it.
    """
    model = plan.opened(inputs["model"], output / PARTIAL)
    block_parameters = anatomy.block_parameters(model)
    names = editing.matching(rounding.replaceable(model, progress), params.layers, params.skip)
    plan.check_block(params, {model.get_submodule(name).in_features for name in names})
    alone = plan.by_weights_alone(params)
    text_NT = plan.calibration_windows(params, inputs, progress, fitted=not alone)
    plan.check_cache(params, model)
    rotated = plan.rotated(params, model, names, inputs, output / PARTIAL, progress)
    planned = plan.rounding(params, model, names, text_NT, output / PARTIAL, progress)
    fitted_NT = None if alone else text_NT
    rows = _rounded(model, planned, fitted_NT, output / PARTIAL, progress)
    for row in rows:
        row |= rotated.get(row["layer"], {})
    tables = rounding.quantize_tables(model, progress) if params.embedding == "int8" else []
    caches = plan.rounded_caches(params, model, text_NT)
    notes = planned.notes | {name: {**planned.notes.get(name, {}), **note} for name, note in rotated.items()}
    annotate(model, {"scheme": params.scheme, **rounded_cache.described(model)}, notes)
    written = save_model(model, output, like=inputs["model"], layout=params.layout, progress=progress)
    _warn_of_mixed_forms(params, model, progress)
    editing.write_table(output, [*rows, *caches], scheme=params.scheme)
    kept = sum("kept" in note for note in planned.notes.values())
    progress.note(f"{len(rows)} maps and {len(tables)} tables quantized, {kept} maps kept in higher precision")
    proven = proof.proven(inputs["model"], output, [*(row["layer"] for row in rows), *tables])
    if proven["size_bytes"] >= proven["size_bytes_before"]:
        progress.note("the file did not shrink: its rows are so short that scales and names weigh more than is saved")
    return {
        **proven,
        **(cache_ranges.proven(output, caches) if caches else {}),
        **kept_zeros.carried(inputs["model"], written, output),
        "quantized_maps": float(len(rows)),
        "kept_maps": float(kept),
        "rotated_maps": float(sum(one["rotation"] != "off" for one in rotated.values())),
        "block_parameters": float(block_parameters),
        "bits_per_weight": proof.bits_per_weight(model),
        "largest_error_ratio": max((row["error"] for row in rows), default=0.0),
    }


def _rounded(
    model: PreTrainedModel, planned: Rounding, ids_NT: Tensor | None, folder: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Round the maps, fitted to what they should give on a text, or by their weights alone; returns a row a map."""
    if ids_NT is None:
        return rounding.plainly(model, planned, folder)
    fitted_NT = ids_NT[: max(2, len(ids_NT) // FITTED)] if planned.notes else ids_NT
    rows = compress(model, fitted_NT, planned, folder, progress)
    if idle := [name for name in planned.precision if isinstance(model.get_submodule(name), nn.Linear)]:
        progress.note(f"{len(idle)} maps stay in float, since no token of the text runs through them: {idle[0]} ...")
    return rows


def _warn_of_mixed_forms(params: QuantizeParams, model: PreTrainedModel, progress: Progress) -> None:
    if params.layout == compressed_tensors.METHOD and (unlike := compressed_tensors.unlike(model)):
        progress.note(
            f"vLLM needs one form for q, k and v, and for gate and up; {len(unlike)} modules mix: {unlike[0]}"
        )
