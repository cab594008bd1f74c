"""How what a model says depends on the outputs of its last block, for labels drawn from what it says.

Shapes: N windows, T tokens, t of them at once, S tokens of an encoder, H hidden, M answers, C classes, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.algorithms.drawing import drawn
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy import tasks
from stages.models.blockwise.block_calls import answers
from stages.models.memory.pages import release, trim

HEAD_TOKENS = 64
"""Tokens whose logits are held at once: a vocabulary is a hundred times as wide as a small model."""


def drawn_gradient(model: PreTrainedModel, ids_NT: Tensor, x_NTH: Tensor, text_NS: Tensor | None = None) -> Tensor:
    """Gradient at the last block's outputs of log p(label), [N, T, H], the labels drawn from the model's answers.

    An answer of a number, or of vectors, counts as the mean of a normal distribution, as wide as the answers to the
    windows.

    Args:
        model: any; of an encoder and a decoder, what the decoder says counts.
        ids_NT: the windows that the last stack reads.
        x_NTH: the last block's outputs on them.
        text_NS: what the encoder of two stacks reads.
    """
    generator = torch.Generator().manual_seed(0)
    if model.get_output_embeddings() is None:
        return _of_texts(model, ids_NT, x_NTH, text_NS, generator)
    ids = [ids_1t for ids_1T in ids_NT.split(1) for ids_1t in ids_1T.split(HEAD_TOKENS, dim=1)]
    parts = [x_1tH.detach() for x_1TH in x_NTH.split(1) for x_1tH in x_1TH.split(HEAD_TOKENS, dim=1)]
    gradients = []
    for x_1tH, logits_1tV in zip(parts, answers(model, ids, map(Tensor.requires_grad_, parts)), strict=True):
        gradients.append(torch.autograd.grad(logits_1tV[0], x_1tH, _slope(logits_1tV[0], generator))[0][0])
    release(anatomy.head(model))
    trim()
    return torch.cat(gradients).view_as(x_NTH)


def _of_texts(
    model: PreTrainedModel, ids_NT: Tensor, x_NTH: Tensor, text_NS: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Of models whose answer to a text is no row of tokens: classes, a span, numbers or vectors."""
    gradients, numbers = [], []
    x_NTH, real = x_NTH.detach().requires_grad_(), tasks.task_of(model) == "embed"
    texts = None if text_NS is None else text_NS.split(1)
    for n, said in enumerate(answers(model, ids_NT.split(1), x_NTH.split(1), texts)):
        said_MC = said.flatten(0, -2)
        if real or said_MC.shape[1] == 1:
            slope_MC = torch.randn(said_MC.shape, generator=generator)
            numbers.append(said_MC.detach())
        else:
            slope_MC = _slope(said_MC, generator)
        gradients.append(torch.autograd.grad(said_MC, x_NTH, slope_MC)[0][n])
    g_NTH = torch.stack(gradients)
    spread = torch.cat(numbers) if numbers else torch.ones(1)
    wide = spread.std() if spread.numel() > 1 else torch.ones(())
    return g_NTH / wide if wide > 0 else g_NTH


def _slope(logits_MC: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of log p(label) at the logits, made in place of the probabilities: logits are wide."""
    p_MC = logits_MC.detach().softmax(-1)
    labels_M1 = drawn(p_MC, generator)[:, None]
    return p_MC.neg_().scatter_add_(1, labels_M1, p_MC.new_ones(len(labels_M1), 1))
