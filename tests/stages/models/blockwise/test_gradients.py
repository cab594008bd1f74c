"""Gradients of weights, block by block, against one graph over the whole model."""

import pytest
import torch
from torch.nn import functional

from stages.models.blockwise.gradients import gradients
from stages.models.checkpoint.loading import load_model
from tests.stages.models.families import family

IDS = 3 + torch.arange(3 * 20).view(3, 20) * 7 % 50


@pytest.mark.parametrize("name", ["llama", "granite", "gemma2", "xglm", "biogpt", "gpt2", "falcon"])
def test_gradients_are_those_of_the_models_own_loss_whatever_it_does_to_its_logits(name, tmp_path):
    folder = family(name, tmp_path / "made")
    found = {path: g for one in gradients(load_model(folder), IDS, tmp_path, print) for path, g in one.items()}
    model = load_model(folder).requires_grad_(True)
    sums = {path: torch.zeros_like(g) for path, g in found.items()}
    for ids_T in IDS:
        model.zero_grad()
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0]
        functional.cross_entropy(logits_TV[:-1], ids_T[1:]).backward()
        for path, sum_OI in sums.items():
            sum_OI += model.get_submodule(path).weight.grad.abs() / len(IDS)
    for path, g_OI in found.items():
        torch.testing.assert_close(g_OI, sums[path], rtol=1e-3, atol=1e-6 * float(sums[path].max() + 1e-30))
