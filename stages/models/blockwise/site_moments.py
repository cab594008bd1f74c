"""What the maps of one site read in two models side by side, and the map that makes the one answer like the other.

Shapes: M tokens at once, I inputs and O outputs of a map.

Source: least squares on the inputs of both models, as in GPTAQ (Li et al. 2025) and QEP (Arai and Ichikawa 2025); the
drift of the residual stream is added here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from stages.algorithms.correction import DAMPING, STRENGTH, agreement, corrected, inverse_root
from stages.algorithms.products import SHORT, gram, product
from stages.models.blockwise.run import check_finite


@dataclass
class Moments:
    """What the maps of one site read over a part of the calibration text, as sums over its tokens.

    Attributes:
        moment_II: z z^T of the compressed model's inputs.
        drift_II: (x - z) z^T, the dense model's inputs less the compressed one's.
        residual_OI: by path, (r - s) z^T for a map whose output is added to the stream: r what the dense model adds
            it to, s what the compressed one does.
    """

    moment_II: Tensor
    drift_II: Tensor
    residual_OI: dict[str, Tensor] = field(default_factory=dict)

    def add(self, x_MI: Tensor, z_MI: Tensor, gaps: Mapping[str, Tensor], gram_II: Tensor) -> None:
        """Add tokens: both models' inputs, by path the gap between what both add to, [M, O], and z z^T."""
        self.moment_II += gram_II
        # The drift is small beside the inputs: eight bits of mantissa are enough for it, and twice as fast.
        short_MI = z_MI.to(SHORT)
        self.drift_II += product((x_MI.float() - z_MI).to(SHORT).T, short_MI)
        for path, gap_MO in gaps.items():
            sum_OI = product(gap_MO.to(SHORT).T, short_MI).float()
            self.residual_OI[path] = self.residual_OI[path] + sum_OI if path in self.residual_OI else sum_OI


@dataclass
class Seen(Moments):
    """The whole text, the sums divided by its tokens.

    Attributes:
        half: sums over the first half of every few windows' tokens.
        tokens: of the whole text.
        damping: of a fit, a share of the mean squared input.
        sources: E[z z^T] over the windows of each source, where they were asked for.
    """

    half: Moments | None = None
    tokens: int = 0
    damping: float = DAMPING
    sources: Mapping[str, Tensor] = field(default_factory=dict)

    def target(self, path: str, w_OI: Tensor) -> Tensor:
        """W*, float32: the map to compress instead of `w_OI`."""
        return self.targets({path: w_OI})[path]

    def targets(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same for several maps of the site at once, which takes less time."""
        w_OI, sizes = torch.cat(list(maps.values())).float(), [len(one) for one in maps.values()]
        strength = STRENGTH
        if self.half is not None:
            parts = (self.half, self._rest(self.half))
            residuals = [_stacked(part, maps) for part in parts]
            strength = agreement(
                w_OI, [p.moment_II for p in parts], [p.drift_II for p in parts], residuals, self.damping
            )
            del parts, residuals
        new_OI = corrected(w_OI, self.root_II, self.drift_II, _stacked(self, maps), strength=strength)
        return dict(zip(maps, new_OI.split(sizes), strict=True))

    def _rest(self, half: Moments) -> Moments:
        """The other half's sums: not kept, since moments of wide maps are the most that a pass holds."""
        residual = {path: self.residual_OI[path] * self.tokens - sum_OI for path, sum_OI in half.residual_OI.items()}
        return Moments(
            (self.moment_II * self.tokens).sub_(half.moment_II),
            (self.drift_II * self.tokens).sub_(half.drift_II),
            residual,
        )

    def fitted(self) -> None:
        """Give back what targets alone need, once all of them are there: of wide maps it is as much as they are."""
        self.half, self.drift_II = None, self.drift_II.new_empty(0)
        self.residual_OI.clear()
        self.__dict__.pop("root_II", None)

    @cached_property
    def root_II(self) -> Tensor:
        """Of the damped moment's inverse, upper, float32."""
        return inverse_root(self.moment_II, self.damping)


class SourceSums:
    """z z^T over the windows of each source, sums until they are asked for."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._sums: dict[str, Tensor] = {}
        self._tokens: Counter[str] = Counter()

    def add(self, first: int, window_M: Tensor, z_MI: Tensor) -> Tensor:
        """Add tokens of some windows.

        Args:
            first: number of the first of them; of a block that runs several times, all windows come as often.
            window_M: how many windows after it each token stands.
            z_MI: what was read.

        Returns:
            z z^T of all of them.
        """
        if not self._names or not len(z_MI):
            return gram(z_MI)
        each = []
        for number in window_M.unique().tolist():
            name, own_MI = self._names[(first + number) % len(self._names)], z_MI[window_M == number]
            each.append(gram(own_MI))
            self._sums[name] = self._sums[name].add_(each[-1]) if name in self._sums else each[-1].clone()
            self._tokens[name] += len(own_MI)
        return each[0] if len(each) == 1 else torch.stack(each).sum(0)

    def means(self) -> dict[str, Tensor]:
        """Source -> E[z z^T]; used up."""
        return {name: self._sums.pop(name).div_(self._tokens[name]) for name in sorted(self._sums)}


def _stacked(part: Moments, maps: Mapping[str, Tensor]) -> Tensor | None:
    if not part.residual_OI.keys() & maps.keys():
        return None
    none = {path: torch.zeros(len(w_OI), w_OI.shape[1]) for path, w_OI in maps.items()}
    return torch.cat([part.residual_OI.get(path, none[path]) for path in maps])


def whole(name: str, one: Moments, other: Moments, tokens: int) -> Seen:
    """The text from its halves; what `other` holds is used up.

    Raises:
        StageError: what the maps called `name` read is not finite.
    """
    residual = {path: other.residual_OI[path].add_(sum_OI).div_(tokens) for path, sum_OI in one.residual_OI.items()}
    moment_II = other.moment_II.add_(one.moment_II).div_(tokens)
    drift_II = other.drift_II.add_(one.drift_II).div_(tokens)
    seen = Seen(moment_II, drift_II, residual, one, tokens)
    for moment in (seen.moment_II, seen.drift_II, *residual.values()):
        check_finite(name, moment)
    return seen
