"""Rotations leave the function, whatever the family, and refuse what they cannot turn as one."""

import pytest
import torch
from torch import nn

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.attention import attentions
from stages.models.checkpoint.loading import load_model, save_model
from stages.models.layers import low_rank_linear
from stages.quantize import rotation, rounding
from stages.quantize.rotation_choice import judged
from stages.quantize.rounding import Precision
from stages.runtime.contract import StageError
from tests.stages.models.families import answers, family, library
from tests.stages.models.grouped import grouped

LLAMA = ("llama", "mistral", "qwen2", "qwen3")
ROTATIONS = {"heads": lambda model: rotation.heads(model, anatomy.blocks(model)), "stream": rotation.stream}
every = pytest.mark.parametrize("name", LLAMA)
either = pytest.mark.parametrize("how", ROTATIONS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


def exact(model):
    """The model with torch's own norms: those of transformers compute in 32 bits, whatever the weights are."""
    for path, norm in list(model.named_modules()):
        if type(norm).__name__.endswith("RMSNorm"):
            new = nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon, dtype=torch.float64)
            new.weight = norm.weight
            model.set_submodule(path, new)
    return model


@either
@every
def test_rotation_leaves_the_function_in_32_and_in_64_bits(name, how, root):
    for dtype, within in ((torch.float32, 1e-4), (torch.float64, 1e-11)):
        model = load_model(family(name, root), dtype=dtype)
        if dtype == torch.float64:
            model = exact(model)
        before = answers(model)
        old = {path: tensor.clone() for path, tensor in model.named_parameters()}
        ROTATIONS[how](model)
        assert float((answers(model) - before).abs().max()) < within
        roles = ("q", "k", "v", "o", "gate", "up", "down") if how == "stream" else ("v", "o")
        for path, tensor in model.named_parameters():
            turned = any(f".{role}_proj.weight" in path for role in roles)
            assert not turned or not torch.allclose(tensor, old[path], atol=1e-3), path
            if how == "stream" and "norm" in path and "q_norm" not in path and "k_norm" not in path:
                assert bool((tensor == 1).all())


@either
@every
def test_rotated_model_is_the_same_in_transformers(name, how, root, tmp_path):
    folder = family(name, root)
    model = load_model(folder)
    ROTATIONS[how](model)
    save_model(model, tmp_path / "out", like=folder)
    assert torch.equal(answers(load_model(tmp_path / "out")), answers(model))
    assert torch.allclose(answers(library(name, tmp_path / "out")), answers(library(name, folder)), atol=1e-5)
    assert not (tmp_path / "out" / "structure.json").exists()


def test_heads_rotation_mixes_each_head_alone_and_as_its_queries_read_it(root):
    model = load_model(family("qwen2", root))
    block = anatomy.blocks(model)[1]
    one = attentions(block)["self"]
    v_OI, o_OI, bias_O = (t.detach().clone() for t in (one.maps["v"].weight, one.maps["o"].weight, one.maps["v"].bias))
    rotation.heads(model, anatomy.blocks(model))
    r_dd = rotation.of_values(model, [block]).float()
    for head in range(one.kv_heads):
        rows = one.rows("v")[head]
        assert torch.allclose(one.maps["v"].weight[rows], r_dd.T @ v_OI[rows], atol=1e-6)
        assert torch.allclose(one.maps["v"].bias[rows], bias_O[rows] @ r_dd, atol=1e-6)
    for head in range(one.heads):
        columns = one.rows("o")[head]
        assert torch.allclose(one.maps["o"].weight[:, columns], o_OI[:, columns] @ r_dd, atol=1e-6)


def test_stream_rotation_makes_two_of_a_tied_table_only_where_the_last_gain_is_not_one(root, tmp_path):
    folder = family("llama", root)
    model = load_model(folder)
    rotation.stream(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    plain = load_model(folder)
    with torch.no_grad():
        plain.model.norm.weight.fill_(1.0)
    before = answers(plain)
    rotation.stream(plain)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert torch.allclose(answers(plain), before, atol=1e-5)


def test_heads_rotation_of_shared_bases_and_tied_maps_leaves_the_function_and_the_sharing(tiny, tmp_path):
    model = load_model(grouped(tiny, tmp_path / "grouped"))
    paths = [f"model.layers.{index}.self_attn.{role}_proj" for index in (1, 2) for role in "vo"]
    dense = {path: model.get_submodule(path).weight.detach().clone() for path in paths}
    low_rank_linear.install(model, {"residual": [paths[0]], "shared": [{"modules": paths[1::2], "rank": 64}]})
    with torch.no_grad():
        residual = model.get_submodule(paths[0])
        residual.dense.weight.copy_(dense[paths[0]] / 3)
        residual.low.weight.copy_(dense[paths[0]] * 2 / 3)
        model.get_submodule(paths[1]).basis.weight.copy_(
            torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        )
        back = torch.linalg.inv(model.get_submodule(paths[1]).basis.weight)
        for path in paths[1::2]:
            model.get_submodule(path).coefficient.weight.copy_(dense[path] @ back)
    ids_NT = torch.arange(64).view(2, 32) * 11 % 768
    with torch.no_grad():
        before = model(ids_NT).logits
        tied, basis = model.model.layers[3].self_attn.v_proj.weight, model.get_submodule(paths[1]).basis.weight.clone()
        rotation.heads(model, anatomy.blocks(model))
        after = model(ids_NT).logits
    assert torch.allclose(after, before, atol=1e-4)
    assert not torch.allclose(model.get_submodule(paths[1]).basis.weight, basis, atol=1e-3)
    assert model.model.layers[3].self_attn.v_proj.weight is tied is model.model.layers[4].self_attn.v_proj.weight


def test_heads_rotation_of_one_of_two_blocks_with_a_tied_map_is_refused_by_name(tiny, tmp_path):
    model = load_model(grouped(tiny, tmp_path / "grouped"))
    with pytest.raises(StageError, match=r"layers\.3\.self_attn\.v_proj shares a tensor with .*layers\.4"):
        rotation.heads(model, anatomy.blocks(model)[:4])


def test_stream_rotation_of_a_basis_behind_different_norms_is_refused_by_name(tiny, tmp_path):
    model = load_model(grouped(tiny, tmp_path / "grouped"))
    with pytest.raises(StageError, match=r"layers\.1\.mlp\.gate_proj\.basis shares a tensor with .*layers\.2\.mlp"):
        rotation.stream(model)
    with torch.no_grad():
        for block in anatomy.blocks(model):
            for norm in anatomy.norms(block).values():
                norm.weight.fill_(1.0)
        ids_NT = torch.arange(64).view(2, 32) * 11 % 768
        before = model(ids_NT).logits
        rotation.stream(model)  # with one gain for both there is nothing in the way
        assert torch.allclose(model(ids_NT).logits, before, atol=1e-4)


@either
def test_rotation_of_another_family_is_refused_by_name(how, root):
    model = load_model(family("gpt2", root))
    with pytest.raises(StageError, match="'gpt2' is not understood"):
        ROTATIONS[how](model)


def test_rotation_of_unevenly_pruned_heads_leaves_the_function(root):
    from stages.prune import units as surgery

    model = load_model(family("mistral", root))
    block = anatomy.blocks(model)[0]
    one = attentions(block)["self"]
    first = torch.tensor([0])  # the first key-value head and its two heads of queries
    surgery.cut(block, surgery.of(block, surgery.HEADS)[0], first, one.maps["o"].weight.detach()[:, :16], {})
    before = answers(model)
    rotation.heads(model, anatomy.blocks(model))
    rotation.stream(model)
    assert torch.allclose(answers(model), before, atol=1e-4)


def test_judged_blocks_that_share_a_tensor_have_one_sum_and_a_map_of_zeros_none(tiny, tmp_path):
    model = load_model(grouped(tiny, tmp_path / "grouped"))
    with torch.no_grad():
        for role in "vo":
            anatomy.projections(anatomy.blocks(model)[0])[role].weight.zero_()
    asked = dict.fromkeys(rounding.names(model), Precision("int8", input_form="int8"))
    ids_NT = torch.arange(128).view(4, 32) * 11 % 768
    before = {path: tensor.clone() for path, tensor in model.named_parameters()}
    lost = judged(model, asked, ids_NT, searched=True)
    assert lost[3] == lost[4] != lost[5]
    assert lost[0] == (0.0, 0.0)
    assert all(0 < error < 0.1 for index in range(1, 6) for error in lost[index])
    assert all(torch.equal(tensor, before[path]) for path, tensor in model.named_parameters())
    only = judged(model, {path: one for path, one in asked.items() if "layers.5" in path}, ids_NT, searched=True)
    assert only[5] == lost[5]
    assert only[1] == (0.0, 0.0)
