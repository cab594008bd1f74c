"""Channels and heads that go, block by block, while the blocks before are pruned already.

Shapes: G units (channels, or groups of heads), P of them that stay, K their inputs of the map that reads them, F all of
its inputs, O its outputs, R those of its basis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.channels import least_important, output_error, reconstructed
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.blockwise.compress import compress
from stages.models.blockwise.site_moments import Seen
from stages.models.blockwise.technique import Compressed, OnWeights, mended, put
from stages.prune import units as surgery
from stages.prune.cut_proof import proven
from stages.prune.target import Asked, Rows, cannot
from stages.prune.units import CHANNELS, Units
from stages.runtime.contract import Progress


@dataclass(frozen=True)
class Plan:
    """What stays of every block.

    Attributes:
        what: CHANNELS or HEADS.
        kept: how many of each of a block's units, block by block.
        fields: of the configuration that say so; none where `structure.json` has to.
    """

    what: str
    kept: Sequence[Sequence[int]]
    fields: Mapping[str, int]


def narrow(model: PreTrainedModel, ids_NT: Tensor, what: str, asked: Asked, progress: Progress) -> Rows:
    """Take the same share of channels or groups of heads out of every block; what reads them is fitted again.

    Raises:
        StageError: see `plan`, or an activation is not finite.
    """
    made = plan(model, what, asked)
    rows = compress(model, ids_NT, OnWeights(Narrow(made)), asked.partial, progress)
    said(model, made)
    return rows


def plan(model: PreTrainedModel, what: str, asked: Asked) -> Plan:
    """How many of every block's units stay, proven on a copy to be all that it takes.

    Args:
        model: in memory or on the meta device.
        what: CHANNELS or HEADS.
        asked: parameters that may stay, and for channels what their number is a multiple of.

    Raises:
        StageError: so much cannot go, the units cannot go alone, or the architecture is not understood.
    """
    surgery.check_free(model, what)
    every = [(block, surgery.of(block, what)) for block in anatomy.blocks(model)]
    multiple, total = asked.multiple if what == CHANNELS else 1, anatomy.block_parameters(model)
    each = [[surgery.parameters(block, one) for one in found] for block, found in every]
    widest = max(one.count for _, found in every for one in found)
    for left in range(widest // multiple * multiple, -1, -multiple):
        kept = [[_kept(one, max(left, multiple), widest, multiple) for one in found] for _, found in every]
        gone = sum(
            (one.count - stay) * size
            for (_, found), counts, sizes in zip(every, kept, each, strict=True)
            for one, stay, size in zip(found, counts, sizes, strict=True)
        )
        if total - gone <= asked.limit:
            return Plan(what, kept, proven(model, what, kept))
    raise cannot(what, total - gone, total, asked)


def _kept(units: Units, left: int, widest: int, multiple: int) -> int:
    """The share `left` of `widest`, down to a multiple; those that have not one multiple stay whole."""
    return max(units.count * left // widest // multiple * multiple, min(multiple, units.count))


def said(model: PreTrainedModel, made: Plan) -> None:
    """Let the configuration say what went, as far as it can."""
    for name, value in made.fields.items():
        setattr(model.config.get_text_config(), name, value)


@dataclass(frozen=True)
class Narrow:
    """Fewer inputs of the maps that read the units of a plan, gone unit by unit, the rest fitted."""

    plan: Plan

    def compress(self, block: Block, maps: Mapping[str, nn.Linear], seen: Seen) -> dict[str, Compressed]:
        """See Technique."""
        readers = {one.reader: one for one in surgery.of(block, self.plan.what)}
        counts = dict(zip(readers, self.plan.kept[block.index], strict=True))
        made = mended({path: one for path, one in maps.items() if path not in readers}, seen)
        # Of a map on a basis, the basis reads what goes, and the coefficient says what each of its rows is worth.
        of = {path: path.removesuffix(".basis") for path in maps if path.removesuffix(".basis") in readers}
        targets = {path: seen.target(path, maps[path].weight.detach()) for path in of}
        seen.fitted()
        for path, reader in of.items():
            made[path] = _fewer(block, readers[reader], counts[reader], path, targets.pop(path), seen.moment_II)
        return made

    def apply(self, model: PreTrainedModel, path: str, tensors: Mapping[str, Tensor]) -> None:
        """See Technique. The second time the units that went are gone already."""
        if "stay" not in tensors or model.get_submodule(path).in_features == tensors["weight"].shape[1]:
            put(model, path, tensors["weight"])
            return
        reader = path.removesuffix(".basis")
        block = next(one for one in anatomy.blocks(model) if reader.startswith(f"{one.name}."))
        units = next(one for one in surgery.of(block, self.plan.what) if reader == f"{block.name}.{one.reader}")
        surgery.cut(block, units, tensors["stay"], tensors["weight"], self.plan.fields)


def _fewer(block: Block, units: Units, count: int, path: str, w_RF: Tensor, moment_FF: Tensor) -> Compressed:
    w_OF = w_RF if path == units.reader else _coefficient(block, units.reader).float() @ w_RF
    inputs, size = units.columns_GS.shape[0] * units.columns_GS.shape[1], units.columns_GS.shape[1]
    gone = least_important(w_OF, moment_FF, inputs - count * size, size=size)
    stay_G = torch.ones(units.count, dtype=torch.bool)
    stay_G[gone // size] = False
    stay_P = stay_G.nonzero().flatten()
    kept_K = units.columns_GS[stay_P].flatten()
    w_RK = reconstructed(w_RF, moment_FF, kept_K)
    w_OK = w_RK if path == units.reader else _coefficient(block, units.reader).double() @ w_RK
    return Compressed(
        {"weight": w_RK.float().contiguous(), "stay": stay_P},
        {
            "inputs_before": inputs,
            "inputs": count * size,
            "output_error_ratio_cut": output_error(w_OF, moment_FF, kept_K, w_OF[:, kept_K]),
            "output_error_ratio": output_error(w_OF, moment_FF, kept_K, w_OK),
        },
    )


def _coefficient(block: Block, path: str) -> Tensor:
    weight: Tensor = block.module.get_submodule(f"{path}.coefficient").weight  # type: ignore[assignment]
    return weight.detach()
