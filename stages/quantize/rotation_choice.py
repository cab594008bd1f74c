"""Where a rotation helps: what rounding loses with it and without it, on what the maps read.

Shapes: O outputs, I inputs, D coordinates that one rotation mixes, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.rounding import round_rows
from stages.algorithms.smoothing import RANGES, Sample, phase, search
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.blockwise.activations import observed
from stages.quantize.rotation import Use, heads, of_heads, of_values, stream, turn
from stages.quantize.rounding import Precision, nearest

How = Literal["off", "heads", "stream", "auto"]
ROWS = 384
"""Sampled rows of inputs on which it is judged whether a rotation helps."""


def rotate(
    model: PreTrainedModel, how: How, asked: Mapping[str, Precision], text: Callable[[], Tensor], *, searched: bool
) -> dict[str, dict[str, Any]]:
    """Rotate heads, heads and stream, or (`auto`) the heads of the blocks where that lowers what rounding loses.

    Args:
        model: is changed in place.
        how: see above.
        asked: how maps are rounded, by path.
        text: for `auto`, gives ids_NT of calibration windows.
        searched: scales and ranges are searched.

    Returns:
        By path of a map: how it was rotated, and for `auto` the errors that decided it.

    Raises:
        StageError: see `heads` and `stream`.
    """
    if how == "off":
        return {}
    blocks = anatomy.blocks(model)
    lost = judged(model, asked, text(), searched=searched) if how == "auto" else {}
    chosen = [block for block in blocks if not lost or lost[block.index][1] < lost[block.index][0]]
    if chosen:
        heads(model, chosen)
    if how == "stream":
        stream(model)
        return {path: {"rotation": "stream"} for path in asked}
    notes: dict[str, dict[str, Any]] = {}
    for block in blocks:
        note: dict[str, Any] = {"rotation": "heads" if block in chosen else "off"}
        if lost:
            plain, rotated = lost[block.index]
            note |= {"error_unrotated": round(plain, 8), "error_rotated": round(rotated, 8)}
        notes |= {use.path: note for use in of_heads(block)}
    return notes


def judged(
    model: PreTrainedModel, asked: Mapping[str, Precision], ids_NT: Tensor, *, searched: bool
) -> dict[int, tuple[float, float]]:
    """Index of each block -> what rounding v and o loses as they are, and rotated: relative squared errors, summed.

    Blocks that share a tensor have one sum. Maps that are not asked for count nothing.

    Raises:
        StageError: see `heads`; an activation is not finite.
    """
    blocks = anatomy.blocks(model)
    r_DD = of_values(model, blocks)
    uses = {id(use.module.weight): use for block in blocks for use in of_heads(block) if use.path in asked}
    places: dict[str, list[nn.Module]] = {use.path: [] for use in uses.values()}
    for module in model.modules():
        if (use := uses.get(id(getattr(module, "weight", None)))) is not None:
            places[use.path].append(module)
    weight_of = {use.path: weight for weight, use in uses.items()}
    lost = {
        weight_of[path]: _lost(uses[weight_of[path]], seen.sample, asked[path], r_DD, searched)
        for path, seen in observed(model, places, ids_NT, rows=ROWS)
    }
    found: dict[int, tuple[float, float]] = {}
    for weights, together in _groups(blocks):
        sides = sorted(lost[weight] for weight in weights if weight in lost)  # so that sums do not depend on addresses
        both = sum(plain for plain, _ in sides), sum(rotated for _, rotated in sides)
        found |= dict.fromkeys([block.index for block in together], both)
    return found


def _groups(blocks: Sequence[Block]) -> list[tuple[set[int], list[Block]]]:
    """Blocks whose v and o share tensors, each group with the tensors' identities."""
    groups: list[tuple[set[int], list[Block]]] = []
    for block in blocks:
        weights, some = {id(use.module.weight) for use in of_heads(block)}, [block]
        for group in [one for one in groups if one[0] & weights]:
            groups.remove(group)
            weights, some = weights | group[0], group[1] + some
        groups.append((weights, some))
    return groups


def _lost(use: Use, sample: Sample, asked: Precision, r_DD: Tensor, searched: bool) -> tuple[float, float]:
    w_OI = use.module.weight.detach()  # type: ignore[operator]
    if not (sample.x_NI @ w_OI.T).any():
        return 0.0, 0.0  # the dense part of a map that is all low rank
    turned_OI, x_NI = w_OI.clone(), sample.x_NI.clone()
    if use.axis == "reads":
        turn(turned_OI, r_DD)
        turn(x_NI, r_DD)
    else:
        turn(turned_OI.t(), r_DD)
    return _error(w_OI, sample.x_NI, sample, asked, searched), _error(turned_OI, x_NI, sample, asked, searched)


def _error(w_OI: Tensor, x_NI: Tensor, sample: Sample, asked: Precision, searched: bool) -> float:
    """Of the outputs, each token's against its own, by rounded weights and inputs."""
    of_rows = replace(sample, peak_I=x_NI.abs().amax(0), x_NI=x_NI)
    if asked.input_form == "int8":
        none_I = torch.ones(w_OI.shape[1])
        return search([w_OI], of_rows, [(0.0, none_I)], round_rows, ranges=RANGES if searched else ()).error
    y_NO = x_NI @ w_OI.T
    square_N = y_NO.square().sum(1)
    missed_N = (x_NI @ nearest(w_OI, asked, search=searched).T - y_NO).square().sum(1)
    of_weights = float((missed_N / (square_N + square_N.median()) * sample.weight_N).sum() / sample.weight_N.sum())
    return of_weights + (phase([w_OI], of_rows).error if asked.input_form else 0.0)
