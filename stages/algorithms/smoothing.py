"""Move the difficulty of outlier channels from activations into weights, as far as it lowers the measured error.

Shapes: N rows of activations, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.algorithms.rounding import fake_round

STRENGTHS = (0.0, 0.5, 0.7, 0.8, 0.9)
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
        reach: the INT8 range as a share of the largest value seen; None where inputs stay float.
        error: relative squared error of the outputs, mean over tokens and maps.
    """

    strength: float
    reach: float | None
    error: float


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
    round_weights: Callable[[Tensor], Tensor],
    *,
    ranges: Sequence[Sequence[float]] | None = RANGES,
) -> Found:
    """The candidate whose rounded maps come closest to the float maps on the sample.

    The error of a row is measured against that row's own output, so that a few tokens of huge magnitude do not decide
    for all others.

    Args:
        maps_OI: weights of the maps that read one input.
        sample: that input.
        candidates: (strength, factor_I) to try; the first is kept among equals.
        round_weights: w_OI -> w_OI rounded and back in float.
        ranges: each a row of shares to try until one is no better; None leaves inputs float.

    Returns:
        The best found.
    """
    targets = [(w_OI, sample.x_NI @ w_OI.t()) for w_OI in maps_OI]
    reach = None if ranges is None else 1.0
    measured = [
        (Found(strength, reach, _error(targets, sample, factor_I, reach, round_weights)), factor_I)
        for strength, factor_I in candidates
    ]
    best, factor_I = min(measured, key=lambda one: one[0].error)
    for reaches in ranges or ():
        for tried in reaches:
            error = _error(targets, sample, factor_I, tried, round_weights)
            if error >= best.error:
                break
            best = Found(best.strength, tried, error)
    return best


def input_scale(peak_I: Tensor, factor_I: Tensor, reach: float) -> float:
    """The step of INT8 inputs whose range reaches `reach` times the largest smoothed value."""
    return float((peak_I / factor_I).max()) * reach / 127 or 1.0


def _error(
    targets: Sequence[tuple[Tensor, Tensor]],
    sample: Sample,
    factor_I: Tensor,
    reach: float | None,
    round_weights: Callable[[Tensor], Tensor],
) -> float:
    x_NI = sample.x_NI / factor_I
    if reach is not None:
        x_NI = fake_round(x_NI, input_scale(sample.peak_I, factor_I, reach))
    total = 0.0
    for w_OI, y_NO in targets:
        missed_N = (x_NI @ round_weights(w_OI * factor_I).t() - y_NO).square().sum(1)
        size_N = y_NO.square().sum(1)
        ratio_N = missed_N / (size_N + size_N.median())
        total += float((ratio_N * sample.weight_N).sum() / sample.weight_N.sum())
    return total / len(targets)
