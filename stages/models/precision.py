"""Choose, site by site, how a decoder's maps are rounded, and put the rounded maps in their places.

Shapes: O outputs, I inputs, F factors of a site, B block length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.rounding import round_blocks, round_rows
from stages.algorithms.smoothing import RANGES, factors, input_scale, search
from stages.models import anatomy
from stages.models.folding import Site, fold
from stages.models.observing import Observed
from stages.models.quantized import QuantizedEmbedding, QuantizedLinear, pack_int4

COARSE = (1.0, 0.88)
"""Block scales tried while a smoothing strength is judged; the final rounding tries many more."""


@dataclass(frozen=True)
class Precision:
    """Widths asked for: of weights, of inputs (8, or None for float), and the block of a scale (None: a row)."""

    weight_bits: int
    input_bits: int | None
    block: int | None


SPARED = Precision(weight_bits=8, input_bits=None, block=None)


@dataclass(frozen=True)
class Decision:
    """How one site is rounded, and the error measured for it."""

    site: Site
    precision: Precision
    error: float
    factor_F: Tensor
    input_scale: float | None
    importance_I: Tensor
    note: Mapping[str, str | float]


def decide(site: Site, observed: Observed, precision: Precision, strengths: Sequence[float], clip: bool) -> Decision:
    """Search smoothing strength and input scale of one site on what its maps were seen to read."""
    maps_OI = [reader.weight.detach() for reader in site.readers.values()]
    # INT8 inputs are limited by their peak; for weights in blocks the usual size of what they multiply counts.
    size_I = observed.mean_square_I.sqrt() if precision.input_bits is None else observed.sample.peak_I
    weight_I = torch.stack([w_OI.abs().amax(0) for w_OI in maps_OI]).amax(0)
    tried = {strength: _factors(site, precision, size_I, weight_I, strength) for strength in strengths}
    ranges = None if precision.input_bits is None else (RANGES if clip else ())
    candidates = [(strength, factor_F[site.index_I]) for strength, factor_F in tried.items()]
    found = search(maps_OI, observed.sample, candidates, _rounding(precision), ranges=ranges)
    note = {"error": round(found.error, 8), "smoothing": found.strength}
    if found.reach is None:
        return Decision(site, precision, found.error, tried[found.strength], None, observed.mean_square_I, note)
    # The strength was judged on ranges of half the text; now the whole text sets them.
    factor_F = _factors(site, precision, observed.peak_I, weight_I, found.strength)
    scale = input_scale(observed.peak_I, factor_F[site.index_I], found.reach)
    return Decision(
        site, precision, found.error, factor_F, scale, observed.mean_square_I, {**note, "range": found.reach}
    )


def _factors(site: Site, precision: Precision, size_I: Tensor, weight_I: Tensor, strength: float) -> Tensor:
    count = int(site.index_I.max()) + 1
    weight_F = torch.ones(count) if precision.input_bits is None else _largest(weight_I, site.index_I, count)
    return factors(_largest(size_I, site.index_I, count), weight_F, strength)


def as_is(site: Site) -> Decision:
    """INT8 weights by rows and nothing else: no text is needed, and the error is that of the weights themselves."""
    missed = size = 0.0
    for reader in site.readers.values():
        q_OI, scale_O = round_rows(reader.weight.detach())
        missed += float((q_OI * scale_O[:, None] - reader.weight.detach()).square().sum())
        size += float(reader.weight.detach().square().sum())
    ones_F, ones_I = torch.ones(int(site.index_I.max()) + 1), torch.ones(len(site.index_I))
    error = missed / (size or 1.0)
    return Decision(site, SPARED, error, ones_F, None, ones_I, {"error": round(error, 8)})


def spare(decisions: Sequence[Decision], share: float) -> list[Decision]:
    """Leave the sites with the largest errors in higher precision, as long as they hold at most `share` of the weights.

    Their maps get INT8 weights and float inputs, and no smoothing.
    """
    total = sum(_weights(one) for one in decisions)
    left = share * total
    kept: set[str] = set()
    for one in sorted(decisions, key=lambda one: -one.error):
        if _weights(one) <= left:
            kept.add(one.site.name)
            left -= _weights(one)
    return [_spared(one) if one.site.name in kept else one for one in decisions]


def apply(model: PreTrainedModel, decisions: Sequence[Decision]) -> dict[str, Mapping[str, str | float]]:
    """Fold every site's factors, then replace the maps. Returns the note of each replaced map, by path."""
    # A map that one site reads with is written by another (v, up, a basis): all factors first, then the rounding.
    for one in decisions:
        fold(one.site, one.factor_F)
    notes: dict[str, Mapping[str, str | float]] = {}
    for one in decisions:
        notes |= _replaced(model, one)
    return notes


def _replaced(model: PreTrainedModel, decision: Decision) -> dict[str, Mapping[str, str | float]]:
    notes: dict[str, Mapping[str, str | float]] = {}
    for reader in decision.site.readers.values():
        weight = reader.weight
        tensors = _rounded(weight.detach(), decision)
        same = [(name, one) for name, one in model.named_modules() if getattr(one, "weight", None) is weight]
        for name, old in same:
            anatomy.replace(model, old, _filled(old, tensors, decision))
            notes[name] = decision.note
    return notes


def quantize_tables(model: PreTrainedModel) -> list[str]:
    """INT8 rows for the embedding and the head; one table where they are tied. Returns the replaced paths."""
    embedding, head = anatomy.embedding(model), anatomy.head(model)
    table_VH: Tensor = embedding.weight  # type: ignore[assignment]
    new = QuantizedEmbedding(*table_VH.shape)
    new.weight, new.weight_scale = round_rows(table_VH.detach())
    out = QuantizedLinear(int(head.in_features), int(head.out_features), bias=head.bias is not None)  # type: ignore[arg-type]
    out.bias = head.bias  # type: ignore[assignment]
    tied = head.weight is table_VH
    out.weight, out.weight_scale = (
        (new.weight, new.weight_scale) if tied else round_rows(head.weight.detach())  # type: ignore[operator]
    )
    names = {id(module): name for name, module in model.named_modules()}
    anatomy.replace(model, embedding, new)
    anatomy.replace(model, head, out)
    return [names[id(embedding)], names[id(head)]]


def _rounding(precision: Precision) -> Callable[[Tensor], Tensor]:
    def rows(w_OI: Tensor) -> Tensor:
        q_OI, scale_O = round_rows(w_OI, precision.weight_bits)
        return q_OI * scale_O[:, None]

    def blocks(w_OI: Tensor) -> Tensor:
        assert precision.block is not None
        q_OI, scale_OG = round_blocks(w_OI, precision.weight_bits, precision.block, ratios=COARSE)
        return (q_OI.unflatten(1, (-1, precision.block)) * scale_OG[..., None]).flatten(1)

    return rows if precision.block is None else blocks


def _rounded(w_OI: Tensor, decision: Decision) -> tuple[Tensor, Tensor]:
    asked = decision.precision
    if asked.block is None:
        return round_rows(w_OI, asked.weight_bits)
    factor_I = decision.factor_F[decision.site.index_I]
    q_OI, scale_OG = round_blocks(w_OI, asked.weight_bits, asked.block, decision.importance_I / factor_I.square())
    return (pack_int4(q_OI) if asked.weight_bits == 4 else q_OI), scale_OG


def _filled(old: nn.Module, tensors: tuple[Tensor, Tensor], decision: Decision) -> QuantizedLinear:
    assert isinstance(old, nn.Linear)
    asked, scale = decision.precision, decision.input_scale
    new = QuantizedLinear(old.in_features, old.out_features, bits=asked.weight_bits, block=asked.block)
    new.weight, new.weight_scale = tensors
    new.bias = None if old.bias is None else old.bias.detach()
    new.input_scale = None if scale is None else torch.tensor(scale)
    return new


def _spared(one: Decision) -> Decision:
    why = "its outputs lost most with the scheme's rounding, so its inputs stay float and its weights INT8"
    note: dict[str, str | float] = {"kept": why, "error": one.note["error"]}
    return replace(one, precision=SPARED, factor_F=torch.ones_like(one.factor_F), input_scale=None, note=note)


def _weights(one: Decision) -> int:
    return sum(reader.weight.numel() for reader in one.site.readers.values())


def _largest(value_I: Tensor, index_I: Tensor, count: int) -> Tensor:
    return torch.zeros(count).scatter_reduce_(0, index_I, value_I, "amax")
