"""Move the difficulty of outlier channels from activations into weights, as far as it lowers the measured error.

Shapes: N rows of activations, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.algorithms.grids import E4M3_TOP, nearest_e4m3
from stages.algorithms.products import SHORT, product
from stages.algorithms.rounding import fake_round

STRENGTHS = (0.0, 0.5, 0.7, 0.8, 0.9)
PHASES = tuple(2.0 ** (1 - step / 8) for step in range(8))
RANGES = ((1.15, 1.3, 1.5, 1.75, 2.0), (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2))
"""Input scales tried upwards and downwards, as shares of the scale that reaches the largest value seen."""


@dataclass(frozen=True)
class Sample:
    """What a site's maps read, kept apart from what its ranges come from.

    Attributes:
        peak_I: largest absolute value of each channel in one part of the text.
        x_NI: rows from another part, so that a range too narrow for unseen text shows.
        weight_N: how many tokens each row stands for.
    """

    peak_I: Tensor
    x_NI: Tensor
    weight_N: Tensor


@dataclass(frozen=True)
class Found:
    """The best smoothing and range of one site.

    Attributes:
        strength: how much of the range moved into the weights, 0 to 1.
        reach: the range as a share of the largest value seen.
        errors: relative squared error of each map's outputs, mean over tokens.
    """

    strength: float
    reach: float
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        """Mean over the maps."""
        return sum(self.errors) / len(self.errors)


def factors(peak_I: Tensor, weight_peak_I: Tensor, strength: float) -> Tensor:
    """Channel factors peak ** strength / weight_peak ** (1 - strength), scaled to a geometric mean of 1.

    Args:
        peak_I: largest absolute activation of each channel.
        weight_peak_I: largest absolute weight that reads each channel.
        strength: 0 leaves all as it is; 1 moves the activations' whole range into the weights.

    Returns:
        factor_I, positive. Channels that are never used get 1.

    Raises:
        ValueError: strength is outside 0..1.

    Source: Xiao et al. 2023, SmoothQuant, equation 4; strength 0 means no smoothing here.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength} is outside 0..1")
    if strength == 0:
        return torch.ones_like(peak_I)
    used_I = (peak_I > 0) & (weight_peak_I > 0)
    log_I = strength * peak_I.clamp_min(1e-12).log() - (1 - strength) * weight_peak_I.clamp_min(1e-12).log()
    centre = log_I[used_I].mean() if used_I.any() else torch.zeros(())
    # Beyond e**12 a factor would leave the range in which float32 keeps the function exact to 1e-5.
    return torch.where(used_I, log_I - centre, torch.zeros_like(log_I)).clamp(-12, 12).exp()


def search(
    maps_OI: Sequence[Tensor],
    sample: Sample,
    candidates: Sequence[tuple[float, Tensor]],
    round_weights: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    ranges: Sequence[Sequence[float]] = RANGES,
) -> Found:
    """The candidate whose rounded maps come closest to the float maps on the sample.

    The error of a row is measured against that row's own output, so that a few tokens of huge magnitude do not decide
    for all others.

    Args:
        maps_OI: weights of the maps that read one input.
        sample: that input.
        candidates: (strength, factor_I) to try; the first is kept among equals.
        round_weights: w_OI -> integers q_OI and their scale_O.
        ranges: each a row of shares to try until one is no better.

    Returns:
        The best found.
    """
    w_OI = torch.cat(list(maps_OI))
    judge = _Judge.of(w_OI, [len(one) for one in maps_OI], sample)
    measured = []
    for strength, factor_I in candidates:
        q_OI, scale_O = round_weights(w_OI * factor_I)
        smoothed = _Smoothed(factor_I, q_OI.to(SHORT), scale_O, sample.x_NI / factor_I)
        measured.append((Found(strength, 1.0, judge.errors(smoothed, 1.0)), smoothed))
        measured = [min(measured, key=lambda one: one[0].error)]
    [(best, smoothed)] = measured
    for reaches in ranges:
        for tried in reaches:
            found = Found(best.strength, tried, judge.errors(smoothed, tried))
            if found.error >= best.error:
                break
            best = found
    return Found(best.strength, best.reach, judge.errors(smoothed, best.reach, exact=True))


def phase(maps_OI: Sequence[Tensor], sample: Sample) -> Found:
    """The FP8 range of inputs within an octave above the largest value whose rounding comes closest on the sample.

    A float is as precise in any range, but its neighbours are twice as far apart above a power of two as below: where
    a few channels carry most of the energy it matters on which side they fall. Weights are not rounded here.

    Args:
        maps_OI: weights of the maps that read one input.
        sample: that input.
    """
    w_OI = torch.cat(list(maps_OI))
    judge = _Judge.of(w_OI, [len(one) for one in maps_OI], sample)
    short_OI, top = w_OI.to(SHORT).t(), float(sample.peak_I.max()) or 1.0
    best: Found | None = None
    for reach in PHASES:
        step = top * reach / E4M3_TOP
        y_NO = product(nearest_e4m3(sample.x_NI / step).to(SHORT), short_OI).float().mul_(step)
        found = Found(0.0, reach, judge.missed(y_NO))
        best = found if best is None or found.error < best.error else best
    assert best is not None
    return best


def input_scale(peak_I: Tensor, factor_I: Tensor, reach: float) -> float:
    """The step of INT8 inputs whose range reaches `reach` times the largest smoothed value."""
    return float((peak_I / factor_I).max()) * reach / 127 or 1.0


@dataclass(frozen=True)
class _Smoothed:
    """What one choice of factors makes of a site: its rounded weights, integers in a short float, and the sample."""

    factor_I: Tensor
    q_OI: Tensor
    scale_O: Tensor
    x_NI: Tensor


@dataclass(frozen=True)
class _Judge:
    """The outputs of a site's float maps, and how an error in them counts."""

    sample: Sample
    y_NO: Tensor
    sizes: list[int]
    scale_NM: Tensor

    @classmethod
    def of(cls, w_OI: Tensor, sizes: list[int], sample: Sample) -> _Judge:
        y_NO = product(sample.x_NI, w_OI.t())
        size_NM = _of_maps(y_NO.square(), sizes)
        return cls(sample, y_NO, sizes, sample.weight_N[:, None] / (size_NM + size_NM.median(0).values))

    def errors(self, smoothed: _Smoothed, reach: float, *, exact: bool = False) -> tuple[float, ...]:
        """See `missed`, of rounded inputs and weights; if not `exact`, to about three hundredths and in less time."""
        step = input_scale(self.sample.peak_I, smoothed.factor_I, reach)
        q_NI, q_OI = fake_round(smoothed.x_NI / step, 1.0), smoothed.q_OI
        y_NO = product(q_NI, q_OI.float().t()) if exact else product(q_NI.to(SHORT), q_OI.t()).float()
        y_NO.mul_(smoothed.scale_O * step)
        return self.missed(y_NO)

    def missed(self, y_NO: Tensor) -> tuple[float, ...]:
        """For each map the mean over tokens of the squared error against a token's own output. `y_NO` is used up."""
        square_NM = _of_maps(y_NO.sub_(self.y_NO).square_(), self.sizes)
        return tuple(((square_NM * self.scale_NM).sum(0) / self.sample.weight_N.sum()).tolist())


def _of_maps(square_NO: Tensor, sizes: list[int]) -> Tensor:
    return torch.stack([part.sum(1) for part in square_NO.split(sizes, dim=1)], dim=1)
