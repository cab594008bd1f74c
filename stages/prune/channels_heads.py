"""Channels and heads that go, block by block, while the blocks before are pruned already.

Shapes: G units (channels, or groups of heads), P of them that stay, K their inputs of the map that reads them, F all of
its inputs, O its outputs, R those of its basis.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.allocation import Option, allocate
from stages.algorithms.channels import FLOOR, alike, least_important, output_error, reconstructed, removals
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.blockwise.compress import compress
from stages.models.blockwise.map_statistics import BySource, MapStatistics, statistics_of
from stages.models.blockwise.site_moments import Seen
from stages.models.blockwise.technique import Compressed, OnWeights, mended, put
from stages.models.layers.low_rank_linear import SharedLinear
from stages.prune import units as surgery
from stages.prune.cut_proof import proven
from stages.prune.target import Asked, Rows, cannot
from stages.prune.units import CHANNELS, Units
from stages.runtime.contract import Progress
from stages.runtime.progress import Pass

_STEPS, _MOST = 32, 0.75
"""How finely a block's units are taken away while it is measured what that costs, and the most that may go."""


@dataclass(frozen=True)
class Plan:
    """What stays of every block.

    Attributes:
        what: CHANNELS or HEADS.
        kept: how many of each of a block's units, block by block.
        fields: of the configuration that say so; none where `structure.json` has to.
        importance: path of a map that reads the units -> what its outputs' squared errors cost, [O]; where there is
            none they all cost the same.
    """

    what: str
    kept: Sequence[Sequence[int]]
    fields: Mapping[str, int]
    importance: Mapping[str, Tensor] = field(default_factory=dict)


def narrow(model: PreTrainedModel, ids_NT: Tensor, what: str, asked: Asked, progress: Progress) -> Rows:
    """Take channels or groups of heads out, the same share of every block or where it costs least; readers are fitted.

    Raises:
        StageError: see `plan`, or an activation is not finite.
    """
    made, heard = plan(model, what, asked), progress
    if asked.uneven:
        heard = Pass(progress, 1, 2)
        made = uneven(model, ids_NT, made, asked, Pass(progress, 0, 2))
    rows = compress(model, ids_NT, narrowing(made, asked), asked.partial, heard)
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
            return Plan(what, kept, proven(model, what, kept, said=not asked.uneven))
    raise cannot(what, total - gone, total, asked)


def uneven(model: PreTrainedModel, ids_NT: Tensor, even: Plan, asked: Asked, progress: Progress) -> Plan:
    """How many units of each block stay, so that as many parameters go as by the even plan and least is lost.

    What the text loses without some units, the rest fitted, is the error of what reads them, each output's square times
    its curvature (the diagonal of the Fisher information), as for ranks in `stages.models.low_rank.planning`; of a text
    of several sources, that of the source that loses most.

    Args:
        model: in memory.
        ids_NT: calibration windows.
        even: proven to be possible.
        asked: parameters that may stay, and for channels what their number is a multiple of.
        progress: told of the passes.

    Raises:
        StageError: an activation is not finite.
    """
    multiple = asked.multiple if even.what == CHANNELS else 1
    importance: dict[str, Tensor] = {}
    options: dict[int, list[list[Option]]] = {}
    folder, each = asked.partial / "statistics", wanted(asked, even.what)
    for block, seen in statistics_of(model, ids_NT, folder, progress.advanced, each):
        options[block.index] = []
        for units in surgery.of(block, even.what):
            found, worth_O = priced(block, units, seen, multiple)
            importance[f"{block.name}.{units.reader}"] = worth_O
            options[block.index].append(found)
    flat = [one for index in sorted(options) for one in options[index]]
    total = anatomy.block_parameters(model)
    try:
        chosen = iter(allocate(flat, total - asked.limit))
    except ValueError as error:
        best = sum(max((option.saved for option in one), default=0) for one in flat)
        raise cannot(even.what, total - best, total, asked) from error
    kept = [
        [units.count - next(chosen).rank for units in surgery.of(block, even.what)] for block in anatomy.blocks(model)
    ]
    return Plan(even.what, kept, {}, importance)


def wanted(asked: Asked, *what: str) -> BySource:
    """The moments of what reads units, by source."""
    return BySource(
        asked.sources, lambda block: [_read(block, one.reader) for kind in what for one in surgery.of(block, kind)]
    )


def _read(block: Block, reader: str) -> str:
    """Path of the map whose inputs the units are: the basis, where the reader stands on one."""
    return f"{reader}.basis" if isinstance(block.module.get_submodule(reader), SharedLinear) else reader


def priced(block: Block, units: Units, seen: MapStatistics, multiple: int) -> tuple[list[Option], Tensor]:
    """What it saves and loses, in nats a token to second order, that so many units of a block go.

    Args:
        block: of the model.
        units: of the block.
        seen: what calibration saw of its maps.
        multiple: of which the numbers that go are multiples.

    Returns:
        The options, and the weight of each squared error at the outputs of the map that reads the units, [O].
    """
    reader = block.module.get_submodule(units.reader)
    on_basis = isinstance(reader, SharedLinear)
    worth_O = seen.gradients[f"{units.reader}.coefficient" if on_basis else units.reader]
    site = seen.first[_read(block, units.reader)]
    w_OF = surgery.reading(reader).weight.detach().float()  # type: ignore[operator]
    if isinstance(reader, SharedLinear):
        w_OF = _coefficient(block, units.reader).float() @ w_OF
    size, each = units.columns_GS.shape[1], surgery.parameters(block, units)
    # Units of one block that are not laid out one behind the other are put so.
    columns = units.columns_GS.flatten()
    weighed_OF = w_OF[:, columns] * worth_O.sqrt()[:, None]
    step = max(multiple, units.count // _STEPS // multiple * multiple)
    most = int(units.count * _MOST) // step * step
    rounds, every = most // step or 1, [seen.moments[site], *seen.sources.get(site, {}).values()]
    moment, *sources = (moment_FF[columns][:, columns] for moment_FF in every)
    found = removals(weighed_OF, moment, most * size, size=size, rounds=rounds, floor=FLOOR, sources=sources)
    options = [
        Option(len(gone) // size * each, damage / 2, len(gone) // size)
        for gone, damage in found
        if len(gone) // size % multiple == 0
    ]
    return options, worth_O


def _kept(units: Units, left: int, widest: int, multiple: int) -> int:
    """The share `left` of `widest`, down to a multiple; those that have not one multiple stay whole."""
    return max(units.count * left // widest // multiple * multiple, min(multiple, units.count))


def said(model: PreTrainedModel, made: Plan) -> None:
    """Let the configuration say what went, as far as it can."""
    for name, value in made.fields.items():
        setattr(model.config.get_text_config(), name, value)


def narrowing(made: Plan, asked: Asked) -> OnWeights:
    """What a pass does by a plan; of calibration windows of several sources it looks at each."""
    change = Narrow(made, asked.sources)
    return OnWeights(change, sources=change.sources, reads=change.reads)


@dataclass(frozen=True)
class Narrow:
    """Fewer inputs of the maps that read the units of a plan, gone unit by unit, the rest fitted.

    Where there are several sources, those go that cost the source least that they cost most.
    """

    plan: Plan
    names: Sequence[str] = ()

    def sources(self, block: Block, site: Sequence[str]) -> Sequence[str]:
        """See OnWeights: the moments of what reads units."""
        readers = {one.reader for one in surgery.of(block, self.plan.what)} if self.names else set()
        return self.names if readers & {path.removesuffix(".basis") for path in site} else ()

    def reads(self, block: Block, site: Sequence[str], adding: Collection[str]) -> bool:
        """See OnWeights: the moments of what reads units, and of what is mended."""
        readers = {one.reader for one in surgery.of(block, self.plan.what)}
        return bool(adding) or not readers.isdisjoint(path.removesuffix(".basis") for path in site)

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
            worth_O = self.plan.importance.get(f"{block.name}.{reader}")
            made[path] = _fewer(block, readers[reader], counts[reader], targets.pop(path), seen, worth_O)
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


def _fewer(block: Block, units: Units, count: int, w_RF: Tensor, seen: Seen, worth_O: Tensor | None) -> Compressed:
    moment_FF = seen.moment_II
    on_basis = isinstance(block.module.get_submodule(units.reader), SharedLinear)
    w_OF = _coefficient(block, units.reader).float() @ w_RF if on_basis else w_RF
    inputs, size = units.columns_GS.shape[0] * units.columns_GS.shape[1], units.columns_GS.shape[1]
    weighed_OF = w_OF if worth_O is None else w_OF * worth_O.sqrt()[:, None]
    sources = list(seen.sources.values())
    if worth_O is None:
        sources = alike(weighed_OF, moment_FF, sources)
    goes = inputs - count * size
    gone = least_important(weighed_OF, moment_FF, goes, size=size, floor=FLOOR, sources=sources)
    stay_G = torch.ones(units.count, dtype=torch.bool)
    stay_G[gone // size] = False
    stay_P = stay_G.nonzero().flatten()
    kept_K = units.columns_GS[stay_P].flatten()
    w_RK = reconstructed(w_RF, moment_FF, kept_K)
    w_OK = _coefficient(block, units.reader).double() @ w_RK if on_basis else w_RK
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
