"""Which map is stored in how many bits: what each form of each map would lose, and the best choice under one limit.

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.allocation import NOTHING, Option, allocate, hull
from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise.map_statistics import statistics_of
from stages.models.layers.quantized_linear import FORMS, QuantizedLinear
from stages.quantize.rounding import Precision
from stages.quantize.stored_forms import rounded
from stages.runtime.contract import StageError

Parts = Mapping[str, Sequence[Option]]
"""Path of a map -> what each smaller form saves (bits) and loses (nats a token); `rank` is the form's place."""


def bits(asked: Precision, inputs: int, outputs: int) -> int:
    """Stored bits of a map with its scales."""
    form = FORMS[asked.form]
    scales = inputs // asked.block if asked.block else 1
    return outputs * (inputs * form.bits + scales * form.scale.itemsize * 8) + 32 * form.two_level


def measured(
    model: PreTrainedModel,
    ids_NT: Tensor,
    forms: Sequence[Precision],
    folder: Path,
    advanced: Callable[[float, float], None],
) -> dict[str, list[Option]]:
    """What each form after the first would save and lose, for every map of the blocks.

    The loss is that of rounding to nearest, to second order: half the Fisher information of the outputs times their
    squared error. Fitted and rounded by columns, maps lose less, but in about the same proportion. What the pass keeps
    of every block waits in `folder`.

    Raises:
        StageError: a map stands on a basis, or an activation is not finite.
    """
    options: dict[str, list[Option]] = {}
    for block, seen in statistics_of(model, ids_NT, folder, advanced):
        for path, one in anatomy.maps(block).items():
            if not isinstance(one, nn.Linear):
                raise StageError(
                    f"{block.name}.{path} is no dense map, which mixed precision does not measure",
                    remedy="Give one scheme to all maps.",
                )
            if path not in seen.first:
                continue  # no token runs through it, so that nobody knows what it would lose
            w_OI, moment_II, gradient_O = one.weight.detach(), seen.moments[seen.first[path]], seen.gradients[path]
            losses = [_loss(w_OI, form, moment_II, gradient_O) for form in forms]
            sizes = [bits(form, one.in_features, one.out_features) for form in forms]
            options[f"{block.name}.{path}"] = [
                Option(sizes[0] - sizes[place], max(0.0, losses[place] - losses[0]), place)
                for place in range(1, len(forms))
            ]
    return dict(sorted(options.items()))


def under_bits(parts: Parts, model: PreTrainedModel, forms: Sequence[Precision], most: float) -> dict[str, Precision]:
    """The forms that lose least with at most `most` stored bits a weight on average.

    Raises:
        StageError: even the smallest forms take more.
    """
    maps = {name: model.get_submodule(name) for name in parts}
    shapes = {name: (int(one.in_features), int(one.out_features)) for name, one in maps.items()}
    weights = sum(inputs * outputs for inputs, outputs in shapes.values())
    largest = sum(bits(forms[0], *shape) for shape in shapes.values())
    best = largest - sum(max(option.saved for option in options) for options in parts.values())
    if best > most * weights:
        raise StageError(
            "the maps cannot be stored in so few bits",
            measured=f"{best / weights:.3f} bits a weight at best",
            limit=f"{most:g}",
            remedy="Raise `bits`, or let more inputs share a scale by a larger `block`.",
        )
    chosen = allocate(list(parts.values()), max(0, largest - int(most * weights)))
    return {name: forms[option.rank] for name, option in zip(parts, chosen, strict=True)}


def under_loss(parts: Parts, forms: Sequence[Precision], most: float) -> dict[str, Precision]:
    """The forms that take least with a predicted loss of at most `most` nats a token."""
    steps = [
        ((after.damage - before.damage) / (after.saved - before.saved), name, after)
        for name, options in parts.items()
        for before, after in pairwise(hull(options))
    ]
    chosen, lost = dict.fromkeys(parts, NOTHING), 0.0
    for _, name, option in sorted(steps, key=lambda step: step[:2]):
        more = option.damage - chosen[name].damage
        if lost + more <= most:
            chosen[name], lost = option, lost + more
    return {name: forms[option.rank] for name, option in chosen.items()}


def _loss(w_OI: Tensor, asked: Precision, moment_II: Tensor, gradient_O: Tensor) -> float:
    made = QuantizedLinear(w_OI.shape[1], w_OI.shape[0], form=asked.form, block=asked.block)
    made.put(rounded(w_OI, asked.form, asked.block, None))
    away = made.dequantized() - w_OI
    return float(((away @ moment_II) * away).sum(1) @ gradient_O.to(torch.float32)) / 2
