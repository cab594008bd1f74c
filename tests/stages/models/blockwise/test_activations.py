from contextlib import nullcontext

import pytest
import torch

from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise import activations
from stages.models.blockwise.activations import TAILS, observe
from stages.models.checkpoint.loading import load_model
from stages.runtime.contract import StageError


def test_observed_figures_equal_those_of_the_recorded_inputs(tiny, monkeypatch):
    monkeypatch.setattr(activations, "in_short", nullcontext)
    model = load_model(tiny)
    maps = anatomy.projections(anatomy.blocks(model)[2])
    ids_NT = torch.randint(0, 768, (3, 40), generator=torch.Generator().manual_seed(0))
    seen = {}
    handles = [
        m.register_forward_pre_hook(lambda _m, a, r=r: seen.setdefault(r, []).append(a[0])) for r, m in maps.items()
    ]
    with torch.no_grad():
        for ids_1T in ids_NT.split(1):
            model(ids_1T)
    for handle in handles:
        handle.remove()
    found = observe(model, {role: [module] for role, module in maps.items()}, ids_NT, rows=12)
    for role, chunks in seen.items():
        x_NI = torch.cat(chunks).flatten(0, 1)
        torch.testing.assert_close(found[role].peak_I, x_NI.abs().amax(0))
        torch.testing.assert_close(found[role].mean_square_I, x_NI.square().mean(0))
        sample, late_NI = found[role].sample, x_NI[40:]
        torch.testing.assert_close(sample.peak_I, x_NI[:40].abs().amax(0))
        assert all((row == late_NI).all(1).any() for row in sample.x_NI)
        extreme = (late_NI.abs() / sample.peak_I).amax(1).argmax()
        assert (sample.x_NI == late_NI[extreme]).all(1).any()
        # Sampled rows stand for all tokens; the extreme rows beside them for themselves.
        assert 80 <= sample.weight_N.sum() <= 80 + TAILS + 12


def test_a_map_that_stands_twice_is_observed_at_both_places(tiny):
    model = load_model(tiny)
    down = [anatomy.projections(block)["down"] for block in anatomy.blocks(model)[:2]]
    ids_NT = torch.randint(0, 768, (2, 32), generator=torch.Generator().manual_seed(1))
    apart = observe(model, {"a": down[:1], "b": down[1:]}, ids_NT, rows=8)
    both = observe(model, {"ab": down}, ids_NT, rows=8)["ab"]
    torch.testing.assert_close(both.peak_I, torch.maximum(apart["a"].peak_I, apart["b"].peak_I))
    torch.testing.assert_close(both.mean_square_I, (apart["a"].mean_square_I + apart["b"].mean_square_I) / 2)


def test_a_nan_is_refused_by_the_name_of_the_map_that_reads_it(tiny):
    model = load_model(tiny)
    block = anatomy.blocks(model)[1]
    with torch.no_grad():
        anatomy.norms(block)["mlp"].weight[5] = float("nan")
    maps = {f"{one.name}.gate": [anatomy.projections(one)["gate"]] for one in anatomy.blocks(model)}
    with pytest.raises(StageError, match=r"layers\.1\.gate .*NaN"):
        observe(model, maps, torch.zeros(2, 16, dtype=torch.int64), rows=4)


def test_a_map_that_reads_nothing_is_refused(tiny):
    model = load_model(tiny)
    with pytest.raises(StageError, match="aside read nothing"):
        observe(model, {"aside": [torch.nn.Linear(2, 2)]}, torch.zeros(2, 16, dtype=torch.int64), rows=4)


def test_a_single_window_is_refused(tiny):
    model = load_model(tiny)
    with pytest.raises(StageError, match=r"1 window.*2 windows"):
        observe(model, {}, torch.zeros(1, 16, dtype=torch.int64), rows=4)


def test_maps_that_read_one_tensor_are_measured_once(tiny):
    model = load_model(tiny)
    maps = anatomy.projections(anatomy.blocks(model)[0])
    ids_NT = torch.randint(0, 768, (2, 32), generator=torch.Generator().manual_seed(1))
    three = observe(model, {"qkv": [maps[role] for role in "qkv"]}, ids_NT, rows=8)["qkv"]
    one = observe(model, {"q": [maps["q"]]}, ids_NT, rows=8)["q"]
    assert torch.equal(three.sample.x_NI, one.sample.x_NI)
    torch.testing.assert_close(three.mean_square_I, one.mean_square_I)
