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
CLIPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Input scales tried, as shares of the scale that reaches the largest value."""


@dataclass(frozen=True)
class Reading:
    """One linear map and a sample of what it reads."""

    w_OI: Tensor
    x_NI: Tensor


@dataclass(frozen=True)
class Found:
    """The best smoothing and clipping of one site.

    Attributes:
        strength: how much of the range moved into the weights, 0 to 1.
        factor_I: what activations are divided by and columns multiplied by.
        input_scale: of the INT8 activations after the division; None where inputs stay float.
        error: relative squared error of the outputs, mean over rows and maps.
    """

    strength: float
    factor_I: Tensor
    input_scale: float | None
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
    readings: Sequence[Reading],
    candidates: Sequence[tuple[float, Tensor]],
    round_weights: Callable[[Tensor], Tensor],
    *,
    clips: Sequence[float] | None = CLIPS,
) -> Found:
    """The candidate whose rounded maps come closest to the float maps on the sample.

    The error of a row is measured against that row's own output, so that a few tokens of huge magnitude do not decide
    for all others.

    Args:
        readings: the maps of one site.
        candidates: (strength, factor_I) to try; first come first kept among equals.
        round_weights: w_OI -> w_OI rounded and back in float.
        clips: shares of the plain input scale to try, falling; the first that is no better ends the search. None
            leaves inputs float.

    Returns:
        The best found.
    """
    targets = [(one, one.x_NI @ one.w_OI.t()) for one in readings]
    best: Found | None = None
    for strength, factor_I in candidates:
        scale = None if clips is None else _plain_scale(readings, factor_I)
        found = Found(strength, factor_I, scale, _error(targets, factor_I, scale, round_weights))
        best = found if best is None or found.error < best.error else best
    assert best is not None
    if best.input_scale is None or clips is None:
        return best
    plain = best.input_scale
    for clip in clips:
        error = _error(targets, best.factor_I, plain * clip, round_weights)
        if error >= best.error:
            break
        best = Found(best.strength, best.factor_I, plain * clip, error)
    return best


def _plain_scale(readings: Sequence[Reading], factor_I: Tensor) -> float:
    return max(float((one.x_NI / factor_I).abs().max()) for one in readings) / 127 or 1.0


def _error(
    targets: Sequence[tuple[Reading, Tensor]],
    factor_I: Tensor,
    scale: float | None,
    round_weights: Callable[[Tensor], Tensor],
) -> float:
    total = 0.0
    for one, y_NO in targets:
        x_NI = one.x_NI / factor_I
        x_NI = x_NI if scale is None else fake_round(x_NI, scale)
        missed_N = (x_NI @ round_weights(one.w_OI * factor_I).t() - y_NO).square().sum(1)
        size_N = y_NO.square().sum(1)
        total += float((missed_N / (size_N + size_N.median())).mean())
    return total / len(targets)
