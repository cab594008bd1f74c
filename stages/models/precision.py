"""Choose, site by site, how a model's maps are rounded, and put the rounded maps in their places.

Shapes: O outputs, I inputs, F factors of a site, M tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.grids import E4M3_TOP, nearest_e4m3
from stages.algorithms.rounding import fake_round, round_rows
from stages.algorithms.smoothing import RANGES, factors, input_scale, search
from stages.models import anatomy, quantized
from stages.models.anatomy import Block
from stages.models.encoding import rounded
from stages.models.folding import Site
from stages.models.observing import Observed
from stages.models.probing import maps
from stages.models.quantized import QuantizedEmbedding, QuantizedLinear
from stages.models.twin import Compressed, Seen


@dataclass(frozen=True)
class Precision:
    """How a map is stored and read: the form of its weights, the block of a scale, the form of its inputs."""

    form: str
    block: int | None = None
    input_form: str | None = None


HEADROOM = 2.0
"""FP8 ranges reach so many times the largest value seen: a float is as precise there, and nothing saturates."""


@dataclass(frozen=True)
class Decision:
    """How one site's inputs are rounded, and the error measured for it."""

    site: Site
    error: float
    factor_F: Tensor
    input_scale: float | None
    note: Mapping[str, str | float]


def decide(site: Site, observed: Observed, strengths: Sequence[float], clip: bool) -> Decision:
    """Search smoothing strength and INT8 input scale of one site on what its maps were seen to read."""
    maps_OI = [reader.weight.detach() for reader in site.readers.values()]
    weight_I = torch.stack([w_OI.abs().amax(0) for w_OI in maps_OI]).amax(0)
    tried = {strength: _factors(site, observed.sample.peak_I, weight_I, strength) for strength in strengths}
    candidates = [(strength, factor_F[site.index_I]) for strength, factor_F in tried.items()]
    found = search(maps_OI, observed.sample, candidates, _rows, ranges=RANGES if clip else ())
    assert found.reach is not None
    # The strength was judged on ranges of half the text; now the whole text sets them.
    factor_F = _factors(site, observed.peak_I, weight_I, found.strength)
    scale = input_scale(observed.peak_I, factor_F[site.index_I], found.reach)
    note = {"input_error": round(found.error, 8), "smoothing": found.strength, "range": found.reach}
    return Decision(site, found.error, factor_F, scale, note)


def _factors(site: Site, size_I: Tensor, weight_I: Tensor, strength: float) -> Tensor:
    count = int(site.index_I.max()) + 1
    return factors(_largest(size_I, site.index_I, count), _largest(weight_I, site.index_I, count), strength)


def _rows(w_OI: Tensor) -> Tensor:
    q_OI, scale_O = round_rows(w_OI)
    return q_OI * scale_O[:, None]


def spare(decisions: Sequence[Decision], share: float) -> list[Decision]:
    """Leave the sites with the largest errors in higher precision, as long as they hold at most `share` of the weights.

    Their maps get float inputs and no smoothing.
    """
    total = sum(_weights(one) for one in decisions)
    left = share * total
    kept: set[str] = set()
    for one in sorted(decisions, key=lambda one: -one.error):
        if _weights(one) <= left:
            kept.add(one.site.name)
            left -= _weights(one)
    return [_spared(one) if one.site.name in kept else one for one in decisions]


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


def _spared(one: Decision) -> Decision:
    why = "its outputs lost most with rounded inputs, so its inputs stay float"
    note: dict[str, str | float] = {"kept": why, "input_error": one.note["input_error"]}
    return replace(one, factor_F=torch.ones_like(one.factor_F), input_scale=None, note=note)


def _weights(one: Decision) -> int:
    return sum(reader.weight.numel() for reader in one.site.readers.values())


def _largest(value_I: Tensor, index_I: Tensor, count: int) -> Tensor:
    return torch.zeros(count).scatter_reduce_(0, index_I, value_I, "amax")


def names(model: PreTrainedModel) -> list[str]:
    """Paths in the model of every float map of its blocks, each under every name it has there."""
    return [f"{block.name}.{path}" for block in anatomy.blocks(model) for path in maps(block)]


def take(rounding: Rounding, decision: Decision) -> None:
    """Let a rounding follow what was decided for a site."""
    for name in decision.site.readers:
        rounding.notes[name] = decision.note
        if decision.input_scale is not None:
            rounding.input_scales[name] = decision.input_scale


def plainly(model: PreTrainedModel, rounding: Rounding) -> list[dict[str, Any]]:
    """Round every map to nearest by its weights alone. Returns a row a map."""
    rows = []
    for block in anatomy.blocks(model):
        for path, one in maps(block).items():
            name = f"{block.name}.{path}"
            w_OI, asked = one.weight.detach(), rounding.precision[name]
            rounding.apply(model, name, rounded(w_OI, asked.form, asked.block, None, search=rounding.search))
            new = model.get_submodule(name)
            assert isinstance(new, QuantizedLinear)
            missed = (new.dequantized() - w_OI).square().sum() / w_OI.square().sum().clamp_min(1e-30)
            rows.append({"layer": name, "block": block.index, "format": asked.form, "error": float(missed)})
    return rows


@dataclass
class Rounding:
    """A technique for `twin.compress`: every map of the blocks to few bits.

    Attributes:
        precision: by path in the model.
        search: scales are searched; otherwise the format's own.
        input_scales: by path; FP8 scales are found on the way.
        notes: by path, what the table and `quantization.json` say of a map.
    """

    precision: Mapping[str, Precision]
    search: bool = True
    input_scales: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def begin(self, names: Sequence[str], peak: float) -> None:
        """Take the range of FP8 inputs from the dense model's."""
        for name in names:
            if self.precision[name].input_form == "fp8_e4m3":
                self.input_scales[name] = HEADROOM * peak / E4M3_TOP or 1.0

    def read(self, name: str, z_MI: Tensor) -> Tensor:
        """The inputs as the map will read them."""
        scale, form = self.input_scales.get(name), self.precision[name].input_form
        if scale is None or form is None:
            return z_MI
        return fake_round(z_MI, scale) if form == "int8" else nearest_e4m3(z_MI / scale) * scale

    def compress(self, block: Block, found: Mapping[str, nn.Linear], seen: Seen) -> dict[str, Compressed]:
        """See `twin.Technique`. Maps that are rounded alike are rounded as one: their columns are the same."""
        made: dict[str, Compressed] = {}
        alike: dict[Precision, list[str]] = {}
        for path in found:
            alike.setdefault(self.precision[f"{block.name}.{path}"], []).append(path)
        for asked, paths in alike.items():
            weights = {path: found[path].weight.detach() for path in paths}
            targets = list((seen.targets(weights) if self.search else weights).values())
            inverse_II = seen.inverse_II if self.search else None
            tensors = rounded(torch.cat(targets), asked.form, asked.block, inverse_II, search=self.search)
            sizes = [len(target_OI) for target_OI in targets]
            for index, path in enumerate(paths):
                own = {name: (t.split(sizes)[index] if t.ndim else t).clone() for name, t in tensors.items()}
                made[path] = self._compressed(f"{block.name}.{path}", found[path], own, targets[index], seen)
        return made

    def _compressed(
        self, name: str, old: nn.Linear, tensors: dict[str, Tensor], target_OI: Tensor, seen: Seen
    ) -> Compressed:
        if (scale := self.input_scales.get(name)) is not None:
            tensors["input_scale"] = torch.tensor(scale)
        new, asked = self._module(old, name, tensors), self.precision[name]
        row = {
            "format": asked.form,
            "error_nearest": _error(target_OI, _nearest(old.weight.detach(), asked), seen.moment_II),
            "error": _error(target_OI, new.dequantized(), seen.moment_II),
        }
        return Compressed(tensors, row)

    def apply(self, model: PreTrainedModel, path: str, tensors: Mapping[str, Tensor]) -> None:
        """See `twin.Technique`."""
        weight = model.get_submodule(path).weight
        # Tied maps and bases that stand at several places keep one tensor.
        for name, old in list(model.named_modules()):
            if getattr(old, "weight", None) is not weight:
                continue
            own = {key: tensor if tensor.ndim else tensor.clone() for key, tensor in tensors.items()}
            if isinstance(old, QuantizedLinear):
                old.put(own)
            else:
                quantized.replace(model, name, self._module(old, path, own))

    def _module(self, old: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
        assert isinstance(old, nn.Linear)
        asked = self.precision[name]
        new = QuantizedLinear(
            old.in_features,
            old.out_features,
            form=asked.form,
            block=asked.block,
            input_form=asked.input_form if "input_scale" in tensors else None,
        )
        new.bias = None if old.bias is None else old.bias.detach()
        new.put(tensors)
        return new


def _nearest(w_OI: Tensor, asked: Precision) -> Tensor:
    made = QuantizedLinear(w_OI.shape[1], w_OI.shape[0], form=asked.form, block=asked.block)
    made.put(rounded(w_OI, asked.form, asked.block, None, search=False))
    return made.dequantized()


def _error(target_OI: Tensor, new_OI: Tensor, moment_II: Tensor) -> float:
    """E||(target - new) z||^2 / E||target z||^2."""
    away_OI = target_OI - new_OI
    size = ((target_OI @ moment_II) * target_OI).sum().clamp_min(torch.finfo(torch.float32).tiny)
    return float(((away_OI @ moment_II) * away_OI).sum() / size)
