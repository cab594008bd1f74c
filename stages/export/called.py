"""A model as engines call it: token ids and their mask go in, one tensor comes out, whichever side a row is padded on.

A model that tells segments apart is given them, too.

Shapes: N sequences, T tokens, V vocabulary, C classes, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from stages.adapters.backends import TYPES
from stages.graphs.parity import LOGIT_LIMIT, halves, parity
from stages.models.anatomy.tasks import answer
from stages.models.checkpoint.pooling import Pooling
from stages.models.layers import quantized_linear, rounded_cache
from stages.runtime.contract import StageError
from stages.serving.eager import answers

OUTPUT = "logits"
TOKEN_AXIS = {"generate": 1, "fill": 1, "tag": 1, "embed": 1, "answer": 2}
"""Task -> the axis of its answer that goes along the tokens; others, and pooled vectors, are one a text."""
PADDING = 3
"""Tokens of padding by which it is tried that padding changes nothing."""
ASKED_TOKENS = 16
"""Length of the window on which a model is asked how it has to be called."""
_NO_TOKEN = -1

Way = Literal["counted", "own", "counted_rolled", "rolled"]
"""How each token gets its place: told to the model, counted without the padding; by the model itself; or in one of
these ways once each row was rolled until its padding stands on the right."""


def inputs_of(*, tells_segments: bool) -> list[str]:
    """What a graph without a cache takes."""
    return ["input_ids", "attention_mask", *([TYPES] if tells_segments else [])]


class AsCalled(nn.Module):
    """The model as engines call it."""

    def __init__(self, model: PreTrainedModel, task: str, way: Way, pool: Pooling | None = None) -> None:
        super().__init__()
        self.model, self.task, self.way, self.pool = model, task, way, pool

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """The answer by the task: [N, T, V], [N, T, C], [N, C], [N, 2, T], [N, T, H] or [N, E]."""
        pad = _padding(self.model)
        if pad is not None:
            # Models look for the id itself: to find the last token that counts, or to count places.
            input_ids = torch.where(attention_mask > 0, input_ids, pad)
        if self.way in ("rolled", "counted_rolled"):
            return self._rolled(input_ids, attention_mask, token_type_ids)
        return self._answer(input_ids, attention_mask, token_type_ids)

    def _answer(self, ids_NT: Tensor, mask_NT: Tensor, type_NT: Tensor | None) -> Tensor:
        more = {} if type_NT is None else {TYPES: type_NT}
        if self.way in ("counted", "counted_rolled"):
            more["position_ids"] = (mask_NT.cumsum(-1) - 1).clamp(min=0)
        said = answer(self.task, self.model(input_ids=ids_NT, attention_mask=mask_NT, **more))
        return said if self.pool is None else self.pool.vectors(said, mask_NT)

    def _rolled(self, ids_NT: Tensor, mask_NT: Tensor, type_NT: Tensor | None) -> Tensor:
        steps_T = torch.arange(ids_NT.shape[1])
        first_N1, count_1 = mask_NT.argmax(1, keepdim=True), steps_T[-1:] + 1
        # No remainder: the exporter has none by a length that it does not know.
        there_NT, back_NT = steps_T + first_N1, steps_T - first_N1
        there_NT = torch.where(there_NT >= count_1, there_NT - count_1, there_NT)
        back_NT = torch.where(back_NT < 0, back_NT + count_1, back_NT)
        ids_NT, mask_NT = ids_NT.gather(1, there_NT), mask_NT.gather(1, there_NT)
        said = self._answer(ids_NT, mask_NT, None if type_NT is None else type_NT.gather(1, there_NT))
        if self.task not in TOKEN_AXIS or self.pool is not None:
            return said
        axis = TOKEN_AXIS[self.task]
        return said.gather(axis, back_NT.unsqueeze(3 - axis).expand(said.shape))


@torch.no_grad()
def alone(
    model: PreTrainedModel,
    task: str,
    ids_1T: NDArray[np.int64],
    pool: Pooling | None = None,
    *,
    tells_segments: bool = False,
) -> NDArray[np.float32]:
    """What the model answers to one window by transformers' own ways: no mask, no place is told to it.

    Where it `tells_segments` the window's halves are two.
    """
    ids = torch.from_numpy(ids_1T)
    given = {"input_ids": ids} | ({TYPES: torch.from_numpy(halves(ids_1T))} if tells_segments else {})
    said = answers(model, task, given) if task == "translate" else answer(task, model(**given))
    found: NDArray[np.float32] = (said if pool is None else pool.vectors(said, torch.ones_like(ids))).numpy()
    return found


def padded(ids_1T: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """ids_NT and mask_NT of two rows: the window but for its last tokens, behind padding and before padding.

    Padding holds tokens like any other: only the mask says that they do not count.
    """
    kept = ids_1T[0, :-PADDING]
    rows = [np.concatenate([ids_1T[0, :PADDING], kept]), np.concatenate([kept, ids_1T[0, :PADDING]])]
    mask_NT = np.ones((2, ids_1T.shape[1]), np.int64)
    mask_NT[0, :PADDING] = mask_NT[1, -PADDING:] = 0
    return np.stack(rows), mask_NT


def padded_halves(ids_1T: NDArray[np.int64]) -> NDArray[np.int64]:
    """type_NT of what `padded` gives, the halves of what counts as two segments."""
    kept_1T = halves(ids_1T[:, :-PADDING])
    return padded(np.concatenate([kept_1T, kept_1T[:, -PADDING:]], axis=1))[0]


def unpadded(task: str, said_N: NDArray[np.float32]) -> NDArray[np.float32]:
    """The answers on the tokens that count, to what `padded` gives."""
    if task not in TOKEN_AXIS or said_N.ndim < 3:
        return said_N
    axis = TOKEN_AXIS[task] - 1
    count = said_N.shape[TOKEN_AXIS[task]] - PADDING
    return np.stack([said_N[0].take(range(PADDING, PADDING + count), axis), said_N[1].take(range(count), axis)])


def as_called(
    model: PreTrainedModel,
    task: str,
    ids_1T: NDArray[np.int64],
    *,
    fused: bool,
    pool: Pooling | None = None,
    tells_segments: bool = False,
) -> AsCalled:
    """The model with the masks of an exported graph, called so that padding changes nothing.

    Args:
        model: is changed: how it computes attention.
        task: what it is for.
        ids_1T: a window to ask it by.
        fused: attention is one operator, not products and a softmax.
        pool: makes one vector of each text.
        tells_segments: it is given the segments of tokens, too.

    Raises:
        StageError: padding changes what the model answers, however it is called.
    """
    model.config.use_cache = False
    ids_1T, worst = ids_1T[:, :ASKED_TOKENS], float("inf")
    with unrounded(model):
        alone_N = alone(model, task, ids_1T[:, :-PADDING], pool, tells_segments=tells_segments)
        wanted_N = np.concatenate([alone_N] * 2)
    _name_padding(model, task)
    segments = [padded_halves(ids_1T)] if tells_segments else []
    asked_NT = [torch.from_numpy(one) for one in (*padded(ids_1T), *segments)]
    for implementation in _attentions(model, fused=fused):
        _attend(model, implementation)
        for way in _ways(model):
            made = AsCalled(model, task, way, pool).eval()
            with torch.no_grad(), unrounded(model), masks():
                said_N = made(*asked_NT).numpy()
            found = parity(None, wanted_N, unpadded(task, said_N)).logit_difference
            if found <= LOGIT_LIMIT:
                return made
            worst = min(worst, found)
    raise StageError(
        f"{type(model).__name__} answers otherwise beside padding, so that no engine can be called in batches",
        measured=f"{worst:.3g} standard deviations",
        limit=LOGIT_LIMIT,
        remedy="Take `export` and what follows it out of the recipe, and judge the checkpoint itself.",
    )


def _attentions(model: PreTrainedModel, *, fused: bool) -> list[str]:
    """How attention may be computed in the graph, the best first."""
    if type(model)._can_set_attn_implementation():
        return ["sdpa" if fused and model._supports_sdpa else "eager"]
    # Attention of the model's own: it may call torch's fused operator with fewer heads of keys than of queries, which
    # the exporter does not take, and its `eager` may be another function (Falcon rounds its slopes in another place).
    return ["eager", model.config._attn_implementation]


def _attend(model: PreTrainedModel, implementation: str) -> None:
    if type(model)._can_set_attn_implementation():
        rounded_cache.use(model, implementation)
    else:
        model.config._attn_implementation = implementation


def _padding(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "pad_token_id", None)


def _ways(model: PreTrainedModel) -> tuple[Way, ...]:
    told = "position_ids" in inspect.signature(model.forward).parameters
    # Not told, a model may turn all rows by one table (ModernBERT), which the operator for that does not take.
    return ("counted", "own", "counted_rolled", "rolled") if told else ("own", "rolled")


def _name_padding(model: PreTrainedModel, task: str) -> None:
    """Let a classifier that knows no token of padding see where a row ends: by an id that no text has."""
    if task in TOKEN_AXIS or _padding(model) is not None:
        return
    model.config.get_text_config().pad_token_id = _NO_TOKEN
    model.get_input_embeddings().register_forward_pre_hook(lambda _module, args: (args[0].clamp(min=0), *args[1:]))


@contextmanager
def unrounded(model: PreTrainedModel) -> Iterator[None]:
    """Within it, the model rounds no activation, no key and no value: sums that differ in the last digit stay near."""
    every = quantized_linear.quantized_modules(model).values()
    scales = {m: m.input_scale for m in every if isinstance(m, quantized_linear.QuantizedLinear)}
    try:
        for module in scales:
            module.input_scale = None
        with rounded_cache.left_float(model):
            yield
    finally:
        for module, scale in scales.items():
            module.input_scale = scale


@contextmanager
def masks() -> Iterator[None]:
    """Within it, transformers makes masks by operations that a graph can hold, whatever pattern a layer attends by."""
    own = {sdpa_mask: _seen, eager_mask: _added}
    changed = {name: own[made] for name, made in ALL_MASK_ATTENTION_FUNCTIONS.items() if made in own}
    for name, made in changed.items():
        ALL_MASK_ATTENTION_FUNCTIONS[name] = made
    try:
        yield
    finally:
        for name in changed:
            del ALL_MASK_ATTENTION_FUNCTIONS[name]


def _seen(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **_others: Any,
) -> Tensor:
    """Which keys each query attends to, bool [N, 1, T, T]."""
    if use_vmap:
        raise StageError(
            "the model attends by a pattern of its own, which no graph holds",
            remedy="Take `export` and what follows it out of the recipe, and judge the checkpoint itself.",
        )
    query_T1, key_T = torch.arange(q_length)[:, None], torch.arange(kv_length)
    sequence_N111, head = torch.arange(batch_size)[:, None, None, None], torch.zeros((), dtype=torch.int64)
    seen = mask_function(sequence_N111, head, query_T1[None, None], key_T[None, None, None])
    if attention_mask is None:
        return seen
    # Padding attends to itself: a row without any key would turn into NaN and reach the others.
    return (seen & (attention_mask[:, None, None, :] > 0)) | (query_T1 == key_T)


def _added(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    """The same as what is added to the products of queries and keys."""
    return torch.where(_seen(*args, **kwargs), 0.0, torch.finfo(dtype).min)
