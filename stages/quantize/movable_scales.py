"""Where one factor a channel can move from what a linear map reads into what wrote it, the function unchanged.

A norm's weight, the rows of v (read by o), the rows of up (read by down) and the rows of a shared basis (read by its
coefficients) can be divided by a factor if the columns of every map that reads them are multiplied by it.

Shapes: O outputs, I inputs, F factors (I, or fewer where heads share one).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy.blocks import READS_NORM, Block, blocks, norms, path, projections
from stages.models.blockwise.block_calls import arguments, embedded
from stages.models.blockwise.run import run
from stages.models.blockwise.sites import float_maps
from stages.models.blockwise.sites import sites as found_by_running
from stages.models.layers.low_rank_linear import ResidualLinear, SharedLinear
from stages.models.memory.pages import own
from stages.runtime.contract import StageError


@dataclass(frozen=True)
class Site:
    """Maps that read channels of one or several writers and share one factor a channel and one input scale.

    Attributes:
        name: the path of the first map that reads.
        block: index of the first block it stands in.
        writers: norms or linear maps whose outputs are divided.
        readers: linear maps whose inputs are multiplied, by path; each distinct weight once.
        index_I: for each input channel the factor that belongs to it.
    """

    name: str
    block: int
    writers: tuple[nn.Module, ...]
    readers: dict[str, nn.Linear]
    index_I: Tensor


def sites(model: PreTrainedModel) -> list[Site]:
    """Every place of the model's blocks, in order. Places that share a tensor (tied weights, a basis) are one site.

    Raises:
        StageError: a map is the sum of two: a factor would have to move into both.
    """
    return _merged(site for block in blocks(model) for site in _of_block(block))


def read_together(model: PreTrainedModel, ids_1T: Tensor) -> list[Site]:
    """As `sites` of any model of one stack, found by running: nothing is known of what writes, so no factor can move.

    Args:
        model: any whose blocks run once each.
        ids_1T: a few tokens.

    Raises:
        StageError: it has two stacks, or a block runs several times.
    """
    found, x_1TH = list[Site](), embedded(model, ids_1T)
    for block, kwargs in zip(blocks(model), arguments(model, ids_1T.shape[1]), strict=True):
        maps = float_maps(block)
        for paths in found_by_running(block, x_1TH, kwargs, idle=True):
            readers = {f"{block.name}.{path}": maps[path] for path in paths}
            found.append(Site(next(iter(readers)), block.index, (), readers, torch.arange(maps[paths[0]].in_features)))
        x_1TH = run(block, x_1TH, kwargs)
    return _merged(found)


def _merged(found: Iterable[Site]) -> list[Site]:
    """Places that share a tensor as one."""
    merged: list[Site] = []
    for site in found:
        touching = [other for other in merged if _tensors(other) & _tensors(site)]
        for other in touching:
            merged.remove(other)
        merged.append(_union([*touching, site]))
    return sorted(merged, key=lambda site: site.block)


def fold(site: Site, factor_F: Tensor) -> None:
    """Divide what is written by `factor_F` and multiply the columns that read it, in place.

    Raises:
        ValueError: a factor is not positive and finite.
    """
    if not (torch.isfinite(factor_F).all() and (factor_F > 0).all()):
        raise ValueError(f"the factors of {site.name} are not positive and finite")
    seen: set[int] = set()
    with torch.no_grad():
        for writer in site.writers:
            for tensor in (writer.weight, getattr(writer, "bias", None)):
                if isinstance(tensor, Tensor) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    own(tensor)
                    tensor.div_(factor_F.view(-1, *[1] * (tensor.ndim - 1)))
        for reader in site.readers.values():
            own(reader.weight)
            reader.weight.mul_(factor_F[site.index_I])


def _of_block(block: Block) -> Iterator[Site]:
    maps = projections(block)
    for role, movable in maps.items():
        if isinstance(movable, ResidualLinear):
            raise StageError(
                f"{block.name}.{path(role)} is the sum of two maps, between which no range can be moved",
                remedy="Take a scheme that leaves inputs as they are: int8_weight_only or int4_weight_only.",
            )
    for norm, roles in READS_NORM.items():
        writer = norms(block)[norm]
        yield _site(block, (writer,), {_reading_path(block, r, maps[r]): _reading(maps[r]) for r in roles})
    for source, role in (("v", "o"), ("up", "down")):
        readers = {_reading_path(block, role, maps[role]): _reading(maps[role])}
        index_I = _shared_heads(block, maps["v"], readers) if source == "v" else None
        yield _site(block, (_writing(maps[source]),), readers, index_I)
    for role, movable in maps.items():
        if isinstance(movable, SharedLinear):
            name = f"{block.name}.{path(role)}.coefficient"
            yield _site(block, (movable.basis,), {name: movable.coefficient})


def _site(
    block: Block, writers: tuple[nn.Module, ...], readers: dict[str, nn.Module], index_I: Tensor | None = None
) -> Site:
    linears = {name: found for name, found in readers.items() if isinstance(found, nn.Linear)}
    inputs = next(iter(linears.values())).in_features
    return Site(
        next(iter(linears)), block.index, writers, linears, torch.arange(inputs) if index_I is None else index_I
    )


def _shared_heads(block: Block, v: nn.Module, readers: dict[str, nn.Module]) -> Tensor:
    # Grouped-query attention: several query heads read one value head, so they share its factors.
    attention = block.module.get_submodule("self_attn")
    width = int(attention.head_dim)  # type: ignore[arg-type]
    inputs = int(next(iter(readers.values())).in_features)  # type: ignore[arg-type]
    queries_per_value = inputs // int(v.out_features)  # type: ignore[arg-type]
    channel_I = torch.arange(inputs)
    return (channel_I // width // queries_per_value) * width + channel_I % width


def _reading(found: nn.Module) -> nn.Module:
    return found.basis if isinstance(found, SharedLinear) else found


def _writing(found: nn.Module) -> nn.Module:
    return found.coefficient if isinstance(found, SharedLinear) else found


def _reading_path(block: Block, role: str, found: nn.Module) -> str:
    return f"{block.name}.{path(role)}" + (".basis" if isinstance(found, SharedLinear) else "")


def _tensors(site: Site) -> set[tuple[str, int]]:
    # A basis is written for its coefficients and read from a norm: the same tensor on two axes is no overlap.
    written = {("writes", id(writer.weight)) for writer in site.writers}
    return written | {("reads", id(reader.weight)) for reader in site.readers.values()}


def _union(joined: list[Site]) -> Site:
    writers = {id(writer): writer for site in joined for writer in site.writers}
    readers: dict[str, nn.Linear] = {}
    known: set[int] = set()
    for site in joined:
        for name, reader in site.readers.items():
            if id(reader.weight) not in known:
                known.add(id(reader.weight))
                readers[name] = reader
    first = joined[0]
    return Site(first.name, min(site.block for site in joined), tuple(writers.values()), readers, first.index_I)
