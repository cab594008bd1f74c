from contextlib import nullcontext

import pytest
import torch

from stages.algorithms.drawing import drawn
from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise import block_calls, run
from stages.models.checkpoint.loading import load_model
from stages.runtime.contract import StageError

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


def test_sensitivities_equal_those_of_one_graph_over_the_whole_model(model, tmp_path):
    told = []
    found = {
        block.index: statistics
        for block, statistics in run.sensitivities(
            model, IDS, anatomy.ROLES, tmp_path, lambda done, total: told.append(done / total)
        )
    }
    assert list(found) == [5, 4, 3, 2, 1, 0]
    assert told == sorted(told)
    assert told[-1] == 1
    seen = {}
    for block in anatomy.blocks(model):
        for role, one in anatomy.projections(block).items():

            def see(_m, args, out, key=(block.index, role)):
                out.retain_grad() if out.requires_grad else out.requires_grad_().retain_grad()
                seen.setdefault(key, []).append((args[0][0], out))

            one.register_forward_hook(see)
    generator = torch.Generator().manual_seed(0)
    for number, ids in enumerate(IDS):
        log_p = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        if number == 2:  # moments are of all windows, gradients of the first half
            break
        labels = drawn(log_p.detach().exp(), generator)[:, None]
        log_p.gather(1, labels).sum().backward()
    for (index, role), pairs in seen.items():
        x = torch.cat([pair[0] for pair in pairs]).detach()
        g = torch.cat([pair[1].grad[0] for pair in pairs[:2]])
        moment, gradient = found[index].moments[run.SITES[role]], found[index].gradients[role]
        torch.testing.assert_close(moment, x.T @ x / IDS.numel(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, g.square().mean(0), rtol=1e-2, atol=1e-4 * float(gradient.max()))


def test_run_activation_that_overflows_is_refused_by_block(model, tmp_path):
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(StageError, match=r"after model\.layers\.3 hold a NaN or an infinity"):
        list(run.sensitivities(model, IDS, ("q",), tmp_path, lambda *_: None))


def test_bfloat16_products_change_statistics_by_little(model, monkeypatch, tmp_path):
    def statistics():
        return {b.index: s for b, s in run.sensitivities(model, IDS, anatomy.ROLES, tmp_path, lambda *_: None)}

    exact = statistics()
    monkeypatch.setattr(run, "in_short", lambda: torch.autocast("cpu", torch.bfloat16))
    short = statistics()
    for index, one in exact.items():
        for site, moment in one.moments.items():
            assert (short[index].moments[site] - moment).norm() < 0.01 * moment.norm()


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
