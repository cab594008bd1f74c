"""prune: fewer channels, heads, hidden dimensions or blocks, or zeros in the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.prune.params import WEIGHTS, PruneParams
from stages.runtime.contract import PARTIAL, Image, Input, Kind, Metrics, Progress, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.models.checkpoint.subject import Subject
    from stages.models.text.windows import Windows


def admit(params: PruneParams, known: Mapping[str, Any]) -> Subject:
    """See `stages.prune.admission`."""
    from stages.prune.admission import admitted

    return admitted(params, known)


def prune(params: PruneParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See PruneParams. `layers.json` says what went where and what that lost; `zeros.json` counts the zeros."""
    from stages.models.checkpoint import editing

    model = editing.opened(inputs["model"], "prune", output / PARTIAL)
    text = editing.sliced_calibration(inputs, params.window_tokens, params.windows, progress)
    work = _zeros if params.method in WEIGHTS else _structure
    return work(params, model, text, inputs["model"], output, progress)


def _zeros(
    params: PruneParams, model: PreTrainedModel, text: Windows, like: Path, output: Path, progress: Progress
) -> Metrics:
    from stages.models.checkpoint import editing
    from stages.models.checkpoint.loading import save_model
    from stages.prune import zeros

    names = editing.matching(list(zeros.linears(model)), params.layers, params.skip)
    how = zeros.How(params.method, params.pattern, params.keep, names)
    rows = zeros.sparsified(model, text.ids_NT, how, output / PARTIAL, progress)
    editing.write_table(output, rows, method=params.method)
    written = save_model(model, output, like=like, progress=progress)
    found = zeros.proven(model, written, how)
    zeros.save(written, names, output, like)
    return {"zeros": float(found.zeros), "weights": float(found.weights), "sparsity": found.zeros / found.weights}


def _structure(
    params: PruneParams, model: PreTrainedModel, text: Windows, like: Path, output: Path, progress: Progress
) -> Metrics:
    from stages.models.anatomy.blocks import block_parameters, blocks
    from stages.models.checkpoint import editing
    from stages.models.checkpoint.loading import save_model
    from stages.prune.automatic import automatic
    from stages.prune.channels_heads import narrow
    from stages.prune.gaps import blocks as without_blocks
    from stages.prune.target import Asked
    from stages.prune.width import width

    before = block_parameters(model)
    limit = int(params.keep * before)
    uneven, ids_NT = params.widths == "uneven", text.ids_NT
    asked = Asked(limit, params.multiple, params.by, output / PARTIAL, uneven=uneven, sources=text.sources)
    if params.method in ("channels", "heads"):
        rows = narrow(model, ids_NT, params.method, asked, progress)
    else:
        rows = {"auto": automatic, "blocks": without_blocks, "width": width}[params.method](
            model, ids_NT, asked, progress
        )
    editing.write_table(output, rows, method=params.method)
    written = save_model(model, output, like=like, progress=progress)
    return {
        **editing.proven(like, before, output, written, limit),
        "layers": float(len(blocks(model))),
        **_widths(model),
    }


def _widths(model: PreTrainedModel) -> Metrics:
    """Of the first block, since configurations name its channels in many ways; none where it is not understood."""
    from stages.models.anatomy.blocks import blocks, projections
    from stages.runtime.contract import StageError

    found = {"hidden_size": float(model.config.hidden_size)}
    try:
        down = projections(blocks(model)[0])["down"]
    except StageError:  # its blocks went or their width shrank all the same
        return found
    return found | {"channels": float(down.in_features)}  # type: ignore[arg-type]


PRUNE = Stage(
    name="prune",
    params=PruneParams,
    inputs={"model": Input(kinds=frozenset({Kind.CHECKPOINT})), "text": Input(kinds=frozenset({Kind.CORPUS}))},
    output=Kind.CHECKPOINT,
    image=Image.TORCH,
    run=prune,
    admit=admit,
)
