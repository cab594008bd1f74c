"""The gradient at the last block's outputs of what a model says is autograd's through the whole model."""

import pytest
import torch

from stages.algorithms.drawing import drawn
from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise.drawn_labels import drawn_gradient
from stages.models.checkpoint.loading import load_model
from tests.stages.export.test_called import classifier
from tests.stages.models.families import family

IDS = 3 + torch.arange(60).view(3, 20) * 7 % 90


def last_outputs(model, read):
    """What the last block gives, which keeps its gradient, and the model's logits."""
    kept = []

    def keep(_module, _args, out):
        x = out[0] if isinstance(out, tuple) else out
        x.retain_grad()
        kept.append(x)

    hook = anatomy.blocks(model)[-1].module.register_forward_hook(keep)
    logits = model(input_ids=read).logits
    hook.remove()
    return kept[0], logits


@pytest.mark.parametrize("name", ["llama_classes", "bert_classes", "bert_tokens", "llama"])
def test_gradient_of_classes_is_autograds(tmp_path, name):
    if name == "llama_classes":
        classifier(tmp_path / name, num_labels=4, pad_token_id=None)
    model = load_model(tmp_path / name if name == "llama_classes" else family(name, tmp_path))
    generator, wanted, given = torch.Generator().manual_seed(0), [], []
    for ids_T in IDS:
        x, logits = last_outputs(model, ids_T[None])
        log_p = logits.flatten(0, -2).log_softmax(-1)
        labels = drawn(log_p.detach().exp(), generator)[:, None]
        log_p.gather(1, labels).sum().backward()
        wanted.append(x.grad[0])
        given.append(x.detach()[0])
    found = drawn_gradient(model, IDS, torch.stack(given))
    torch.testing.assert_close(found, torch.stack(wanted), atol=1e-5, rtol=1e-3)
    assert found.any()


def test_gradient_of_numbers_counts_by_their_spread(tmp_path):
    classifier(tmp_path, pad_token_id=None)
    model = load_model(tmp_path)
    generator, slopes, given, numbers = torch.Generator().manual_seed(0), [], [], []
    for ids_T in IDS:
        x, logits = last_outputs(model, ids_T[None])
        (logits * torch.randn(1, 1, generator=generator)).sum().backward()
        slopes.append(x.grad[0])
        given.append(x.detach()[0])
        numbers.append(float(logits.detach()))
    wanted = torch.stack(slopes) / torch.tensor(numbers).std()
    torch.testing.assert_close(drawn_gradient(model, IDS, torch.stack(given)), wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["bert_bare", "bert_answers", "granite"])
def test_gradient_of_vectors_spans_and_scaled_logits_is_autograds(tmp_path, name):
    model, generator = load_model(family(name, tmp_path)), torch.Generator().manual_seed(0)
    slopes, given, numbers, kept = [], [], [], []

    def keep(_module, _args, out):
        kept.append(out[0] if isinstance(out, tuple) else out)
        kept[-1].retain_grad()

    hook = anatomy.blocks(model)[-1].module.register_forward_hook(keep)
    for ids_T in IDS:
        said = model(input_ids=ids_T[None])
        if name == "bert_bare":
            numbers.append(said.last_hidden_state.detach())
            (said.last_hidden_state * torch.randn(20, 32, generator=generator)).sum().backward()
        else:
            logits = said.logits[0] if name == "granite" else torch.cat([said.start_logits, said.end_logits])
            log_p = logits.log_softmax(-1)
            log_p.gather(1, drawn(log_p.detach().exp(), generator)[:, None]).sum().backward()
        given.append(kept[-1].detach()[0])
        slopes.append(kept[-1].grad[0])
    hook.remove()
    wanted = torch.stack(slopes) / (torch.cat(numbers).std() if numbers else 1)
    torch.testing.assert_close(drawn_gradient(model, IDS, torch.stack(given)), wanted, atol=1e-5, rtol=1e-3)
