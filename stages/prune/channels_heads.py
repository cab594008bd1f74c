"""What pruning takes out of a decoder, block by block, while the blocks before are pruned already.

Shapes: N windows, T tokens, F channels or outputs of all heads, K kept ones, O outputs of the map that they feed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.channels import least_important, output_error, reconstructed
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.blockwise.compress import compress
from stages.models.blockwise.site_moments import Seen
from stages.models.blockwise.technique import Compressed, OnWeights, mended, put
from stages.models.memory.saved_state import read_record, save_state
from stages.prune import structure
from stages.prune.blocks import Dropped, greedy, least_influential
from stages.prune.depth import drop_blocks
from stages.runtime.contract import Progress, StageError
from stages.runtime.progress import Pass

FEW_WINDOWS = 2
"""Windows by whose loss blocks are chosen: blocks differ by far more than two windows' noise."""
GAP_DAMPING = 0.1
"""Of the fit after gaps: what a gap leaves out is large, and a fit that is too close suits this text alone."""
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Asked:
    """How little may stay: parameters in blocks, what widths are multiples of, what blocks are chosen by, state."""

    limit: int
    multiple: int
    by: str
    partial: Path


def channels(model: PreTrainedModel, ids_NT: Tensor, asked: Asked, progress: Progress) -> Rows:
    """Narrow every block's feed-forward part to one width; the map that reads the channels is fitted again.

    Raises:
        StageError: so much cannot go, channels cannot go alone, or an activation is not finite.
    """
    kept = kept_channels(model, asked)
    rows = compress(
        model,
        ids_NT,
        OnWeights(Narrow("down", kept, 1)),
        asked.partial,
        progress,
    )
    model.config.intermediate_size = kept
    return rows


def kept_channels(model: PreTrainedModel, asked: Asked) -> int:
    """How many channels of each block stay.

    Raises:
        StageError: so much cannot go, or channels cannot go alone.
    """
    anatomy.check_type(model.config.model_type)
    structure.check_channels_free(model)
    width, total = int(model.config.intermediate_size), anatomy.block_parameters(model)
    each = sum(output_parameters(block, ("gate", "up"), "down") for block in anatomy.blocks(model))
    kept = (width - -(-(total - asked.limit) // each)) // asked.multiple * asked.multiple
    if kept < 1:
        raise cannot("channels", total - each * (width - asked.multiple), total, asked)
    return kept


def heads(model: PreTrainedModel, ids_NT: Tensor, asked: Asked, progress: Progress) -> Rows:
    """Take the same number of key-value groups out of every block, each with the query heads that read it.

    Raises:
        StageError: so much cannot go, heads cannot go alone, or an activation is not finite.
    """
    kept, readers, dim = kept_heads(model, asked)
    config = model.config
    technique = OnWeights(Narrow("o", kept * readers * dim, readers * dim))
    rows = compress(model, ids_NT, technique, asked.partial, progress)
    config.num_key_value_heads, config.num_attention_heads, config.head_dim = kept, kept * readers, dim
    return rows


def kept_heads(model: PreTrainedModel, asked: Asked) -> tuple[int, int, int]:
    """How many key-value heads of each block stay, how many heads of queries read each, and their width.

    Raises:
        StageError: so much cannot go, or heads cannot go alone.
    """
    anatomy.check_type(model.config.model_type)
    structure.check_heads_free(model)
    config, total = model.config, anatomy.block_parameters(model)
    groups, readers = int(config.num_key_value_heads), int(config.num_attention_heads) // config.num_key_value_heads
    dim = int(anatomy.projections(anatomy.blocks(model)[0])["k"].out_features) // groups  # type: ignore[arg-type]
    each = 0
    for block in anatomy.blocks(model):
        each += readers * dim * output_parameters(block, ("q",), "o") + dim * output_parameters(block, ("k", "v"), None)
    kept = groups - -(-(total - asked.limit) // each)
    if kept < 1:
        raise cannot("heads", total - each * (groups - 1), total, asked)
    return kept, readers, dim


def blocks(model: PreTrainedModel, ids_NT: Tensor, asked: Asked, progress: Progress) -> Rows:
    """Take blocks out, those without which the model's predictions change least; the others' outputs are fitted again.

    Raises:
        StageError: so much cannot go, or an activation is not finite.
    """
    check_depth(model)
    asked = replace(asked, by=chosen_by(model, asked.by, progress))
    every, total = anatomy.blocks(model), anatomy.block_parameters(model)
    gone = _chosen(model, ids_NT, asked, progress)
    left = structure.parameters_without(model, [one.block for one in gone])
    if left > asked.limit:
        raise cannot("blocks", left, total, asked)
    dropped = sorted(one.block for one in gone)
    rows: Rows = compress(
        model,
        ids_NT,
        OnWeights(Mended(dropped[0], _tied(model))),
        asked.partial,
        Pass(progress, 1, 2),
        gone=dropped,
    )
    drop_blocks(model, dropped)
    progress.note(f"blocks {', '.join(map(str, dropped))} of {len(every)} went")
    name = "kl_without" if asked.by == "loss" else "influence"
    return [{"block": one.block, "kept": False, name: one.cost} for one in gone] + rows


def check_depth(model: PreTrainedModel) -> None:
    """Raise StageError where blocks cannot go: of two stacks, or where one runs several times."""
    if model.config.is_encoder_decoder:
        raise StageError(
            f"{type(model).__name__} has an encoder and a decoder: blocks are chosen in a single stack",
            remedy="Prune its weights by `magnitude`, or give a model with one stack.",
        )
    blocks, runs = len(anatomy.blocks(model)), int(model.config.get_text_config().num_hidden_layers)
    if blocks < runs:
        raise StageError(
            f"the blocks of {type(model).__name__} run several times: fewer runs would leave as many parameters",
            measured=f"{blocks} for {runs} runs",
            remedy="Prune its weights: `method: magnitude`.",
        )


def chosen_by(model: PreTrainedModel, by: str, progress: Progress) -> str:
    """`influence` in place of `loss` where what comes next is not what the model predicts, which is noted."""
    causal = all(one.stack == "decoder" for one in anatomy.blocks(model))
    if by == "influence" or (causal and model.get_output_embeddings() is not None):
        return by
    progress.note(f"{type(model).__name__} predicts no next token: its blocks are chosen by influence, not by the loss")
    return "influence"


def _chosen(model: PreTrainedModel, ids_NT: Tensor, asked: Asked, progress: Progress) -> list[Dropped]:
    """Which blocks go; the choice is kept beside the state of the fit."""
    kept, blocks = asked.partial / "chosen.safetensors", len(anatomy.blocks(model))
    if (record := read_record(kept)) is not None:
        return [Dropped(block, cost) for block, cost in record["gone"]]
    choose, few_NT = (greedy, ids_NT[:FEW_WINDOWS]) if asked.by == "loss" else (least_influential, ids_NT)
    gone = choose(
        model,
        few_NT,
        lambda chosen: structure.parameters_without(model, chosen) <= asked.limit,
        lambda done: progress.advanced(done / blocks, 2),
    )
    save_state(kept, {}, {"gone": [(one.block, one.cost) for one in gone]})
    return gone


@dataclass(frozen=True)
class Mended:
    """Maps that write to the stream, from the last block before the `first` gap on, fitted to what the gaps leave out.

    Weights that stand at several places are left alone: a fit to one of them would untie it.

    Source: normal equations of least squares, damped; the idea is Chen et al., Streamlining redundant layers (2024),
    which fits one map a gap.
    """

    first: int
    tied: Collection[str] = ()

    def compress(self, block: Block, maps: Mapping[str, nn.Linear], seen: Seen) -> dict[str, Compressed]:
        """See Technique."""
        if block.index < self.first - 1:
            return {}
        seen.damping = GAP_DAMPING
        free = {path: one for path, one in maps.items() if f"{block.name}.{path}" not in self.tied}
        made = mended(free, seen)
        return {path: Compressed(one.tensors, _change(maps[path], one)) for path, one in made.items()}

    def apply(self, model: PreTrainedModel, path: str, tensors: Mapping[str, Tensor]) -> None:
        """See Technique."""
        put(model, path, tensors["weight"])


def _tied(model: PreTrainedModel) -> set[str]:
    """Paths of the linear maps whose weight stands at other paths, too."""
    places = {
        path: id(one.weight) for path, one in model.named_modules(remove_duplicate=False) if isinstance(one, nn.Linear)
    }
    counts = Counter(places.values())
    return {path for path, weight in places.items() if counts[weight] > 1}


def _change(old: nn.Linear, new: Compressed) -> dict[str, Any]:
    change = (new.tensors["weight"] - old.weight).norm() / old.weight.norm()
    return {"kept": True, "relative_change": float(change)}


@dataclass(frozen=True)
class Narrow:
    """Fewer inputs of the map `reader` (`down` or `o`), `width` in all, gone in groups of `size`, the rest fitted."""

    reader: str
    width: int
    size: int

    def compress(self, block: Block, maps: Mapping[str, nn.Linear], seen: Seen) -> dict[str, Compressed]:
        """See Technique."""
        reader = anatomy.path(self.reader)
        made = mended(maps, seen, but=reader)
        # Of a map on a basis, the basis reads what goes, and the coefficient says what each of its rows is worth.
        for path in maps.keys() & {reader, f"{reader}.basis"}:
            w_RF = seen.target(path, maps[path].weight.detach())
            w_OF = w_RF if path == reader else _coefficient(block, reader).float() @ w_RF
            stays_F = torch.ones(w_OF.shape[1], dtype=torch.bool)
            stays_F[least_important(w_OF, seen.moment_II, w_OF.shape[1] - self.width, size=self.size)] = False
            kept_K = stays_F.nonzero().flatten()
            w_RK = reconstructed(w_RF, seen.moment_II, kept_K)
            w_OK = w_RK if path == reader else _coefficient(block, reader).double() @ w_RK
            made[path] = Compressed(
                {"weight": w_RK.float().contiguous(), "kept": kept_K},
                {
                    "inputs_before": w_OF.shape[1],
                    "inputs": self.width,
                    "output_error_ratio_cut": output_error(w_OF, seen.moment_II, kept_K, w_OF[:, kept_K]),
                    "output_error_ratio": output_error(w_OF, seen.moment_II, kept_K, w_OK),
                },
            )
        return made

    def apply(self, model: PreTrainedModel, path: str, tensors: Mapping[str, Tensor]) -> None:
        """See Technique. The second time the outputs that went are gone already."""
        if "kept" not in tensors or model.get_submodule(path).in_features == self.width:
            put(model, path, tensors["weight"])
            return
        reader = anatomy.path(self.reader)
        block = next(one for one in anatomy.blocks(model) if path.removesuffix(".basis") == f"{one.name}.{reader}")
        if self.reader == "down":
            structure.narrow(block, tensors["kept"], tensors["weight"])
        else:
            structure.drop_heads(block, tensors["kept"], tensors["weight"], self.size)


def _coefficient(block: Block, path: str) -> Tensor:
    weight: Tensor = block.module.get_submodule(f"{path}.coefficient").weight  # type: ignore[assignment]
    return weight.detach()


def cannot(what: str, best: int, total: int, asked: Asked) -> StageError:
    """The error of a target that cannot be met."""
    return StageError(
        f"pruning {what} cannot remove so much",
        measured=f"keep {best / total:.4f} at best",
        limit=f"keep {asked.limit / total:.4f}",
        remedy=f"Set `keep` to {math.ceil(best / total * 1e4) / 1e4} or more, or prune by another method as well."
        if best < total
        else f"Set `multiple` to a divisor of the width: nothing below it is a multiple of {asked.multiple}.",
    )


def output_parameters(block: Block, outputs: tuple[str, ...], reader: str | None) -> int:
    """Parameters of one output of these maps, and of the input of `reader` that it is."""
    maps = anatomy.projections(block)
    count = int(structure.reading(maps[reader]).out_features) if reader else 0  # type: ignore[arg-type]
    for role in outputs:
        own = structure.writing(maps[role])
        assert isinstance(own, nn.Linear)
        count += own.in_features + (own.bias is not None)
    return count


REMOVERS = {"channels": channels, "heads": heads, "blocks": blocks}
