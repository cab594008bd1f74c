"""One pass over a model's blocks, the dense block beside the compressed one: each map is fitted to what it should give.

A compressed model's error grows from block to block because every map still answers the inputs of the dense model. Here
each map is compressed towards W* instead: the map that comes closest to the dense outputs on the inputs that the blocks
before it, compressed already, really give. For a map whose output is added to the residual stream, W* also makes up for
what that stream has drifted. The moments of one site at a time suffice; no gradient is needed.

An encoder's blocks come first; a decoder's then read what each model's own encoder gave. What the decoder itself reads
is the dense model's answer to each window.

Shapes: N windows, T tokens, H hidden.

Source: least squares on the inputs of both models, as in GPTAQ (Li et al. 2025) and QEP (Arai and Ichikawa 2025); the
drift of the residual stream is added here.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise.block_calls import stacks
from stages.models.blockwise.block_sites import at_all_runs
from stages.models.blockwise.streams import Ends, Streams, Turn, beside, entering, resumed, save_streams, turns
from stages.models.blockwise.technique import Technique
from stages.models.memory.pages import forget, release, trim
from stages.models.memory.saved_state import read_record, save_state
from stages.models.text.decoder_answers import answered
from stages.runtime.contract import Progress
from stages.runtime.progress import Silent

SAVE_EVERY_S = 5.0
"""Both streams of a text are large beside a small model's block: they are written after the block that ends next."""
_SILENT, _ENDS = Silent(), Ends()


def compress(
    model: PreTrainedModel,
    ids_NT: Tensor,
    technique: Technique,
    state: Path,
    progress: Progress = _SILENT,
    gone: Collection[int] = (),
    ends: Ends = _ENDS,
) -> list[dict[str, Any]]:
    """Compress the maps of every block in the order in which they run, each on what the ones before it give.

    The compressed model runs without the blocks that are `gone`; what is added to the stream last before such a gap is
    fitted to the dense stream after it.

    After each block its new tensors and both streams lie in `state`; a later call goes on after the last such block.

    Args:
        model: its blocks' maps are replaced; no weight is changed in place.
        ids_NT: calibration windows.
        technique: what to do with a site.
        state: folder that keeps it.
        progress: told (blocks done, blocks), of a resume, and a curve `block_seconds` over the blocks: clocks stay out
            of the rows, since the same work makes the same.
        gone: indices of blocks that the compressed model has not; the caller takes them out.
        ends: what the caller does with both streams at their ends.

    Returns:
        A row a map: its path and the technique's figures.

    Raises:
        StageError: an activation is not finite, or a map reads nothing where none may be idle.
    """
    model.requires_grad_(False)
    every, total = stacks(model), len(anatomy.blocks(model))
    parts = [ids_NT, answered(model, ids_NT, state / "answers.safetensors")] if len(every) > 1 else [ids_NT]
    done, streams = resumed(state)
    rows = _restored(model, technique, state, done, progress)
    saved = time.monotonic()
    for stack, part_NT in zip(every, parts, strict=True):
        first = stack.blocks[0].index
        there = done > first  # what was resumed lies between this stack's blocks or later
        reads = beside(stack, part_NT, None if there else streams, state)
        before, each = turns(stack, part_NT.shape[1], reads, gone)
        if not there:
            streams = None  # the encoder's were read: they go before the decoder's come
            streams = entering(stack, part_NT, reads, before, ends)
        assert streams is not None
        trim()
        for turn in each[max(0, done - first) :]:
            began, index = time.monotonic(), turn.block.index
            if index not in gone:
                rows += _turn(model, turn, streams, technique, state)
                if time.monotonic() - saved >= SAVE_EVERY_S:
                    save_streams(state, index, streams)
                    saved = time.monotonic()
                progress.metric("block_seconds", time.monotonic() - began, index)
            progress.advanced(index + 1, total)
    assert streams is not None
    ends.leave(streams.dense_NTH, streams.compressed_NTH)
    return rows


def _turn(
    model: PreTrainedModel, turn: Turn, streams: Streams, technique: Technique, state: Path
) -> list[dict[str, Any]]:
    """Compress a block, keep its tensors in `state`, and give back the memory of the dense ones; returns its rows."""
    block = turn.block
    dense = list(block.module.parameters())
    technique.enter(block)
    new, rows = at_all_runs(model, turn, streams, technique, state)
    save_state(state / _file(block.index), new, {"rows": rows})
    _apply(model, technique, state / _file(block.index))
    release(block.module)
    for tensor in dense:
        forget(tensor)
    del dense
    trim()
    return rows


def _file(index: int) -> str:
    return f"block-{index:04d}.safetensors"


def _restored(
    model: PreTrainedModel, technique: Technique, state: Path, done: int, progress: Progress
) -> list[dict[str, Any]]:
    """The rows of the first `done` blocks; their new maps are put in."""
    rows: list[dict[str, Any]] = []
    blocks = anatomy.blocks(model)
    for index, block in enumerate(blocks[:done]):
        record = read_record(state / _file(index))
        if record is None:
            continue  # this block is gone: every other one's file is written before the streams
        technique.enter(block)
        _apply(model, technique, state / _file(index))
        rows += record["rows"]
    if done:
        progress.note(f"goes on after block {done} of {len(blocks)}, saved before it was cut off")
    return rows


def _apply(model: PreTrainedModel, technique: Technique, file: Path) -> None:
    """Put a block's tensors in their places as views of the file: they take memory when they are read."""
    by_path: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(file).items():
        path, _, own = name.rpartition(":")
        by_path.setdefault(path, {})[own] = tensor
    for path, tensors in by_path.items():
        technique.apply(model, path, tensors)
