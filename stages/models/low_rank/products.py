"""Maps as products of thin ones, fitted in one pass to what the dense model gives.

Shapes: I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms import basis, low_rank, low_rank_sparse
from stages.algorithms.refit import output_errors
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.anatomy.plainness import plain
from stages.models.blockwise.compress import compress
from stages.models.blockwise.site_moments import Seen
from stages.models.blockwise.technique import Compressed, OnWeights
from stages.models.layers import sparse_linear
from stages.models.layers.low_rank_linear import ResidualLinear, SharedLinear
from stages.models.layers.sparse_linear import SparseLinear
from stages.models.low_rank.planning import RANK_STEP, Measured, Plan, dense, filled
from stages.runtime.contract import Progress, StageError
from stages.runtime.progress import Pass


@dataclass(frozen=True)
class Done:
    """The table of a finished compression, and the loss that was expected of it in nats a token, to second order."""

    rows: list[dict[str, Any]]
    predicted: float


class TooMuch(StageError):
    """So much cannot be saved; of `total` parameters of the blocks `best` would be left at least."""

    def __init__(self, best: int, total: int, asked: Asked) -> None:
        super().__init__(
            f"bases in groups of up to {asked.group} blocks cannot save so much",
            measured=f"keep {best / total:.4f} at best",
            limit=f"keep {asked.keep}",
            remedy="Raise `keep`, or allow more maps.",
        )
        self.best = best


@dataclass(frozen=True)
class Asked:
    """What is to be put on bases, and how much goes.

    Attributes:
        keep: share of the blocks' parameters that stays.
        kinds: roles joined by `+`: maps that may share a basis, in a block or across `group` neighbours; None for
            every map by itself.
        group: most neighbours on one basis; 1 for none.
        names: paths of the maps that may change; None for every one that stands on no basis.
        sparse: of maps alone: share of what a map keeps that goes to single weights beside its product, where these
            make its outputs better than a product of the same size.
    """

    keep: float
    kinds: Sequence[str] | None = None
    group: int = 1
    names: Collection[str] | None = None
    sparse: float = 0.0


def compressed(model: PreTrainedModel, ids_NT: Tensor, asked: Asked, partial: Path, progress: Progress) -> Done:
    """Put maps on bases of low rank until at most `asked.keep` of the blocks' parameters are left.

    Args:
        model: is changed.
        ids_NT: calibration windows.
        asked: where and how much.
        partial: folder for state.
        progress: told of both passes.

    Raises:
        TooMuch: so much cannot be saved.
        StageError: an activation is not finite.
    """
    kinds = None if asked.kinds is None else [tuple(kind.split("+")) for kind in asked.kinds]
    names = [name for name in asked.names or dense(model) if plain(model.get_submodule(name))]
    measured = Measured(model, kinds, asked.group, names)
    measured.measure(ids_NT, partial, Pass(progress, 0, 2).advanced)
    left = sorted({*(asked.names or []), *measured.idle} - ({*names} - {*measured.idle}))
    if left:
        progress.note(f"{len(left)} maps stay as they are, since they are not called as maps: {left[0]} ...")
    total = anatomy.block_parameters(model)
    wanted = total - int(asked.keep * total)
    if measured.most < wanted:
        raise TooMuch(total - measured.most, total, asked)
    plans = measured.plan(measured.chosen(wanted))
    del measured  # its moments are the larger part of what is held
    return fitted(model, ids_NT, LowRank(plans, asked.sparse), partial, Pass(progress, 1, 2))


def fitted(model: PreTrainedModel, ids_NT: Tensor, how: LowRank, partial: Path, progress: Progress) -> Done:
    """Put the planned maps on their bases; arguments and errors are those of `compressed`."""
    rows = compress(model, ids_NT, OnWeights(how, idle=True, reads=how.reads), partial, progress)
    return Done(rows, sum(plan.option.damage / len(plan.part.paths) for plan in how.plans.values()))


@dataclass(frozen=True)
class LowRank:
    """Compression of the planned maps into products of thin ones, each fitted to what the dense model gives."""

    plans: Mapping[str, Plan]
    sparse: float = 0.0

    def reads(self, block: Block, site: Sequence[str], _adding: Collection[str]) -> bool:
        """See OnWeights: the moments of what planned maps read."""
        return any(f"{block.name}.{inner}" in self.plans for inner in site)

    def compress(self, block: Block, maps: Mapping[str, nn.Linear], seen: Seen) -> dict[str, Compressed]:
        """See Technique. A shared basis stands already; a map alone gets the best for what it reads now."""
        made = {}
        for inner, linear in maps.items():
            if plan := self.plans.get(f"{block.name}.{inner}"):
                target_OI = seen.target(inner, linear.weight.detach())
                path = f"{block.name}.{inner}"
                made[inner] = (
                    _with_sparse(path, plan, target_OI, seen.moment_II, self.sparse)
                    if self.sparse and plan.basis is None
                    else _product(path, plan, target_OI, seen.moment_II)
                )
        return made

    def apply(self, model: PreTrainedModel, path: str, tensors: Mapping[str, Tensor]) -> None:
        """See Technique."""
        old, plan = model.get_submodule(path), self.plans[path]
        inner = filled(tensors["right"], None) if plan.basis is None else plan.basis
        old = old.dense if isinstance(old, ResidualLinear) else old
        old = old.coefficient if isinstance(old, SharedLinear) else old
        assert isinstance(old, nn.Linear | SparseLinear)
        if "values" not in tensors:
            model.set_submodule(path, SharedLinear(inner, filled(tensors["left"], old.bias)))
            return
        part = sparse_linear.filled(tensors, old.out_features, old.in_features, old.bias)
        model.set_submodule(path, ResidualLinear(part, SharedLinear(inner, filled(tensors["left"], None))))


def _product(path: str, plan: Plan, target_OI: Tensor, moment_II: Tensor) -> Compressed:
    if plan.basis is not None:
        right_rI = plan.basis.weight.detach()
        tensors = {"left": basis.fitted(target_OI, right_rI, moment_II).float()}
    else:
        left_Or, right_rI = low_rank.cut(low_rank.factors(target_OI, moment_II, plan.importance_O), plan.option.rank)
        tensors = {"left": left_Or.float().contiguous(), "right": right_rI.float().contiguous()}
    (error,) = output_errors(target_OI, [tensors["left"] @ right_rI.float()], moment_II)
    return Compressed(tensors, _row(path, plan, plan.option.rank, error))


def _with_sparse(path: str, plan: Plan, target_OI: Tensor, moment_II: Tensor, share: float) -> Compressed:
    """A thinner product and single weights in the parameters of the planned one, or that one where it loses less."""
    rank = max(RANK_STEP, int((1 - share) * plan.option.rank / RANK_STEP) * RANK_STEP)
    best, alone = low_rank_sparse.within(target_OI, moment_II, plan.option.rank, rank, plan.importance_O)
    tensors = {"left": best.left_Or, "right": best.right_rI}
    # In what is judged by: the error of outputs by their importance, of which the others of the row know nothing.
    more: dict[str, Any] = {"error_against_product_alone": 1.0 if best is alone else best.error / alone.error}
    if best is alone:
        more |= {"sparse_weights": 0, "sparse": "none: a product of the same size loses less"}
    else:
        tensors |= sparse_linear.tensors(best.sparse_OI)
        more |= {"sparse_weights": len(tensors["values"])}
    (error,) = output_errors(target_OI, [best.left_Or @ best.right_rI + best.sparse_OI], moment_II)
    return Compressed(tensors, _row(path, plan, len(best.right_rI), error) | more)


def _row(path: str, plan: Plan, rank: int, error: float) -> dict[str, Any]:
    paths = plan.part.paths
    return {
        "rank": rank,
        "shares_with": [other for other in paths if other != path],
        "predicted_loss_nats": plan.option.damage / len(paths),
        "output_error_ratio": error,
    }
