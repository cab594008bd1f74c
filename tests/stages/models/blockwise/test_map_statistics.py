"""Statistics of maps, block by block, against one graph over the whole model."""

from contextlib import nullcontext

import pytest
import torch

from stages.algorithms.drawing import drawn
from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise import map_statistics
from stages.models.blockwise.map_statistics import statistics_of
from stages.models.checkpoint.loading import load_model
from stages.runtime.contract import StageError

IDS = (torch.arange(3 * 20).view(3, 20) * 13) % 768


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Products as they are, not in bfloat16: then sums must agree to the last digits."""
    monkeypatch.setattr(map_statistics, "in_short", nullcontext)


@pytest.fixture
def model(tiny):
    return load_model(tiny)


def test_statistics_equal_those_of_one_graph_over_the_whole_model(model, tmp_path):
    told = []
    found = {
        block.index: statistics
        for block, statistics in statistics_of(model, IDS, tmp_path, lambda done, total: told.append(done / total))
    }
    assert list(found) == [5, 4, 3, 2, 1, 0]
    assert told == sorted(told)
    assert told[-1] == 1
    seen = {}
    for block in anatomy.blocks(model):
        for path, one in anatomy.maps(block).items():

            def see(_m, args, out, key=(block.index, path)):
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
    for (index, path), pairs in seen.items():
        x = torch.cat([pair[0] for pair in pairs]).detach()
        g = torch.cat([pair[1].grad[0] for pair in pairs[:2]])
        moment, gradient = found[index].moments[found[index].first[path]], found[index].gradients[path]
        torch.testing.assert_close(moment, x.T @ x / IDS.numel(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, g.square().mean(0), rtol=1e-2, atol=1e-4 * float(gradient.max()))


def test_run_activation_that_overflows_is_refused_by_block(model, tmp_path):
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(StageError, match=r"after model\.layers\.3 hold a NaN or an infinity"):
        list(statistics_of(model, IDS, tmp_path, lambda *_: None))


def test_bfloat16_products_change_statistics_by_little(model, monkeypatch, tmp_path):
    def statistics():
        return {b.index: s for b, s in statistics_of(model, IDS, tmp_path, lambda *_: None)}

    exact = statistics()
    monkeypatch.setattr(map_statistics, "in_short", lambda: torch.autocast("cpu", torch.bfloat16))
    short = statistics()
    for index, one in exact.items():
        for site, moment in one.moments.items():
            assert (short[index].moments[site] - moment).norm() < 0.01 * moment.norm()
