import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stages.algorithms.allocation import Option
from stages.algorithms.basis import damped
from stages.export.to_onnx import densify
from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.files import stored_parameters
from stages.models.checkpoint.loading import load_model, save_model
from stages.models.layers import sparse_linear
from stages.models.layers.low_rank_linear import ResidualLinear, SharedLinear
from stages.models.low_rank.planning import Part, Plan, filled
from stages.models.low_rank.products import LowRank
from stages.quantize import movable_scales
from stages.recover.weight_updates import listen, updates
from stages.runtime.contract import StageError

PATH = "model.layers.1.mlp.up_proj"


def sparse(share, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(192, 64, generator=draw) * (torch.rand(192, 64, generator=draw) < share)


def with_sparse(tiny, share):
    """The tiny model with one map of rank 4 and single weights."""
    model = load_model(tiny)
    part = sparse_linear.filled(sparse_linear.tensors(sparse(share)), 192, 64, None)
    low = SharedLinear(filled(torch.randn(4, 64) / 8, None), filled(torch.randn(192, 4) / 8, None))
    model.set_submodule(PATH, ResidualLinear(part, low))
    return model


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_sparse_map_gives_what_the_dense_one_does_and_its_zeros_have_no_gradient(share):
    s_OI = sparse(share)
    one = sparse_linear.filled(sparse_linear.tensors(s_OI), 192, 64, nn.Parameter(torch.ones(192)))
    dense, x = nn.Linear(64, 192), torch.randn(5, 64)
    dense.weight, dense.bias = nn.Parameter(s_OI), nn.Parameter(torch.ones(192))
    assert torch.equal(one.dense(), s_OI)
    assert torch.equal(one(x), dense(x))
    one(x).square().sum().backward()
    dense(x).square().sum().backward()
    assert torch.equal(one.values.grad, dense.weight.grad[s_OI != 0])


@pytest.mark.parametrize(("share", "form"), [(0.02, "columns"), (0.5, "mask")])
def test_sparse_map_is_stored_in_few_bytes_and_loads_to_the_same_logits(tiny, tmp_path, share, form):
    model = with_sparse(tiny, share)
    save_model(model, tmp_path / "a", like=tiny)
    again, ids = load_model(tmp_path / "a"), torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    stored = {
        k: one for k, one in load_file(tmp_path / "a" / "model.safetensors").items() if k.startswith(f"{PATH}.dense.")
    }
    kept = int((sparse(share) != 0).sum())
    positions = 192 * 8 if form == "mask" else 2 * kept + 2 * 192
    assert sum(one.numpy().nbytes for one in stored.values()) == 4 * kept + positions < 4 * 192 * 64
    whole = positions // 4 if form == "mask" else -(-2 * kept // 4) + 96
    told = json.loads((tmp_path / "a" / "structure.json").read_text())["sparse"]
    assert told["maps"] == {f"{PATH}.dense": {"values": kept, "positions": form}}
    assert list(told["forms"]) == [form]
    assert (
        anatomy.block_parameters(again)
        == anatomy.block_parameters(load_model(tiny)) - 192 * 64 + 4 * 256 + kept + whole
    )
    assert stored_parameters(tmp_path / "a") - stored_parameters(tiny) == 4 * 256 + kept + whole - 192 * 64
    save_model(again, tmp_path / "b", like=tiny)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_sparse_map_whose_bytes_do_not_fit_is_refused(tiny, tmp_path):
    save_model(with_sparse(tiny, 0.5), tmp_path, like=tiny)
    file, structure = tmp_path / "model.safetensors", tmp_path / "structure.json"
    stored, spec = load_file(file), json.loads(structure.read_text())
    flipped = {**stored, f"{PATH}.dense.mask": stored[f"{PATH}.dense.mask"] ^ 1}
    save_file(flipped, file, {"format": "pt"})
    with pytest.raises(StageError, match=f"{PATH}.dense has positions for another number of values"):
        load_model(tmp_path)
    spec["sparse"]["maps"][f"{PATH}.dense"]["positions"] = "runs"
    structure.write_text(json.dumps(spec))
    with pytest.raises(StageError, match=r"positions of .* are unknown; measured runs; limit mask, columns"):
        load_model(tmp_path)


def test_sparse_map_of_damaged_columns_is_refused(tiny, tmp_path):
    save_model(with_sparse(tiny, 0.02), tmp_path, like=tiny)
    stored = load_file(tmp_path / "model.safetensors")
    stored[f"{PATH}.dense.columns"][0] = 64
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageError, match=f"{PATH}.dense is damaged; measured a sparse matrix has columns outside"):
        load_model(tmp_path)


def test_training_moves_the_weights_that_stand_and_nothing_else_of_the_map(tiny):
    saved, computing = with_sparse(tiny, 0.5), with_sparse(tiny, 0.5).bfloat16()
    made = updates("full", saved, computing, rank=1, seed=0)
    listen(made)
    ids = torch.arange(30)[None]
    computing(input_ids=ids, labels=ids).loss.backward()
    own = [name for name in made.moved if name.startswith(f"{PATH}.dense.")]
    assert own == [f"{PATH}.dense.values"]
    moved = made.moved[own[0]]
    assert moved.grad.shape == moved.shape
    assert (moved.grad != 0).float().mean() > 0.9
    with torch.no_grad():
        moved -= 0.01 * moved.grad
    made.finish()
    after = saved.get_submodule(PATH).dense.dense()
    assert torch.equal(after == 0, sparse(0.5) == 0)
    assert not torch.equal(after, sparse(0.5))


def test_densify_makes_the_map_one_dense_matrix_with_the_same_logits(tiny):
    model, ids = with_sparse(tiny, 0.5), torch.arange(40)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        densify(model)
        assert isinstance(model.get_submodule(PATH), nn.Linear)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_ranges_cannot_move_into_the_sum_of_two_maps(tiny):
    with pytest.raises(StageError, match=f"{PATH} is the sum of two maps"):
        movable_scales.sites(with_sparse(tiny, 0.5))


class Kept:
    """What a map reads, and that nothing drifted."""

    def __init__(self, moment_II):
        self.moment_II = moment_II

    def target(self, _path, w_OI):
        return w_OI


def test_map_whose_product_alone_loses_less_keeps_it_and_says_so(tiny):
    block = anatomy.blocks(load_model(tiny))[0]
    part = Part(("self_attn.q_proj",), (block,), ())
    path, draw = part.paths[0], np.random.default_rng(0)
    thin = torch.from_numpy((draw.normal(size=(64, 16)) @ draw.normal(size=(16, 64))).astype(np.float32))
    full = torch.from_numpy(draw.normal(size=(64, 64)).astype(np.float32))
    plan = Plan(part, Option(1, 0.0, 16), torch.ones(64), None)
    maps = {"self_attn.q_proj": nn.Linear(64, 64, bias=False)}
    for w_OI, whole in ((thin, True), (full, False)):
        maps["self_attn.q_proj"].weight = nn.Parameter(w_OI)
        made = LowRank({path: plan}, 0.5).compress(block, maps, Kept(damped(torch.eye(64)).float()))["self_attn.q_proj"]
        assert ("values" in made.tensors) is not whole
        assert made.row["rank"] == (16 if whole else 8)
        assert (made.row["sparse_weights"] == 0) is whole
        assert ("product of the same size loses less" in made.row.get("sparse", "")) is whole
        assert (made.row["error_against_product_alone"] == 1) is whole
