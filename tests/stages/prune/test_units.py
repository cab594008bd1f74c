import pytest
import torch
from torch.nn import functional

from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise import block_calls, run
from stages.models.checkpoint.loading import load_model
from stages.models.layers import low_rank_linear, quantized_linear
from stages.prune import units as surgery
from stages.prune.units import CHANNELS, HEADS
from stages.runtime.contract import StageError

IDS = (torch.arange(40).view(2, 20) * 13) % 768


@pytest.fixture
def model(tiny):
    return load_model(tiny)


def narrow(block, kept, down):
    surgery.cut(block, surgery.of(block, CHANNELS)[0], kept, down, {})


def forward_pass_of_a_block(block, x):
    """gate, up, down by hand."""
    maps = anatomy.projections(block)
    return maps["down"](functional.silu(maps["gate"](x)) * maps["up"](x))


def test_narrow_computes_what_is_left(model):
    block, kept = anatomy.blocks(model)[1], torch.tensor([0, 3, 5, 100, 191])
    maps, x = anatomy.projections(block), torch.randn(7, 64)
    hidden = functional.silu(x @ maps["gate"].weight[kept].T) * (x @ maps["up"].weight[kept].T)
    new_down = torch.randn(64, 5)
    before, each = anatomy.block_parameters(model), surgery.parameters(block, surgery.of(block, CHANNELS)[0])
    narrow(block, kept, new_down)
    torch.testing.assert_close(forward_pass_of_a_block(block, x), hidden @ new_down.T)
    assert before - anatomy.block_parameters(model) == (192 - 5) * each
    assert (maps["gate"].out_features, maps["down"].in_features) == (5, 5)


def test_narrow_behind_a_shared_basis_takes_rows_of_the_coefficients(model):
    paths = [f"model.layers.{i}.mlp.{r}_proj" for i in (0, 1) for r in ("gate", "up")]
    low_rank_linear.install(model, {"shared": [{"modules": paths, "rank": 16}]})
    block, kept = anatomy.blocks(model)[0], torch.arange(0, 192, 2)
    assert surgery.parameters(block, surgery.of(block, CHANNELS)[0]) == 16 + 16 + 64
    down = anatomy.projections(block)["down"].weight[:, kept]
    gate = anatomy.projections(block)["gate"]
    full = gate(torch.ones(1, 64))
    before = anatomy.block_parameters(model)
    narrow(block, kept, down)
    assert before - anatomy.block_parameters(model) == 96 * (16 + 16 + 64)
    torch.testing.assert_close(gate(torch.ones(1, 64)), full[:, kept])
    assert gate.basis is model.get_submodule(paths[3]).basis
    assert gate.out_features == 96


def test_check_channels_free_refuses_what_cannot_go_alone(tiny):
    model = load_model(tiny)
    surgery.check_free(model, CHANNELS)
    name = "model.layers.1.mlp.down_proj"
    low_rank_linear.install(model, {"shared": [{"modules": ["model.layers.0.mlp.down_proj"], "rank": 8}]})
    surgery.check_free(model, CHANNELS)
    low_rank_linear.install(model, {"shared": [{"modules": ["model.layers.2.mlp.down_proj", name], "rank": 8}]})
    with pytest.raises(StageError, match=r"layers\.2\.mlp\.down_proj stands on a basis .* several blocks"):
        surgery.check_free(model, CHANNELS)
    model = load_model(tiny)
    low_rank_linear.tie(model, ["model.layers.1.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight"])
    with pytest.raises(StageError, match=r"layers\.4\.mlp\.up_proj is tied to model\.layers\.1\.mlp\.up_proj"):
        surgery.check_free(model, CHANNELS)
    model = load_model(tiny)
    model.set_submodule(name, quantized_linear.QuantizedLinear(192, 64))
    with pytest.raises(StageError, match=f"{name} is no dense map"):
        surgery.check_free(model, CHANNELS)


def test_drop_heads_computes_what_is_left(model):
    block, calls = anatomy.blocks(model)[1], block_calls.arguments(model, 20)
    x = block_calls.embedded(model, IDS)
    seen = []
    with run.watched({"o": anatomy.projections(block)["o"]}, lambda _n, z, _y: seen.append(z)):
        run.run(block, x, calls[1])
    kept, new_o = torch.tensor([1]), torch.randn(64, 32)
    surgery.cut(block, surgery.of(block, HEADS)[0], kept, new_o, {})
    after = []
    with run.watched({"o": anatomy.projections(block)["o"]}, lambda _n, z, _y: after.append(z)):
        run.run(block, x, calls[1])
    torch.testing.assert_close(torch.cat(after), torch.cat(seen)[..., 32:])
    assert {role: one.out_features for role, one in anatomy.projections(block).items()}["k"] == 16


def test_check_heads_free_refuses_an_o_on_a_basis_of_several_blocks(model):
    surgery.check_free(model, HEADS)
    low_rank_linear.install(model, {"shared": [{"modules": ["model.layers.0.self_attn.o_proj"], "rank": 8}]})
    surgery.check_free(model, HEADS)
    several = [f"model.layers.{block}.self_attn.o_proj" for block in (1, 2)]
    low_rank_linear.install(model, {"shared": [{"modules": several, "rank": 8}]})
    with pytest.raises(StageError, match=r"layers\.2\.self_attn\.o_proj stands on a basis .* several blocks"):
        surgery.check_free(model, HEADS)
