"""What removing channels costs the text of each source, where one fit over all of them makes up for it.

The damage to the whole is the mean of these, so that what one source never uses goes for nothing by its share of the
text alone; what decides is the source that is hurt most.

Shapes: F channels (the map's inputs), O outputs, g groups of s channels, k channels that go.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Sources:
    """The errors E||W a - W' a||^2 over each source's own text, exact at any time, as channels go one after another.

    With M the moment that the fit is made on, M_s that of a source and D = W' - W, the channels k whose removal turns
    W' by -v_kO^T M^-1[k] add tr(v^T A[k, k] v) - 2 tr(B[:, k] v), where A = M^-1 M_s M^-1 and B = D M_s M^-1. Both
    follow M^-1 as channels leave it, so that M_s is needed once. Where M_s is M, A is M^-1 and B is 0.
    """

    def __init__(self, w_OF: Tensor, inverse_FF: Tensor, moments: Sequence[Tensor], extra_F: Tensor) -> None:
        """Begin with all channels.

        Args:
            w_OF: float64.
            inverse_FF: of the moment of the fit, float64.
            moments: E[a a^T] of each source, weighed as its error shall count.
            extra_F: what caution added to the diagonal of the moment of the fit: it counts in every source.
        """
        self.errors = torch.zeros(len(moments), dtype=torch.float64)
        self._a, self._b = list[Tensor](), [torch.zeros_like(w_OF) for _ in moments]
        for moment_FF in moments:
            own_FF = moment_FF.to(torch.float64, copy=True)
            own_FF.diagonal().add_(extra_F)
            self._a.append(inverse_FF @ own_FF @ inverse_FF)

    def costs(self, turned_gsO: Tensor, groups_gs: Tensor) -> Tensor:
        """The largest rise over the sources if one of the groups goes next.

        Args:
            turned_gsO: M^-1[g, g]^-1 W'_g^T of each.
            groups_gs: their channels.
        """
        rises = []
        for a_FF, b_OF in zip(self._a, self._b, strict=True):
            own_gss = a_FF[groups_gs[:, :, None], groups_gs[:, None, :]]
            rises.append(((own_gss @ turned_gsO - 2 * b_OF.T[groups_gs]) * turned_gsO).sum((1, 2)))
        return torch.stack(rises).amax(0)

    def leave(self, now_k: Tensor, turned_kO: Tensor, step_kF: Tensor) -> None:
        """Channels go.

        Args:
            now_k: which.
            turned_kO: M^-1[k, k]^-1 W'_k^T.
            step_kF: M^-1[k, k]^-1 M^-1[k].
        """
        for place, (a_FF, b_OF) in enumerate(zip(self._a, self._b, strict=True)):
            own_kF = a_FF[now_k]
            self.errors[place] += ((own_kF[:, now_k] @ turned_kO - 2 * b_OF.T[now_k]) * turned_kO).sum()
            b_OF.addmm_(turned_kO.T, own_kF, alpha=-1)
            b_OF.addmm_(b_OF[:, now_k], step_kF, alpha=-1)
            a_FF.addmm_(a_FF[:, now_k], step_kF, alpha=-1)
            a_FF.addmm_(step_kF.T, a_FF[now_k], alpha=-1)
