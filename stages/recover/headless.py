"""A model apart from its head: last hidden states on one side, the map from these to logits on the other.

Shapes: N windows, T tokens, H hidden, C classes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.distillation import Head
from stages.algorithms.products import SHORT
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy import tasks
from stages.models.checkpoint.loading import load_model
from stages.models.layers import rounded_cache
from stages.models.text.decoder_answers import NOTHING
from stages.recover.checks import CLASSES, check_length
from stages.runtime.contract import StageError

WHOLE_ATTENTION = 256
"""Up to this many tokens the plain product of queries and keys takes half the time of torch's fused one in bfloat16."""
OF_A_WINDOW = {"classify": 1, "score": 1, "choose": 1, "answer": 2}
"""Task -> the answers to a window, where these are not one a token."""
ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What a model raises that wants more than it is given."""
LOGIT_TOLERANCE = 0.02
"""Difference, over the largest logit, that two roundings to a short float explain."""


class Taken(nn.Module):
    """In a head's place: keeps what the head would have read, and says that, or what it is told to.

    Attributes:
        weight: the head's, by whose type or device a model may cast what it gives the head (Mamba).
        bias: the head's.
        states: what it was given last.
        instead: what it says.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        # Detached they are plain attributes, and no parameters that the head's table would be counted by.
        self.weight = head.weight.detach()  # type: ignore[operator]
        self.bias = None if getattr(head, "bias", None) is None else head.bias.detach()  # type: ignore[operator]
        self.states: Tensor | None = None
        self.instead: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The same, any shape."""
        self.states = x
        return x if self.instead is None else self.instead


@dataclass(frozen=True)
class Apart:
    """A model in a short float whose head was taken off, and the head. Its dropout is off.

    An encoder-decoder's windows hold S tokens for the encoder, then T for the decoder, NOTHING where an answer ended.
    A classifier's head is what gives its logits as they are: these are its hidden states, one a window or one a token.
    What finds answers says two things of a window, where one begins and where it ends: its classes are the tokens.

    Attributes:
        model: gives hidden states.
        head: makes logits of them.
        task: what the model is for.
        source: S; 0 without an encoder before the decoder.
        taken: stands in the head's place; None in a classifier.
        scale: what the model multiplies the head's product by.
    """

    model: PreTrainedModel
    head: Head
    task: str
    source: int = 0
    taken: Taken | None = None
    scale: float = 1.0

    def hidden(self, ids_NT: Tensor) -> Tensor:
        """The last hidden states, [N, T, H]; of a classifier its logits, [N, T, C], [N, 1, C] or [N, 2, T]."""
        read = {"input_ids": ids_NT}
        if self.source:
            source_NS, answer_NT = ids_NT[:, : self.source], ids_NT[:, self.source :].clamp_min(0)
            read = {"input_ids": source_NS, "decoder_input_ids": answer_NT}
        return self.states(self.model(**read))

    def states(self, said: Any) -> Tensor:
        """The same of what the model has just said."""
        if self.taken is None:
            logits = tasks.answer(self.task, said)
            return logits if logits.ndim == 3 else logits[:, None]
        states, self.taken.states = self.taken.states, None
        if states is None:
            raise LookupError("the model reads its head's weight and does not call it")
        return states if self.scale == 1 else states * self.scale

    def length(self, ids_NT: Tensor) -> int:
        """Answers to a window."""
        return self.counted(ids_NT[:1]).shape[1]

    def counted(self, ids_NT: Tensor) -> Tensor:
        """Whether an answer counts: [N, T], or [N, 1] or [N, 2] where a window has so many."""
        return self.counted_tokens(ids_NT)[:, : OF_A_WINDOW.get(self.task)]

    def counted_tokens(self, ids_NT: Tensor) -> Tensor:
        """Whether a token's states count, [N, T]."""
        return ids_NT[:, self.source :] != NOTHING

    @property
    def predicts(self) -> bool:
        """Whether an answer is the next token of a text that is true."""
        return anatomy.predicts(self.model, self.task)

    def labels(self, ids_NT: Tensor) -> Tensor:
        """The next token of each position, -1 for the last, as `counted` is; all -1 where none is predicted."""
        if not self.predicts:
            return torch.full(self.counted(ids_NT).shape, -1)
        return torch.cat([ids_NT[:, 1:], torch.full_like(ids_NT[:, :1], -1)], dim=1)


def load_apart(folder: Path, tokens: int) -> Apart:
    """Load a checkpoint in a short float and take its head off.

    Args:
        folder: a CHECKPOINT artifact.
        tokens: length of the windows that it will read; an encoder and a decoder read as many each.

    Raises:
        StageError: the model answers neither tokens nor classes, its logits are not its head's product, scaled and
            capped, or its windows are shorter.
    """
    model = load_model(folder, dtype=SHORT)
    name, task = type(model).__name__, tasks.task(model.config)
    check_length(model, tokens, tasks.longest(model.config))
    model.config.use_cache = False
    if tokens <= WHOLE_ATTENTION:
        rounded_cache.use(model, "eager")
    if task in CLASSES:
        return _classifier(model, task, tokens)
    two = bool(model.config.is_encoder_decoder)
    ids_1T = torch.arange(min(tokens, 8))[None] % model.config.get_text_config().vocab_size
    read = {"input_ids": ids_1T} | ({"decoder_input_ids": ids_1T} if two else {})
    try:
        return _without_head(model, task, read, tokens if two else 0)
    except ERRORS as error:
        raise _not_understood(name, said(error), "logits by its head alone") from error


def said(error: BaseException) -> str:
    """An error's type and the first line of its text."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _without_head(model: PreTrainedModel, task: str, read: dict[str, Tensor], source: int) -> Apart:
    old = anatomy.head(model)
    assert isinstance(old.weight, Tensor)
    with torch.no_grad():
        expected_TV, taken = model(**read).logits[0].float(), Taken(old)
        anatomy.replace(model, old, taken)
        bias_V = _added(model, old.weight)
        scale, cap = _scale_and_cap(model, read, taken)
        if isinstance(own_V := getattr(old, "bias", None), Tensor):
            bias_V = own_V.detach() * scale if bias_V is None else bias_V + own_V.detach() * scale
        made = Apart(model, Head(old.weight.detach(), bias_V, cap), task, source, taken, scale)
        found_TV = made.head.logits(made.states(model(**read))[0]).float()
    if not (found_TV - expected_TV).abs().max() <= LOGIT_TOLERANCE * expected_TV.abs().max():
        raise _not_understood(
            type(model).__name__,
            f"difference {float((found_TV - expected_TV).abs().max()):.3g}",
            f"{LOGIT_TOLERANCE} of the largest, {float(expected_TV.abs().max()):.3g}",
        )
    return made


def _not_understood(name: str, measured: str, limit: str) -> StageError:
    return StageError(
        f"the logits of {name} are not its head's product, scaled and capped; recovery does not understand it",
        measured=measured,
        limit=limit,
        remedy="Take `recover` out of the recipe.",
    )


def _classifier(model: PreTrainedModel, task: str, tokens: int) -> Apart:
    """What comes after the blocks of a classifier is small and its answers are few: they keep float32."""
    inside = {id(module) for path in anatomy.stacks(model) for module in model.get_submodule(path)}
    inside.add(id(anatomy.embedding(model)))
    for child in model.children():
        if inside.isdisjoint(map(id, child.modules())):  # T5 that finds answers has its stacks beside its head
            child.float()
            child.register_forward_pre_hook(lambda _module, args: (args[0].float(), *args[1:]))
    config = model.config.get_text_config()
    if getattr(config, "pad_token_id", None) is None:
        # Windows hold no padding, but a decoder takes no two of them without knowing which token that is.
        config.pad_token_id = -1
    count = {"answer": tokens, "choose": 1}.get(task, model.config.num_labels)
    return Apart(model, Head(torch.eye(count)), task)


def _scale_and_cap(model: PreTrainedModel, read: dict[str, Tensor], taken: Taken) -> tuple[float, float | None]:
    """Scale s and cap c of logits that are c tanh(s x / c) of a product x, or s x: asked by products that are known."""
    little, much = 1e-6, 1e9
    taken.instead = torch.tensor([little, much], dtype=torch.float64)[None, None]
    low, high = model(**read).logits[0, 0].double().tolist()
    taken.instead = None
    scale = low / little
    scale = 1.0 if abs(scale - 1) < LOGIT_TOLERANCE**2 else scale
    return scale, None if abs(high / much - scale) < LOGIT_TOLERANCE * abs(scale) else high


def _added(model: PreTrainedModel, weight_VH: Tensor) -> Tensor | None:
    """What the model itself adds to the logits, which it adds no longer."""
    bias_V: Tensor | None = None
    for name, added in list(model.named_buffers(recurse=False)):
        if added.numel() == model.config.get_text_config().vocab_size:
            model.register_buffer(name, added.new_zeros(1))
            own_V = added.flatten().to(weight_VH.dtype)
            bias_V = own_V if bias_V is None else bias_V + own_V
    return bias_V


def embedded_names(model: PreTrainedModel) -> set[str]:
    """Names of the parameters of embedding and head, where the model has one that gives tokens."""
    modules = [anatomy.embedding(model), model.get_output_embeddings()]
    tables = {id(tensor) for module in modules if module is not None for tensor in module.parameters()}
    return {name for name, tensor in model.named_parameters() if id(tensor) in tables}
