"""How what a model says depends on the outputs of its last block, for labels drawn from what it says.

Shapes: N windows, T tokens, H hidden, M answers, C classes, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.algorithms.drawing import drawn
from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise.block_calls import answers
from stages.models.memory.pages import release, trim

HEAD_TOKENS = 64
"""Tokens whose logits are held at once: a vocabulary is a hundred times as wide as a small model."""


def drawn_gradient(model: PreTrainedModel, ids_NT: Tensor, x_NTH: Tensor) -> Tensor:
    """Gradient at the last block's outputs of log p(label), [N, T, H], the labels drawn from the model's answers.

    An answer of a single number counts as the mean of a normal distribution, as wide as the answers to the windows.

    Args:
        model: a decoder, or a classifier of texts or of tokens.
        ids_NT: the windows.
        x_NTH: the last block's outputs on them.

    Raises:
        StageError: the model answers neither tokens nor classes.
    """
    generator = torch.Generator().manual_seed(0)
    if model.get_output_embeddings() is None:
        return _of_classes(model, ids_NT, x_NTH, generator)
    norm, head = anatomy.last_norm(model), anatomy.head(model)
    gradients = []
    for x_TH in x_NTH.flatten(0, 1).split(HEAD_TOKENS):
        x = x_TH.detach().requires_grad_()
        logits_TV = head(norm(x))
        gradients.append(torch.autograd.grad(logits_TV, x, _slope(logits_TV, generator))[0])
    release(head)
    trim()
    return torch.cat(gradients).view_as(x_NTH)


def _of_classes(model: PreTrainedModel, ids_NT: Tensor, x_NTH: Tensor, generator: torch.Generator) -> Tensor:
    gradients, numbers = [], []
    x_NTH = x_NTH.detach().requires_grad_()
    for n, logits in enumerate(answers(model, ids_NT, x_NTH)):
        logits_MC = logits.flatten(0, -2)
        if logits_MC.shape[1] == 1:
            slope_MC = torch.randn(logits_MC.shape, generator=generator)
            numbers.append(logits_MC.detach())
        else:
            slope_MC = _slope(logits_MC, generator)
        gradients.append(torch.autograd.grad(logits_MC, x_NTH, slope_MC)[0][n])
    g_NTH = torch.stack(gradients)
    wide = torch.cat(numbers).std() if len(numbers) > 1 else torch.ones(())
    return g_NTH / wide if wide > 0 else g_NTH


def _slope(logits_MC: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of log p(label) at the logits, made in place of the probabilities: logits are wide."""
    p_MC = logits_MC.detach().softmax(-1)
    labels_M1 = drawn(p_MC, generator)[:, None]
    return p_MC.neg_().scatter_add_(1, labels_M1, p_MC.new_ones(len(labels_M1), 1))
