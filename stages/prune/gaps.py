"""Blocks that go, and the maps of the others that make up for the gaps.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.blockwise.compress import compress
from stages.models.blockwise.site_moments import Seen
from stages.models.blockwise.technique import Compressed, OnWeights, mended, put
from stages.models.memory.saved_state import read_record, save_state
from stages.prune.blocks import Dropped, greedy, least_influential, parameters_without
from stages.prune.depth import depth_field, drop_blocks
from stages.prune.target import Asked, Rows, cannot
from stages.runtime.contract import Progress, StageError
from stages.runtime.progress import Pass

FEW_WINDOWS = 2
"""Windows of each source by whose loss blocks are chosen: blocks differ by far more than two windows' noise."""
GAP_DAMPING = 0.1
"""Of the fit after gaps: what a gap leaves out is large, and a fit that is too close suits this text alone."""


def blocks(model: PreTrainedModel, ids_NT: Tensor, asked: Asked, progress: Progress) -> Rows:
    """Take blocks out, those without which the model's predictions change least; the others' outputs are fitted again.

    Raises:
        StageError: so much cannot go, or an activation is not finite.
    """
    check_depth(model)
    asked = replace(asked, by=chosen_by(model, asked.by, progress))
    every, total = anatomy.blocks(model), anatomy.block_parameters(model)
    gone = _chosen(model, ids_NT, asked, progress)
    left = parameters_without(model, [one.block for one in gone])
    if left > asked.limit:
        raise cannot("blocks", left, total, asked)
    dropped = sorted(one.block for one in gone)
    mending = Mended(dropped[0], _tied(model))
    rows: Rows = compress(
        model,
        ids_NT,
        OnWeights(mending, idle=True, reads=mending.reads),
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
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise StageError(
            f"the blocks of {type(model).__name__} divide their attention by their number, which changes as others go",
            measured="scale_attn_by_inverse_layer_idx",
            remedy="Prune its weights: `method: magnitude`, or by `channels` or `heads`.",
        )
    (path, *_), blocks = anatomy.stacks(model), len(anatomy.blocks(model))
    runs = int(getattr(model.config, depth_field(model, path)))
    if blocks < runs:
        raise StageError(
            f"the blocks of {type(model).__name__} run several times: fewer runs would leave as many parameters",
            measured=f"{blocks} for {runs} runs",
            remedy="Prune its weights: `method: magnitude`.",
        )


def chosen_by(model: PreTrainedModel, by: str, progress: Progress) -> str:
    """`influence` in place of `loss` where what comes next is not what the model predicts, which is noted."""
    if by == "influence" or _predicts_next_token(model):
        return by
    progress.note(f"{type(model).__name__} predicts no next token: its blocks are chosen by influence, not by the loss")
    return "influence"


def check_next_token(model: PreTrainedModel) -> None:
    """Raise StageError where the gradient of what comes next is asked of a model that does not predict it."""
    if model.config.is_encoder_decoder or not _predicts_next_token(model):
        raise StageError(
            f"{type(model).__name__} is no decoder that predicts the next token, whose loss `gradient` goes by",
            remedy="Use `method: wanda` or `sparsegpt`, which look at what maps read.",
        )


def _predicts_next_token(model: PreTrainedModel) -> bool:
    causal = all(one.stack == "decoder" for one in anatomy.blocks(model))
    return causal and model.get_output_embeddings() is not None


def _chosen(model: PreTrainedModel, ids_NT: Tensor, asked: Asked, progress: Progress) -> list[Dropped]:
    """Which blocks go; the choice is kept beside the state of the fit."""
    kept, blocks = asked.partial / "chosen.safetensors", len(anatomy.blocks(model))
    if (record := read_record(kept)) is not None:
        return [Dropped(block, cost) for block, cost in record["gone"]]
    choose, few = (greedy, FEW_WINDOWS) if asked.by == "loss" else (least_influential, len(ids_NT))
    names = asked.sources or [""] * len(ids_NT)
    taken = [at for at, name in enumerate(names) if list(names[:at]).count(name) < few]
    gone = choose(
        model,
        ids_NT[taken],
        lambda chosen: parameters_without(model, chosen) <= asked.limit,
        lambda done: progress.advanced(done / blocks, 2),
        [names[at] for at in taken],
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

    def reads(self, block: Block, _site: Sequence[str], adding: Collection[str]) -> bool:
        """See OnWeights: the moments of what is mended."""
        return block.index >= self.first - 1 and bool(adding)

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
