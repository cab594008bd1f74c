"""A checkpoint that answers by torch, one operation after the other.

Shapes: N sequences, T tokens, V vocabulary, or what else an answer is over.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from stages.adapters.backends import TYPES, Forward, Steps
from stages.adapters.torch_gpu import CPU, CUDA, exactly, require_gpu
from stages.models.anatomy import tasks
from stages.models.checkpoint.loading import load_model, load_tokenizer
from stages.models.checkpoint.pooling import pooled, reads
from stages.runtime.contract import StageError
from stages.serving.answering import Answering
from stages.serving.beams import scoring
from stages.serving.proven_steps import TRIED, Anew, Proven
from stages.serving.translating import Translating, manner_of, setting, shifted


@dataclass(frozen=True)
class Eager:
    """A checkpoint that answers.

    Attributes:
        forward: (ids_NT, mask_NT) -> what the model answers, in fp32; see `answers`; one vector a text where
            modules of sentence-transformers follow it.
        task: what it is for, see `stages.models.anatomy.tasks`.
        longest: tokens that it reads at once, None for any number.
        steps: begins to keep what it reads, None where it keeps nothing.
        scores: the same, told by log-probabilities.
        tells_segments: `forward` takes the segments of tokens, too, if the tokenizer `names_segments`.
        start: the token that a decoder behind an encoder reads first, None where nothing says it.
    """

    forward: Forward
    task: str
    longest: int | None
    steps: Callable[[], Steps] | None
    scores: Callable[[], Steps] | None
    tells_segments: bool = False
    start: int | None = None


def eager(folder: Path, device: str = CPU) -> Eager:
    """Open a CHECKPOINT folder.

    Args:
        folder: of the checkpoint.
        device: `cpu`, or `cuda` for the first GPU.

    Raises:
        StageError: the checkpoint is damaged or not understood.
        DoesNotFit: there is no GPU, or it is too small.
    """
    computing = exactly if device == CUDA else nullcontext
    if device == CUDA:
        require_gpu()
    with computing():
        model = load_model(folder).to(device)
    task, pool = tasks.task(model.config), pooled(folder)
    placed = "position_ids" in inspect.signature(model.forward).parameters and not _counts_itself(model)

    def forward(
        ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64], type_NT: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        ids, mask = (torch.from_numpy(one).to(device) for one in (ids_NT, mask_NT))
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if tells_segments:  # said even where all are of the first: a model that is not told tells them itself
            given[TYPES] = torch.zeros_like(ids) if type_NT is None else torch.from_numpy(type_NT).to(device)
        # Where a row is padded on its left its text begins at the first position all the same.
        if placed and task == "generate" and not mask.all():
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode(), computing(), _known(model, ids_NT):
            said = answers(model, task, given)
            said = said if pool is None else pool.vectors(said, mask)
        found: NDArray[np.float32] = said.float().cpu().numpy()
        return found

    longest = reads(folder, model.config)

    kept = partial(_Steps, model, placed=placed, longest=longest, device=device, computing=computing)
    steps = partial(Proven, kept, partial(Anew, forward, longest), _apart_from_ends(model), {}, placed=placed)

    def answering(*, scores: bool = False) -> Steps:
        stacks = Translating(model, device=device, computing=computing)
        return Answering(stacks, manner_of(model), scores=scores)

    keeps = task in ("generate", "translate") and "past_key_values" in inspect.signature(model.forward).parameters
    tells_segments = tasks.tells_segments(model.config, (TYPES,))
    both = (answering, partial(answering, scores=True)) if task == "translate" else (steps, scoring(steps))
    begin, scores = both if keeps else (None, None)
    start = setting(model, "decoder_start_token_id") if task == "translate" else None
    return Eager(forward, task, longest, begin, scores, tells_segments, start)


class _Steps:
    """See `stages.serving.generate.Steps`; transformers keeps keys and values."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        placed: bool,
        longest: int | None,
        device: str,
        computing: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model, self.placed, self.longest, self.device, self.computing = model, placed, longest, device, computing
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.mask, self.kept = torch.empty(0), None

    def begin(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        self.mask, self.kept = torch.from_numpy(mask_NT).to(self.device), None
        return self._read(ids_NT)

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        grown = torch.ones_like(self.mask[:, :1])
        if self.longest is not None:
            # A row that has ended may be led on beyond what the model reads; whatever it says is not wanted.
            grown = (self.mask.sum(1, keepdim=True) < self.longest).to(self.mask.dtype)
        self.mask = torch.cat([self.mask, grown], dim=1)
        return self._read(tokens_N[:, None])

    def reorder(self, rows_N: NDArray[np.int64]) -> None:
        rows = torch.from_numpy(rows_N).to(self.device)
        if not isinstance(self.kept, Cache):
            raise StageError(
                f"{type(self.model).__name__} keeps what it has read in a way of its own",
                measured=type(self.kept).__name__,
                limit="a Cache of transformers, whose rows can be taken in another order",
                remedy="Ask it without beams.",
            )
        self.mask = self.mask.index_select(0, rows)
        self.kept.reorder_cache(rows)

    def truncate(self, tokens: int) -> None:
        if less := self.mask.shape[1] - tokens:
            try:
                if not isinstance(self.kept, Cache):
                    raise RuntimeError(f"it keeps what it has read in a way of its own: {type(self.kept).__name__}")
                self.kept.crop(-less)
            except RuntimeError as error:  # as transformers says of a window that is full, and of recurrent layers
                raise StageError(
                    f"{type(self.model).__name__} cannot go on from an earlier token",
                    measured=error,
                    limit="layers that keep all that they read",
                    remedy="Have it read the text anew.",
                ) from error
        self.mask = self.mask[:, :tokens]

    def more(self, ids_T: NDArray[np.int64]) -> NDArray[np.float32]:
        self.mask = torch.cat([self.mask, self.mask.new_ones(1, len(ids_T))], dim=1)
        logits_V: NDArray[np.float32] = self._read(ids_T[None])[0]
        return logits_V

    @property
    def kept_bytes(self) -> int:
        """Of all keys and values, which the next token reads."""
        layers = getattr(self.kept, "layers", ())
        return sum(one.nbytes for layer in layers for one in (layer.keys, layer.values) if one is not None)

    def _read(self, ids_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        ids = torch.from_numpy(ids_NT).to(self.device)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": self.mask, "past_key_values": self.kept}
        if self.placed:
            given["position_ids"] = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if self.keeps_logits:  # a prompt of 2,000 tokens has no use for 2,000 rows of the vocabulary
            given["logits_to_keep"] = 1
        with torch.inference_mode(), self.computing(), _known(self.model, ids_NT):
            out = self.model(**given, use_cache=True, return_dict=True)
        self.kept = out.past_key_values
        found: NDArray[np.float32] = out.logits[:, -1].float().cpu().numpy()
        return found


def _apart_from_ends(model: PreTrainedModel) -> list[int]:
    """Tokens without a meaning of their own to a model, as far as its configuration says which these are."""
    config = model.config.get_text_config()
    told = [value for name, value in config.to_dict().items() if name.endswith("_token_id")]
    special = {one for value in told for one in (value if isinstance(value, list) else [value])}
    usual = [*islice((one for one in range(config.vocab_size) if one not in special), TRIED)] or [0]
    return (usual * TRIED)[:TRIED]


@contextmanager
def _known(model: PreTrainedModel, ids_NT: NDArray[np.int64]) -> Iterator[None]:
    """Tell of a token that a model has no row for."""
    try:
        yield
    except IndexError as error:
        raise StageError(
            "the model has no such token",
            measured=f"tokens up to {ids_NT.max()}",
            limit=f"below {model.config.get_text_config().vocab_size}",
            remedy="Give tokens of its own tokenizer.",
        ) from error


def answers(model: PreTrainedModel, task: str, given: dict[str, Any]) -> Tensor:
    """What a model answers.

    Args:
        model: in eval mode.
        task: what it is for.
        given: `input_ids` and `attention_mask`, [N, T], and what else its forward takes.

    Returns:
        See `tasks.answer`. `translate`: of the window itself, each token from those before it.

    Raises:
        StageError: the decoder does not say how an answer begins.
    """
    if task == "translate" or (task == "embed" and model.config.is_encoder_decoder):
        given = given | {"decoder_input_ids": shifted(model, given["input_ids"])}
    if task in ("generate", "translate") and "use_cache" in inspect.signature(model.forward).parameters:
        given = given | {"use_cache": False}
    return tasks.answer(task, model(**given, return_dict=True))


def names_segments(folder: Path) -> bool:
    """Whether the checkpoint's tokenizer says which segment each token is of."""
    return TYPES in load_tokenizer(folder).model_input_names


def fast_tokenizer(folder: Path) -> Tokenizer:
    """The checkpoint's tokenizer as one of tokenizers' own.

    Raises:
        StageError: it cannot be turned into one.
    """
    found = load_tokenizer(folder)
    if not found.is_fast:
        raise StageError(
            f"the tokenizer of {folder.name} is none of the library tokenizers",
            measured=type(found).__name__,
            remedy="Put its tokenizer.json beside the weights.",
        )
    made: Tokenizer = found.backend_tokenizer
    return made


def _counts_itself(model: PreTrainedModel) -> bool:
    """Whether positions begin behind padding's own: such a model leaves padding out when it counts (RoBERTa)."""
    most = tasks.places(model.config)
    return most != getattr(model.config.get_text_config(), "max_position_embeddings", most)
