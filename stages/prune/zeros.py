"""Zeros in a model's maps: how many where, which, and what is proven of those that were written.

Shapes: N windows, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.allocation import allocate
from stages.algorithms.basis import damped
from stages.algorithms.refit import output_errors, refit
from stages.algorithms.sparsegpt import DAMPING, pruned
from stages.algorithms.sparsity import Keep, by_rows, largest, of_each, prices, wanda
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.blockwise.compress import compress
from stages.models.blockwise.gradients import gradients
from stages.models.blockwise.map_statistics import statistics_of
from stages.models.blockwise.site_moments import Seen
from stages.models.blockwise.technique import Compressed, OnWeights, put
from stages.models.checkpoint import kept_zeros
from stages.models.checkpoint.json_files import read_json
from stages.models.checkpoint.layout import ZEROS
from stages.models.memory.pages import forget, release, trim
from stages.models.memory.saved_state import settle
from stages.models.memory.spill import Shelf
from stages.runtime.contract import Progress, StageError
from stages.runtime.progress import Pass

SHARES = tuple(step / 20 for step in range(2, 20))
"""Shares of kept weights that a map may be given; fewer than a tenth ruins any map."""
PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}
COLUMNS = 64
"""Columns that SparseGPT decides together where no pattern says how many."""


@dataclass(frozen=True)
class How:
    """How weights are chosen: `method`, an N:M `pattern` or the share to `keep`, and `names`, the maps' paths."""

    method: str
    pattern: str | None
    keep: float
    names: Collection[str]


@dataclass(frozen=True)
class Found:
    """Zeros and all weights of the pruned maps."""

    zeros: int
    weights: int


def sparsified(
    model: PreTrainedModel, ids_NT: Tensor, how: How, partial: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Put zeros into every map of every block; returns a row a map.

    Raises:
        StageError: an activation is not finite, a map is not dense, or so many zeros cannot be had.
    """
    passes = 1 + (how.pattern is None)
    first, last = Pass(progress, 0, passes), Pass(progress, passes - 1, passes)
    shares = budgets(model, ids_NT, how, partial, first.advanced) if how.pattern is None else {}
    kept = keepers(model, how, shares)
    if how.method in ("wanda", "sparsegpt"):
        technique = OnWeights(Masked(kept, mend=how.method == "sparsegpt"))
        return compress(model, ids_NT, technique, partial, last)
    blocks, slopes = anatomy.blocks(model), Shelf(partial)
    if how.method == "gradient":
        for block, found in zip(reversed(blocks), gradients(model, ids_NT, partial, last.advanced), strict=True):
            slopes.put(block.index, found)
    return [row for block in blocks for row in _by_scores(model, block, kept, slopes.take(block.index), partial)]


def _by_scores(
    model: PreTrainedModel,
    block: Block,
    kept: Mapping[str, tuple[Keep, int]],
    slopes: Mapping[str, Tensor],
    partial: Path,
) -> list[dict[str, Any]]:
    """Zeros in one block's maps where a weight, times its gradient if there is one, is small; they wait on disk."""
    rows = []
    for path in [path for inner in anatomy.maps(block) if (path := f"{block.name}.{inner}") in kept]:
        w_OI = model.get_submodule(path).weight.detach()
        mask_OI = kept[path][0](w_OI.abs() * slopes[path] if slopes else w_OI.abs())
        put(model, path, w_OI * mask_OI)
        forget(w_OI)
        rows.append({"layer": path, "zeros": float((~mask_OI).float().mean())})
    if rows:
        settle(
            partial / f"zeros-{block.index:04d}.safetensors", (model.get_submodule(row["layer"]).weight for row in rows)
        )
        release(block.module)
        trim()
    return rows


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The dense maps of all blocks by path.

    Raises:
        StageError: a map stands on a basis: its factors' zeros would not be the map's.
    """
    maps: dict[str, nn.Linear] = {}
    for block in anatomy.blocks(model):
        for inner, one in anatomy.maps(block).items():
            path = f"{block.name}.{inner}"
            if not isinstance(one, nn.Linear):
                raise not_dense(path)
            maps[path] = one
    return maps


def not_dense(path: str) -> StageError:
    """Why a map on a basis gets no zeros."""
    return StageError(f"{path} is no dense map", remedy="Prune single weights before sharing or factorizing.")


def keepers(model: PreTrainedModel, how: How, shares: Mapping[str, float]) -> dict[str, tuple[Keep, int]]:
    """Path -> how a mask is chosen there, and how many columns are decided together.

    Raises:
        StageError: a pattern's group does not divide a map's inputs.
    """
    maps = {path: one for path, one in linears(model).items() if path in how.names}
    if how.pattern is None:
        return {path: (largest(share), _divisor(maps[path].in_features)) for path, share in shares.items()}
    kept, group = PATTERNS[how.pattern]
    for path, one in maps.items():
        if one.in_features % group:
            raise StageError(
                f"{how.pattern} does not divide the inputs of {path}",
                measured=f"{one.in_features} inputs",
                limit=f"a multiple of {group}",
                remedy="Give no `pattern`, or one that divides.",
            )
    return dict.fromkeys(maps, (of_each(kept, group), group))


def _divisor(inputs: int) -> int:
    return next(columns for columns in range(min(COLUMNS, inputs), 0, -1) if inputs % columns == 0)


def budgets(
    model: PreTrainedModel, ids_NT: Tensor, how: How, partial: Path, advanced: Callable[[float, float], None]
) -> dict[str, float]:
    """Path -> share of weights that stays, `how.keep` over all, least where the measured loss is least.

    Raises:
        StageError: `keep` is below the least share of every map, or an activation is not finite.
    """
    maps = {path: one for path, one in linears(model).items() if path in how.names}
    keep, options = how.keep, {}
    for block, seen in statistics_of(model, ids_NT, partial, advanced):
        for inner in anatomy.maps(block):
            path = f"{block.name}.{inner}"
            if path in maps and inner in seen.first:
                moment_II, importance_O = seen.moments[seen.first[inner]], seen.gradients[inner]
                options[path] = prices(maps[path].weight.detach(), moment_II, importance_O, SHARES)
    total = sum(one.weight.numel() for one in maps.values())
    best = sum(max(option.saved for option in found) for found in options.values())
    if best < total - int(keep * total):
        raise StageError(
            "pruning single weights cannot remove so much",
            measured=f"keep {1 - best / total:.4f} at best",
            limit=f"keep {keep}",
            remedy="Raise `keep`.",
        )
    # A map that no token runs through stays whole: nobody knows what its zeros would cost.
    chosen = allocate([options.get(path, []) for path in maps], total - int(keep * total))
    return {path: SHARES[one.rank] if one.saved else 1.0 for path, one in zip(maps, chosen, strict=True)}


@dataclass(frozen=True)
class Masked:
    """Zeros in every map of a site as a technique of one pass.

    Attributes:
        keepers: by path: how a mask is chosen, and how many columns are decided together.
        mend: by SparseGPT towards what the dense model gives, what stays fitted; otherwise Wanda's mask alone.
    """

    keepers: Mapping[str, tuple[Keep, int]]
    mend: bool

    def compress(self, block: Block, maps: Mapping[str, nn.Linear], seen: Seen) -> dict[str, Compressed]:
        """See Technique."""
        mine = {inner: one for inner, one in maps.items() if f"{block.name}.{inner}" in self.keepers}
        if not mine:
            return {}
        keeps, groups = zip(*(self.keepers[f"{block.name}.{inner}"] for inner in mine), strict=True)
        weights = {inner: one.weight.detach().float() for inner, one in mine.items()}
        if not self.mend:
            made = [
                w_OI * keep(wanda(w_OI, seen.moment_II)) for keep, w_OI in zip(keeps, weights.values(), strict=True)
            ]
            targets = list(weights.values())
        else:  # what one input is read by is mended as one map: the columns' costs are the same
            seen.damping = DAMPING
            targets = list(seen.targets(weights).values())
            sizes = [len(w_OI) for w_OI in targets]
            new_OI = _mended(torch.cat(targets), seen, by_rows(keeps, sizes), groups[0])
            made = list(new_OI.split(sizes))
        return {
            inner: _row(w_OI, target_OI, new_OI, seen.moment_II)
            for (inner, w_OI), target_OI, new_OI in zip(weights.items(), targets, made, strict=True)
        }

    def apply(self, model: PreTrainedModel, path: str, tensors: Mapping[str, Tensor]) -> None:
        """See Technique."""
        put(model, path, tensors["weight"])


def _mended(target_OI: Tensor, seen: Seen, keep: Keep, group: int) -> Tensor:
    w_OI = pruned(target_OI, seen.moment_II, keep, group, damping=seen.damping, root_II=seen.root_II)
    return refit(w_OI, target_OI, damped(seen.moment_II, seen.damping).float(), w_OI != 0)


def _row(w_OI: Tensor, target_OI: Tensor, new_OI: Tensor, moment_II: Tensor) -> Compressed:
    cut, left = output_errors(target_OI, [w_OI * (new_OI != 0), new_OI], moment_II)
    zeros = float((new_OI == 0).float().mean())
    row = {"zeros": zeros, "output_error_ratio_cut": cut, "output_error_ratio": left}
    return Compressed({"weight": new_OI.contiguous()}, row)


def save(written: PreTrainedModel, names: Collection[str], output: Path, like: Path) -> None:
    """Say how many zeros stand in the maps in `names` and in those that `like` says were pruned before.

    A zero that stands in another map by chance is promised to nobody.
    """
    brought = read_json(like / ZEROS, optional=True)
    kept_zeros.save(written, {f"{path}.weight" for path in names} | brought.keys(), output)


def proven(model: PreTrainedModel, written: PreTrainedModel, how: How) -> Found:
    """Zeros of the written checkpoint against those of the model that was to be written, and what was asked.

    Raises:
        StageError: a weight stands where there was a zero, or zeros are too few.
    """
    zeros = weights = 0
    for path in how.names:
        w_OI, own_OI = (one.get_submodule(path).weight.detach() for one in (written, model))
        stands_OI = w_OI != 0
        wrong = int((stands_OI & (own_OI == 0)).sum())
        if how.pattern:
            most, group = PATTERNS[how.pattern]
            wrong += int((stands_OI.unflatten(1, (-1, group)).sum(2) > most).sum())
        if wrong:
            raise StageError(
                f"{path} does not have the zeros that were asked",
                measured=f"{wrong} weights too many",
                limit=0,
                remedy="This is a defect: please report it with the recipe.",
            )
        zeros, weights = zeros + int((~stands_OI).sum()), weights + w_OI.numel()
        forget(w_OI)
        forget(own_OI)
    if not how.pattern and weights - zeros > how.keep * weights:
        raise StageError(
            "the written checkpoint has fewer zeros than were asked",
            measured=f"{weights - zeros} weights stand",
            limit=f"{how.keep * weights:.0f}",
            remedy="This is a defect: please report it with the recipe.",
        )
    return Found(zeros, weights)
