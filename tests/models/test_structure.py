import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from stages.algorithms.channels import reconstructed
from stages.models import anatomy, pruning, quantized, shared, streaming, structure
from stages.models.loading import load_model, save_model
from stages.runtime.contract import StageError

IDS = (torch.arange(40).view(2, 20) * 13) % 768


@pytest.fixture
def model(tiny):
    return load_model(tiny)


def forward_pass_of_a_block(block, x):
    """gate, up, down by hand."""
    maps = anatomy.projections(block)
    return maps["down"](functional.silu(maps["gate"](x)) * maps["up"](x))


def test_narrow_computes_what_is_left(model):
    block, kept = anatomy.blocks(model)[1], torch.tensor([0, 3, 5, 100, 191])
    maps, x = anatomy.projections(block), torch.randn(7, 64)
    hidden = functional.silu(x @ maps["gate"].weight[kept].T) * (x @ maps["up"].weight[kept].T)
    new_down = torch.randn(64, 5)
    before, each = anatomy.block_parameters(model), pruning.channel_parameters(block)
    structure.narrow(block, kept, new_down)
    torch.testing.assert_close(forward_pass_of_a_block(block, x), hidden @ new_down.T)
    assert before - anatomy.block_parameters(model) == (192 - 5) * each
    assert (maps["gate"].out_features, maps["down"].in_features) == (5, 5)


def test_narrow_behind_a_shared_basis_takes_rows_of_the_coefficients(model):
    paths = [f"model.layers.{i}.mlp.{r}_proj" for i in (0, 1) for r in ("gate", "up")]
    shared.install(model, {"shared": [{"modules": paths, "rank": 16}]})
    block, kept = anatomy.blocks(model)[0], torch.arange(0, 192, 2)
    assert pruning.channel_parameters(block) == 16 + 16 + 64
    down = anatomy.projections(block)["down"].weight[:, kept]
    gate = anatomy.projections(block)["gate"]
    full = gate(torch.ones(1, 64))
    before = anatomy.block_parameters(model)
    structure.narrow(block, kept, down)
    assert before - anatomy.block_parameters(model) == 96 * (16 + 16 + 64)
    torch.testing.assert_close(gate(torch.ones(1, 64)), full[:, kept])
    assert gate.basis is model.get_submodule(paths[3]).basis
    assert gate.out_features == 96


def test_check_channels_free_refuses_what_cannot_go_alone(tiny):
    model = load_model(tiny)
    structure.check_channels_free(model)
    name = "model.layers.1.mlp.down_proj"
    shared.install(model, {"shared": [{"modules": [name, "model.layers.2.mlp.down_proj"], "rank": 8}]})
    with pytest.raises(StageError, match=f"{name} stands on a basis"):
        structure.check_channels_free(model)
    model = load_model(tiny)
    shared.tie(model, ["model.layers.1.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight"])
    with pytest.raises(StageError, match=r"layers\.4\.mlp\.up_proj is tied to model\.layers\.1\.mlp\.up_proj"):
        structure.check_channels_free(model)
    model = load_model(tiny)
    model.set_submodule(name, quantized.QuantizedLinear(192, 64))
    with pytest.raises(StageError, match=f"{name} is quantized"):
        structure.check_channels_free(model)


def test_drop_blocks_leaves_the_others_function_and_a_valid_configuration(model, tiny, tmp_path):
    model.config.layer_types = ["full_attention"] * 5 + ["last"]
    calls = streaming.arguments(model, 20)
    x = streaming.embedded(model, IDS)
    for index in (0, 2, 5):
        x = streaming.run(anatomy.blocks(model)[index], x, calls[index])
    structure.drop_blocks(model, [1, 3, 4])
    assert model.config.num_hidden_layers == 3
    assert model.config.layer_types == ["full_attention", "full_attention", "last"]
    assert [block.module.self_attn.layer_idx for block in anatomy.blocks(model)] == [0, 1, 2]
    del model.config.layer_types
    with torch.no_grad():
        hidden = model.model(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(hidden, anatomy.last_norm(model)(x), atol=1e-5, rtol=1e-4)
        save_model(model, tmp_path, like=tiny)
        library = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(library(input_ids=IDS).logits, model(input_ids=IDS).logits)
    generated = library.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 24)


def test_narrowed_fits_each_down_to_what_the_narrowed_blocks_before_give(tiny):
    ids = torch.randint(0, 768, (8, 64), generator=torch.Generator().manual_seed(1))
    narrowed, mixed = load_model(tiny), load_model(tiny)
    pruning.narrowed(narrowed, ids, 160, lambda *_: None)
    for index in range(3):
        mixed.model.layers[index] = narrowed.model.layers[index]
    seen = []
    old, new = (anatomy.projections(anatomy.blocks(m)[3]) for m in (mixed, narrowed))
    old["down"].register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    with torch.no_grad():
        for ids_T in ids:
            mixed(input_ids=ids_T[None])
        a = torch.cat(seen)
        rows = {tuple(row.tolist()): j for j, row in enumerate(old["up"].weight)}
        kept = [rows[tuple(row.tolist())] for row in new["up"].weight]
        assert kept == sorted(set(kept))
        target = a @ old["down"].weight.T
        best = torch.linalg.lstsq(a[:, kept], target).solution.T
        errors = [
            float((target - a[:, kept] @ w.T).square().mean())
            for w in (new["down"].weight, best, old["down"].weight[:, kept])
        ]
        expected = reconstructed(old["down"].weight, a.T @ a / len(a), torch.tensor(kept))
    torch.testing.assert_close(new["down"].weight.double(), expected, rtol=1e-3, atol=1e-4)
    assert errors[1] * 0.999 <= errors[0] < 1.02 * errors[1]
    assert errors[0] < 0.7 * errors[2]


def test_influences_follow_a_block_that_was_made_idle(model):
    with torch.no_grad():
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[2].get_submodule(part).weight.zero_()
    found = pruning.influences(model, IDS, lambda *_: None)
    assert found[2] == pytest.approx(0, abs=1e-9)
    assert min(found[:2] + found[3:]) > 1e-3
