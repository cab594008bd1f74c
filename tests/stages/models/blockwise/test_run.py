from contextlib import nullcontext

import pytest
import torch

from stages.algorithms.drawing import drawn
from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise import block_calls, run
from stages.models.checkpoint.loading import load_model

IDS = (torch.arange(3 * 20).view(3, 20) * 13) % 768


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Products as they are, not in bfloat16: then sums must agree to the last digits."""
    monkeypatch.setattr(run, "in_short", nullcontext)


@pytest.fixture
def model(tiny):
    return load_model(tiny)


def test_run_through_all_blocks_is_the_models_own_forward(model):
    x = block_calls.embedded(model, IDS)
    for block, kwargs in zip(anatomy.blocks(model), block_calls.arguments(model, 20), strict=True):
        x = run.run(block, x, kwargs)
    with torch.no_grad():
        assert torch.allclose(model.model(input_ids=IDS).last_hidden_state, anatomy.last_norm(model)(x), atol=1e-5)


def test_worth_is_half_the_gradients_energy_times_a_usual_outputs(model):
    found = run.worth(model, IDS[:1])
    assert set(found) == {f"{b.name}.{anatomy.path(r, b)}" for b in anatomy.blocks(model) for r in anatomy.ROLES}
    outputs = {}
    for block in anatomy.blocks(model):
        for role, one in anatomy.projections(block).items():

            def see(_m, _a, out, block=block, role=role):
                path = f"{block.name}.{anatomy.path(role, block)}"
                out.requires_grad_().retain_grad()
                outputs[path] = out

            one.register_forward_hook(see)
    log_p = model(input_ids=IDS[:1]).logits[0].log_softmax(-1)
    labels = drawn(log_p.detach().exp(), torch.Generator().manual_seed(0))[:, None]
    log_p.gather(1, labels).sum().backward()
    for path, y in outputs.items():
        usual = y.detach().square().sum(-1).median()
        assert found[path] == pytest.approx(float(y.grad.square().mean() * usual) / 2, rel=1e-3)
