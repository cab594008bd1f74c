"""Static ranges of what maps read: smoothing and scale of each site, and which sites are better left in float.

Shapes: O outputs, I inputs, F factors of a site, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.grids import E4M3_TOP
from stages.algorithms.observers import OBSERVERS
from stages.algorithms.rounding import round_rows
from stages.algorithms.smoothing import RANGES, STRENGTHS, factors, input_scale, phase, search
from stages.models.blockwise.activations import Observed, observed
from stages.models.blockwise.run import worth
from stages.models.memory.pages import forget
from stages.quantize.movable_scales import Site, sites
from stages.runtime.contract import StageError

ROWS = 384
"""Sampled rows of each site's inputs on which strengths and ranges are judged."""
WORTH_TOKENS = 256
"""Tokens that tell which maps the loss depends on most: the answer is an average over all that they read."""
CUT = 0.01
"""Relative error of a site's outputs from which INT8 ranges cut something off: plain rounding costs a fifth of it."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class How:
    """How ranges are chosen.

    Attributes:
        form: `int8` or `fp8_e4m3`.
        observer: `search` for the least error of the outputs, or a name of `OBSERVERS` for INT8.
        smoothing: INT8: strengths tried; None for the usual ones.
        keep: largest share of the maps' weights whose inputs stay float.
    """

    form: str
    observer: str = "search"
    smoothing: tuple[float, ...] | None = None
    keep: float = 0.0


@dataclass(frozen=True)
class Decision:
    """How one site's inputs are rounded, and what that loses.

    Attributes:
        site: whose maps read them.
        need: nats a token of a usual token, to second order, that rounding the inputs loses for each weight.
        cut: whether the error of the outputs is so large that the range must cut off the few huge tokens: that harms
            short prompts, and it does not show in a usual token.
        factor_F: divides what is written, multiplies what reads it.
        input_scale: of the rounded inputs; None where they stay float.
        note: for `quantization.json`.
    """

    site: Site
    need: float
    cut: bool
    factor_F: Tensor
    input_scale: float | None
    note: Mapping[str, str | float]


def decided(
    model: PreTrainedModel, names: Sequence[str], ids_NT: Tensor, how: How, every: Sequence[Site] | None = None
) -> list[Decision]:
    """A decision for every site with one of these maps; nothing is folded yet.

    Args:
        model: a float model.
        names: paths of the maps that are rounded.
        ids_NT: calibration windows.
        how: ranges are chosen.
        every: the sites; those of the Llama type by default.

    Raises:
        StageError: fewer than two windows, an activation is not finite, or INT8 ranges cannot be moved past a tied
            tensor.
    """
    every = sites(model) if every is None else every
    decisions = {site.name: site for site in every if any(name in names for name in site.readers)}
    places: dict[int, list[nn.Module]] = {}
    for one in model.modules():
        places.setdefault(id(getattr(one, "weight", None)), []).append(one)
    maps = {
        site.name: [one for reader in site.readers.values() for one in places[id(reader.weight)]]
        for site in decisions.values()
    }
    if how.form == "int8" and how.smoothing != (0.0,):
        for site in decisions.values():
            _check_movable(site, places)
    worths = worth(model, ids_NT[:1, :WORTH_TOKENS])
    made = []
    for name, seen in observed(model, maps, ids_NT, rows=ROWS):
        made.append(_decide(decisions[name], seen, how, worths))
        for reader in decisions[name].readers.values():
            forget(reader.weight)
    return _spare(made, how.keep)


def _check_movable(site: Site, places: Mapping[int, Sequence[nn.Module]]) -> None:
    """Raise StageError where a factor that divides what is written would change something else, too."""
    writers, count = {id(writer) for writer in site.writers}, int(site.index_I.max()) + 1
    for writer in site.writers:
        weight: Tensor = writer.weight  # type: ignore[assignment]
        if len(weight) != count or any(id(one) not in writers for one in places[id(weight)]):
            raise StageError(
                f"what writes the input of {site.name} shares its tensor with another map, so no range can be moved",
                remedy="Set `smoothing: 0`, or take fp8_e4m3, int8_weight_only or int4_weight_only, which move none.",
            )


def _decide(site: Site, seen: Observed, how: How, worths: Mapping[str, float]) -> Decision:
    maps_OI = [reader.weight.detach() for reader in site.readers.values()]
    none_F = torch.ones(int(site.index_I.max()) + 1)
    if how.form == "fp8_e4m3":
        found = phase(maps_OI, seen.sample)
        scale = float(seen.peak_I.max()) * found.reach / E4M3_TOP or 1.0
        loss = _loss(site, found.errors, worths)
        note = {"input_loss_nats": round(loss, 8), "range": round(found.reach, 6)}
        return Decision(site, loss / _weights(site), False, none_F, scale, note)
    weight_I = torch.stack([w_OI.abs().amax(0) for w_OI in maps_OI]).amax(0)
    tried = {s: _factors(site, seen.sample.peak_I, weight_I, s) for s in how.smoothing or STRENGTHS}
    candidates = [(strength, factor_F[site.index_I]) for strength, factor_F in tried.items()]
    searched = how.observer == "search"
    found = search(maps_OI, seen.sample, candidates, round_rows, ranges=RANGES if searched else ())
    # The strength was judged on ranges of half the text; now the whole text sets them.
    factor_F, reach = _factors(site, seen.peak_I, weight_I, found.strength), found.reach
    factor_I = factor_F[site.index_I]
    if not searched:
        size_NI = (seen.sample.x_NI / factor_I).abs()
        reach = OBSERVERS[how.observer](size_NI, seen.sample.weight_N) / max(float(size_NI.max()), _TINY) or 1.0
    loss = _loss(site, found.errors, worths)
    note = {
        "input_error": round(found.error, 8),
        "input_loss_nats": round(loss, 8),
        "smoothing": found.strength,
        "range": round(reach, 6),
    }
    scale = input_scale(seen.peak_I, factor_I, reach)
    return Decision(site, loss / _weights(site), found.error > CUT, factor_F, scale, note)


def _loss(site: Site, errors: Sequence[float], worths: Mapping[str, float]) -> float:
    """Relative errors of a site's outputs as nats a token: each times what the whole output is worth."""
    return sum(
        error * sum(value for path, value in worths.items() if name == path or name.startswith(f"{path}."))
        for name, error in zip(site.readers, errors, strict=True)
    )


def _factors(site: Site, size_I: Tensor, weight_I: Tensor, strength: float) -> Tensor:
    count = int(site.index_I.max()) + 1
    return factors(_largest(size_I, site.index_I, count), _largest(weight_I, site.index_I, count), strength)


def _largest(value_I: Tensor, index_I: Tensor, count: int) -> Tensor:
    return torch.zeros(count).scatter_reduce_(0, index_I, value_I, "amax")


def _spare(decisions: Sequence[Decision], share: float) -> list[Decision]:
    """Leave float inputs to the sites that need them most, as long as they hold at most that share of the weights."""
    left = share * sum(_weights(one.site) for one in decisions)
    kept: set[str] = set()
    for one in sorted(decisions, key=lambda one: (not one.cut, -one.need)):
        if _weights(one.site) <= left:
            kept.add(one.site.name)
            left -= _weights(one.site)
    return [_spared(one) if one.site.name in kept else one for one in decisions]


def _spared(one: Decision) -> Decision:
    why = "it is among those that lose most with rounded inputs, so its inputs stay float"
    note = {"kept": why} | {name: value for name, value in one.note.items() if name.startswith("input_")}
    return replace(one, factor_F=torch.ones_like(one.factor_F), input_scale=None, note=note)


def _weights(site: Site) -> int:
    return sum(reader.weight.numel() for reader in site.readers.values())
