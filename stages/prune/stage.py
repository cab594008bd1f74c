"""prune: fewer channels, heads, hidden dimensions or blocks, or zeros in the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from stages.runtime.contract import PARTIAL, Image, Input, Kind, Metrics, Params, Progress, Stage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

WEIGHTS = ("magnitude", "wanda", "sparsegpt", "gradient")


class PruneParams(Params):
    """What goes.

    Attributes:
        method: `channels` narrows every block's feed-forward part to one width, `heads` takes key-value groups of
            attention heads out of every block, `width` takes dimensions out of the residual stream that passes
            through all of them, `blocks` takes whole blocks out; `magnitude`, `wanda`, `gradient` and `sparsegpt` put
            zeros into the blocks' maps, the last one mending the other weights.
        keep: largest share of the blocks' parameters that stays; of zeros: of the maps' weights that are not zero.
        pattern: zeros: so many of so many neighbours stay in every row, whatever `keep` says; without one each map has
            as many zeros as the measured loss allows.
        by: blocks: chosen by the measured loss without them, or by how little they change what passes through.
        multiple: channels, width: what is left is a multiple of this.
        layers: zeros: paths of the maps that get them, with `*` for anything; every map of the blocks by default.
        skip: zeros: paths of maps that get none; `keep` is the share of the others.
        windows: calibration windows.
        window_tokens: their length.
    """

    method: Literal["channels", "heads", "width", "blocks", "magnitude", "wanda", "gradient", "sparsegpt"] = "channels"
    keep: float = Field(default=0.95, gt=0, lt=1)
    pattern: Literal["2:4", "4:8"] | None = None
    by: Literal["loss", "influence"] = "loss"
    multiple: int = Field(default=8, ge=1)
    layers: tuple[str, ...] = Field(default=("*",), min_length=1)
    skip: tuple[str, ...] = ()
    windows: int = Field(default=32, ge=1)
    window_tokens: int = Field(default=512, ge=8)

    @model_validator(mode="after")
    def _pattern_of_zeros(self) -> PruneParams:
        if self.pattern and self.method not in WEIGHTS:
            raise ValueError(f"{self.method} leaves no pattern of zeros; `pattern` goes with {', '.join(WEIGHTS)}")
        if (self.skip or self.layers != ("*",)) and self.method not in WEIGHTS:
            raise ValueError(
                f"{self.method} takes from all blocks alike; `layers` and `skip` go with {', '.join(WEIGHTS)}"
            )
        return self


def prune(params: PruneParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See PruneParams. `layers.json` says what went where and what that lost; `masks.safetensors` where zeros stand."""
    from stages.models.checkpoint import editing

    model = editing.opened(inputs["model"], "prune")
    ids_NT = editing.calibration(inputs, params.window_tokens, params.windows, progress)
    work = _zeros if params.method in WEIGHTS else _structure
    return work(params, model, ids_NT, inputs["model"], output, progress)


def _zeros(
    params: PruneParams, model: PreTrainedModel, ids_NT: Tensor, like: Path, output: Path, progress: Progress
) -> Metrics:
    from stages.models.checkpoint import editing
    from stages.models.checkpoint.loading import load_model, save_model
    from stages.prune import zeros

    names = editing.matching(list(zeros.linears(model)), params.layers, params.skip)
    how = zeros.How(params.method, params.pattern, params.keep, names)
    rows = zeros.sparsified(model, ids_NT, how, output / PARTIAL, progress)
    editing.write_table(output, rows, method=params.method)
    save_model(model, output, like=like)
    zeros.save_masks(model, names, output)
    found = zeros.proven(load_model(output), how, output)
    return {"zeros": float(found.zeros), "weights": float(found.weights), "sparsity": found.zeros / found.weights}


def _structure(
    params: PruneParams, model: PreTrainedModel, ids_NT: Tensor, like: Path, output: Path, progress: Progress
) -> Metrics:
    from stages.models.anatomy.blocks import block_parameters
    from stages.models.checkpoint import editing
    from stages.models.checkpoint.loading import save_model
    from stages.prune.channels_heads import REMOVERS, Asked
    from stages.prune.width import width

    before = block_parameters(model)
    limit = int(params.keep * before)
    asked = Asked(limit, params.multiple, params.by, output / PARTIAL)
    rows = {**REMOVERS, "width": width}[params.method](model, ids_NT, asked, progress)
    editing.write_table(output, rows, method=params.method)
    save_model(model, output, like=like)
    return {
        **editing.proven(like, before, output, limit),
        "layers": float(model.config.num_hidden_layers),
        "channels": float(model.config.intermediate_size),
        "hidden_size": float(model.config.hidden_size),
    }


PRUNE = Stage(
    name="prune",
    params=PruneParams,
    inputs={"model": Input(kinds=frozenset({Kind.CHECKPOINT})), "text": Input(kinds=frozenset({Kind.CORPUS}))},
    output=Kind.CHECKPOINT,
    image=Image.TORCH,
    run=prune,
)
