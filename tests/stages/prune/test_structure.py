import copy
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from stages.algorithms.channels import reconstructed
from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise import block_calls, compress, run, site_moments
from stages.models.blockwise.technique import OnWeights
from stages.models.checkpoint.loading import load_model, load_tokenizer, save_model
from stages.models.layers import low_rank_linear, quantized_linear
from stages.models.text.windows import windows
from stages.prune import blocks as dropping
from stages.prune import channels_heads, depth, structure
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent

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
    before, each = anatomy.block_parameters(model), channels_heads.output_parameters(block, ("gate", "up"), "down")
    structure.narrow(block, kept, new_down)
    torch.testing.assert_close(forward_pass_of_a_block(block, x), hidden @ new_down.T)
    assert before - anatomy.block_parameters(model) == (192 - 5) * each
    assert (maps["gate"].out_features, maps["down"].in_features) == (5, 5)


def test_narrow_behind_a_shared_basis_takes_rows_of_the_coefficients(model):
    paths = [f"model.layers.{i}.mlp.{r}_proj" for i in (0, 1) for r in ("gate", "up")]
    low_rank_linear.install(model, {"shared": [{"modules": paths, "rank": 16}]})
    block, kept = anatomy.blocks(model)[0], torch.arange(0, 192, 2)
    assert channels_heads.output_parameters(block, ("gate", "up"), "down") == 16 + 16 + 64
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
    low_rank_linear.install(model, {"shared": [{"modules": ["model.layers.0.mlp.down_proj"], "rank": 8}]})
    structure.check_channels_free(model)
    low_rank_linear.install(model, {"shared": [{"modules": ["model.layers.2.mlp.down_proj", name], "rank": 8}]})
    with pytest.raises(StageError, match=r"layers\.2\.mlp\.down_proj stands on a basis .* several blocks"):
        structure.check_channels_free(model)
    model = load_model(tiny)
    low_rank_linear.tie(model, ["model.layers.1.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight"])
    with pytest.raises(StageError, match=r"layers\.4\.mlp\.up_proj is tied to model\.layers\.1\.mlp\.up_proj"):
        structure.check_channels_free(model)
    model = load_model(tiny)
    model.set_submodule(name, quantized_linear.QuantizedLinear(192, 64))
    with pytest.raises(StageError, match=f"{name} is no dense map"):
        structure.check_channels_free(model)


def test_drop_blocks_leaves_the_others_function_and_a_valid_configuration(model, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "in_short", nullcontext)
    model.config.layer_types = ["full_attention"] * 5 + ["last"]
    calls = block_calls.arguments(model, 20)
    x = block_calls.embedded(model, IDS)
    for index in (0, 2, 5):
        x = run.run(anatomy.blocks(model)[index], x, calls[index])
    depth.drop_blocks(model, [1, 3, 4])
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


def streams(model, ids, index):
    """What block `index` adds down's output to, what down reads, and what comes out."""
    seen = {}
    layer = model.model.layers[index]
    hooks = [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: seen.update(residual=args[0])),
        layer.mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.update(read=args[0])),
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen["residual"].flatten(0, 1), seen["read"].flatten(0, 1)


def test_channels_fit_each_down_to_the_dense_stream_on_what_the_narrowed_blocks_before_give(
    tiny, tmp_path, monkeypatch
):
    # Tokens at random leave nothing that both halves agree on: here the fit itself is looked at.
    monkeypatch.setattr(site_moments, "agreement", lambda *args: 0.5)
    ids = torch.randint(0, 768, (8, 64), generator=torch.Generator().manual_seed(1))
    dense, narrowed = load_model(tiny), load_model(tiny)
    asked = channels_heads.Asked(int(0.9 * anatomy.block_parameters(dense)), 8, "loss", tmp_path)
    channels_heads.channels(narrowed, ids, asked, Silent())
    residual, read = streams(dense, ids, 4)
    residual_now, read_now = streams(narrowed, ids, 4)
    old, new = (anatomy.projections(anatomy.blocks(m)[4]) for m in (dense, narrowed))
    with torch.no_grad():
        target = residual + read @ old["down"].weight.T - residual_now
        rows = {tuple(row.tolist()): j for j, row in enumerate(old["up"].weight)}
        kept = [rows[tuple(row.tolist())] for row in new["up"].weight]
        assert kept == sorted(set(kept))
        assert read_now.shape[1] == len(kept) == narrowed.config.intermediate_size
        best = torch.linalg.lstsq(read_now, target).solution.T
        full = streams(as_before(dense, narrowed, 4), ids, 4)[1]
        plain = reconstructed(old["down"].weight, full.T @ full / len(full), torch.tensor(kept)).float()
        errors = [
            float((target - read_now @ w.T).square().mean())
            for w in (best, new["down"].weight, plain, old["down"].weight[:, kept])
        ]
    assert errors == sorted(errors)
    assert errors[1] < 0.9 * errors[2]


def as_before(dense, narrowed, index):
    """The dense model on what the narrowed blocks before `index` give."""
    mixed = copy.deepcopy(dense)
    for before in range(index):
        mixed.model.layers[before] = narrowed.model.layers[before]
    mixed.model.layers[index].self_attn = narrowed.model.layers[index].self_attn
    return mixed


def test_drop_heads_computes_what_is_left(model):
    block, calls = anatomy.blocks(model)[1], block_calls.arguments(model, 20)
    x = block_calls.embedded(model, IDS)
    seen = []
    with run.watched({"o": anatomy.projections(block)["o"]}, lambda _n, z, _y: seen.append(z)):
        run.run(block, x, calls[1])
    kept, new_o = torch.arange(32, 64), torch.randn(64, 32)
    structure.drop_heads(block, kept, new_o, 32)
    after = []
    with run.watched({"o": anatomy.projections(block)["o"]}, lambda _n, z, _y: after.append(z)):
        run.run(block, x, calls[1])
    torch.testing.assert_close(torch.cat(after), torch.cat(seen)[..., 32:])
    assert {role: one.out_features for role, one in anatomy.projections(block).items()}["k"] == 16


def test_check_heads_free_refuses_an_o_on_a_basis_of_several_blocks(model):
    structure.check_heads_free(model)
    low_rank_linear.install(model, {"shared": [{"modules": ["model.layers.0.self_attn.o_proj"], "rank": 8}]})
    structure.check_heads_free(model)
    several = [f"model.layers.{block}.self_attn.o_proj" for block in (1, 2)]
    low_rank_linear.install(model, {"shared": [{"modules": several, "rank": 8}]})
    with pytest.raises(StageError, match=r"layers\.2\.self_attn\.o_proj stands on a basis .* several blocks"):
        structure.check_heads_free(model)


def test_influence_of_a_block_that_was_made_idle_is_none(model):
    with torch.no_grad():
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[2].get_submodule(part).weight.zero_()
    found = dropping.least_influential(model, IDS, lambda gone: len(gone) > 3, lambda _done: None)
    assert (found[0].block, found[0].cost) == (2, pytest.approx(0, abs=1e-9))
    assert len(found) == 4
    assert all(one.cost > 1e-3 for one in found[1:])


def test_greedy_takes_an_idle_block_first_and_leaves_one(model):
    with torch.no_grad():
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[3].get_submodule(part).weight.zero_()
    told = []
    found = dropping.greedy(model, IDS, lambda _gone: False, told.append)
    assert (found[0].block, found[0].cost) == (3, pytest.approx(0, abs=1e-6))
    assert len({one.block for one in found}) == 5
    assert told == [1, 2, 3, 4, 5]


def mended_over(model, ids, gone, folder):
    asked = channels_heads.Mended(gone[0])
    rows = compress.compress(model, ids, OnWeights(asked), folder, gone=gone)
    depth.drop_blocks(model, gone)
    return rows


def test_mended_leaves_maps_alone_where_the_gap_left_nothing_out(model, tiny, tmp_path):
    with torch.no_grad():
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[3].get_submodule(part).weight.zero_()
    before = copy.deepcopy(model)
    rows = mended_over(model, IDS, [3], tmp_path)
    assert {row["block"] for row in rows} == {2, 4, 5}
    assert all(row["relative_change"] < 1e-3 for row in rows)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, before(IDS).logits, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("gone", [[2, 3, 5], [0, 3]])
def test_mended_comes_nearer_to_the_dense_model_on_text_it_has_not_seen(
    model, tiny, topics, shared_store, tmp_path, gone
):
    corpus = shared_store.checkout(topics)
    ids, unseen = (windows(corpus, split, load_tokenizer(tiny), 128, most=8) for split in ("calibrate", "test"))
    dense, cut = load_model(tiny), load_model(tiny)
    mended_over(model, ids, gone, tmp_path)
    depth.drop_blocks(cut, gone)
    with torch.no_grad():
        whole, plain, ours = (one(input_ids=unseen).logits.log_softmax(-1) for one in (dense, cut, model))
    lost = [float((whole.exp() * (whole - other)).sum(-1).mean()) for other in (plain, ours)]
    assert lost[1] < 0.8 * lost[0]
