"""What an encoder-decoder answers to windows of text: its decoder reads that while it is compressed or taught.

Where only texts are at hand, the model's own answers are the pairs that its decoder meets in use.

Shapes: N windows, S tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from stages.models.memory.pages import release
from stages.models.memory.saved_state import read_record, restore, save_state
from stages.runtime.contract import StageError

NOTHING = -1
"""In the place of a token: past the end of an answer. It counts for nothing."""
LIKELIEST = 50
"""Tokens of which each is drawn: a model that learned with smoothed labels leaves a tenth to all the others."""
TOGETHER = 32
"""Windows answered side by side: reading the weights once for each token takes most of the time."""


def answered(
    model: PreTrainedModel,
    ids_NS: Tensor,
    path: Path,
    advanced: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """What the decoder reads: its first token and an answer drawn from what it says; NOTHING after its end.

    Of a model that writes nothing (it classifies, or finds answers) what its own forward makes of the text.

    The likeliest answer would do for a model that is sure of it; one that is not says the same token for ever, and a
    decoder that reads nothing else shows one direction of its inputs.

    Args:
        model: an encoder-decoder with its head.
        ids_NS: windows. The last token of each becomes the one that ends a text, in place.
        path: where answers are kept; those kept there are taken from there.
        advanced: told (windows answered, N).

    Returns:
        ids_NS, int64, of the decoder.

    Raises:
        StageError: the model does not say how an answer begins, or its windows are shorter.

    Source: Kim and Rush 2016, Sequence-Level Knowledge Distillation, with a draw in place of a beam; from the likeliest
    tokens as in Fan et al. 2018, Hierarchical Neural Story Generation.
    """
    name, most = type(model).__name__, getattr(model.config, "max_position_embeddings", None)
    if most is not None and ids_NS.shape[1] > most:
        raise StageError(f"{name} reads no windows of this length", measured=ids_NS.shape[1], limit=most)
    writes, own = model.can_generate(), getattr(model, "generation_config", None) or GenerationConfig()
    if writes and own.decoder_start_token_id is None and own.bos_token_id is None:
        raise StageError(
            f"{name} does not say how an answer begins",
            measured="neither decoder_start_token_id nor bos_token_id",
            remedy="Give generation_config.json beside the checkpoint.",
        )
    last = own.eos_token_id if writes else model.config.eos_token_id
    ends = [last] if isinstance(last, int) else list(last or [])
    # A tokenizer that closes its texts has done so; a language's token may stand behind (mBART).
    if ends and not torch.isin(ids_NS[:, -2:], torch.tensor(ends, dtype=ids_NS.dtype)).any():
        ids_NS[:, -1] = ends[0]
    if not writes:
        return _read(model, ids_NS)
    found_NS = torch.full_like(ids_NS, NOTHING)
    if read_record(path) is None:
        # All else is the model's own: which token comes first, which are never said.
        how = GenerationConfig(max_new_tokens=ids_NS.shape[1] - 1, num_beams=1, do_sample=True, top_k=LIKELIEST)
        with torch.random.fork_rng(devices=()):  # generate() draws by the common generator: the same answers each time
            torch.manual_seed(0)
            for start in range(0, len(ids_NS), TOGETHER):
                part = slice(start, start + TOGETHER)
                _answer(model, ids_NS[part], found_NS[part], how, ends)
                advanced(min(start + TOGETHER, len(ids_NS)), len(ids_NS))
        release(model)  # what comes next takes one block after the other
        save_state(path, {"ids": found_NS}, {})
    restore(path, {"ids": found_NS})
    return found_NS


class _Called(Exception):
    """Ends a run at the decoder."""


@torch.no_grad()
def _read(model: PreTrainedModel, ids_NS: Tensor) -> Tensor:
    """What the model's forward hands to its decoder where it is given the text alone: its tokens, shifted by one."""
    found: list[Tensor] = []

    def called(_module: nn.Module, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
        found.append(given["input_ids"])
        raise _Called

    # The encoder need not run: in its place stands one token's nothing.
    nothing_1H = torch.zeros(len(ids_NS), 1, model.config.hidden_size)
    hook = model.get_decoder().register_forward_pre_hook(called, with_kwargs=True)
    try:
        with suppress(_Called):
            model(input_ids=ids_NS, encoder_outputs=(nothing_1H,))
    finally:
        hook.remove()
    if not found:
        raise StageError(
            f"{type(model).__name__} makes nothing of a text for its decoder to read",
            remedy="Leave out the steps that need a text.",
        )
    return found[0].clone()


@torch.no_grad()
def _answer(model: PreTrainedModel, ids_NS: Tensor, found_NS: Tensor, how: GenerationConfig, ends: list[int]) -> None:
    said_NT = model.generate(input_ids=ids_NS, attention_mask=torch.ones_like(ids_NS), generation_config=how)
    # The first token may be the one that ends a text, too. Where an answer ended, the others' went on.
    ended_NT = torch.isin(said_NT, torch.tensor(ends, dtype=said_NT.dtype))
    ended_NT[:, 0] = False
    counts_NT = ended_NT.cumsum(1) == 0
    found_NS[:, : said_NT.shape[1]] = torch.where(counts_NT, said_NT, NOTHING)
