"""prune: fewer feed-forward channels in every block, or fewer blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.runtime.contract import Image, Input, Kind, Metrics, Params, Progress, Stage, StageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class PruneParams(Params):
    """What goes.

    Attributes:
        method: `channels` narrows every block's feed-forward part to one width; `blocks` takes whole blocks out.
        keep: largest share of the blocks' parameters that stays.
        multiple: channels: the width left is a multiple of this.
        windows: calibration windows.
        window_tokens: their length.
    """

    method: Literal["channels", "blocks"] = "channels"
    keep: float = Field(default=0.95, gt=0, lt=1)
    multiple: int = Field(default=8, ge=1)
    windows: int = Field(default=16, ge=1)
    window_tokens: int = Field(default=512, ge=8)


def prune(params: PruneParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See PruneParams. `layers.json` says for each block what went and what that lost."""
    from stages.models.anatomy import block_parameters
    from stages.models.loading import load_model, load_tokenizer, save_model, stored_parameters
    from stages.models.quantized import describe
    from stages.models.windows import windows

    model = load_model(inputs["model"])
    if describe(model) is not None:
        raise StageError("the checkpoint is quantized", remedy="Prune first, quantize afterwards.")
    before = block_parameters(model)
    ids_NT = windows(
        inputs["text"], "calibrate", load_tokenizer(inputs["model"]), params.window_tokens, most=params.windows
    )
    if len(ids_NT) < params.windows:
        progress.note(f"the calibrate split gives {len(ids_NT)} of {params.windows} windows")
    limit = int(params.keep * before)
    remove = _channels if params.method == "channels" else _blocks
    rows = remove(params, model, ids_NT, before - limit, progress)
    text = json.dumps({"method": params.method, "layers": rows}, indent=1) + "\n"
    (output / "layers.json").write_text(text, encoding="utf-8")
    save_model(model, output, like=inputs["model"])
    after = block_parameters(load_model(output))
    if after > limit:
        raise StageError(
            "the written checkpoint lost less than was asked",
            measured=f"{after} parameters in blocks",
            limit=limit,
            remedy="This is a defect: please report it with the recipe.",
        )
    return {
        "block_parameters": float(after),
        "block_parameters_before": float(before),
        "parameters": float(stored_parameters(output)),
        "parameters_before": float(stored_parameters(inputs["model"])),
        "layers": float(model.config.num_hidden_layers),
        "channels": float(model.config.intermediate_size),
    }


def _cannot(params: PruneParams, best: int, total: int) -> StageError:
    return StageError(
        f"pruning {params.method} cannot remove so much",
        measured=f"keep {best / total:.4f} at best",
        limit=f"keep {params.keep}",
        remedy="Raise `keep`, or prune by the other method as well.",
    )


def _channels(
    params: PruneParams, model: PreTrainedModel, ids_NT: Tensor, target: int, progress: Progress
) -> list[dict[str, Any]]:
    from stages.models import structure
    from stages.models.anatomy import block_parameters, blocks
    from stages.models.pruning import channel_parameters, narrowed

    structure.check_channels_free(model)
    width, total = int(model.config.intermediate_size), block_parameters(model)
    each = sum(channel_parameters(block) for block in blocks(model))
    kept = (width - -(-target // each)) // params.multiple * params.multiple
    if kept < 1:
        raise _cannot(params, total - each * (width - params.multiple), total)
    rows = narrowed(model, ids_NT, kept, progress.advanced)
    model.config.intermediate_size = kept
    return rows


def _blocks(
    params: PruneParams, model: PreTrainedModel, ids_NT: Tensor, target: int, progress: Progress
) -> list[dict[str, Any]]:
    from stages.models import structure
    from stages.models.anatomy import block_parameters
    from stages.models.pruning import influences

    before = block_parameters(model)
    found = influences(model, ids_NT, progress.advanced)
    order = sorted(range(len(found)), key=lambda index: (found[index], index))
    dropped: list[int] = []
    while before - block_parameters(model) < target:
        if len(dropped) == len(order) - 1:
            raise _cannot(params, block_parameters(model), before)
        # Each removal renumbers the rest: count how many earlier ones went already.
        now = order[len(dropped)]
        structure.drop_blocks(model, [now - sum(index < now for index in dropped)])
        dropped.append(now)
    progress.note(f"blocks {', '.join(map(str, sorted(dropped)))} of {len(found)} went")
    return [{"block": index, "influence": one, "kept": index not in dropped} for index, one in enumerate(found)]


PRUNE = Stage(
    name="prune",
    params=PruneParams,
    inputs={"model": Input(kinds=frozenset({Kind.CHECKPOINT})), "text": Input(kinds=frozenset({Kind.CORPUS}))},
    output=Kind.CHECKPOINT,
    image=Image.TORCH,
    run=prune,
)
