import pytest
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from stages.models import anatomy, shared
from stages.models.loading import load_model
from stages.runtime.contract import StageError


@pytest.fixture
def model(tiny):
    return load_model(tiny)


def test_blocks_names_are_paths_in_the_model(model):
    found = anatomy.blocks(model)
    assert [block.index for block in found] == list(range(6))
    for block in found:
        assert model.get_submodule(block.name) is block.module


def test_projections_by_role_have_the_shapes_of_the_configuration(model):
    maps = anatomy.projections(anatomy.blocks(model)[2])
    shapes = {role: tuple(one.weight.shape) for role, one in maps.items()}
    assert shapes == {
        "q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64),
        "gate": (192, 64), "up": (192, 64), "down": (64, 192),
    }  # fmt: skip


def test_norms_feed_the_projections_that_read_them(model):
    block = anatomy.blocks(model)[0]
    x_1TH = torch.randn(1, 4, 64)
    seen = {}
    for role, one in anatomy.projections(block).items():
        one.register_forward_hook(lambda _m, args, _o, role=role: seen.__setitem__(role, args[0]))
    for role, norm in anatomy.norms(block).items():
        norm.register_forward_hook(lambda _m, _a, out, role=role: seen.__setitem__(role, out))
    rope = model.model.rotary_emb(x_1TH, torch.arange(4)[None])
    with torch.no_grad():
        block.module(x_1TH, position_embeddings=rope)
    for norm, readers in anatomy.READS_NORM.items():
        for role in readers:
            assert seen[role] is seen[norm]


def test_block_parameters_counts_distinct_tensors(model):
    inside = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
    assert anatomy.block_parameters(model) == inside
    shared.tie(model, ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"])
    assert anatomy.block_parameters(model) == inside - 64 * 192


def test_replace_reaches_every_place_of_an_instance(model):
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    shared.install(model, {"shared": [{"modules": paths, "rank": 8}]})
    new = nn.Linear(64, 8, bias=False)
    anatomy.replace(model, model.get_submodule(paths[0]).basis, new)
    assert all(model.get_submodule(path).basis is new for path in paths)


def test_embedding_head_and_last_norm_make_logits(model):
    x = anatomy.embedding(model)(torch.tensor([[3, 5]]))
    hidden = model.model(input_ids=torch.tensor([[3, 5]]), output_hidden_states=True).hidden_states
    assert torch.equal(x, hidden[0])
    assert anatomy.last_norm(model) is model.model.norm
    assert torch.equal(anatomy.head(model)(hidden[-1]), model(input_ids=torch.tensor([[3, 5]])).logits)


def test_unknown_architectures_and_blocks_are_refused_by_name(model):
    bert = BertLMHeadModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, is_decoder=True)
    )
    with pytest.raises(StageError, match="'bert' is not understood"):
        anatomy.blocks(bert)
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(StageError, match=r"model\.layers\.1 has no mlp\.up_proj"):
        anatomy.projections(anatomy.blocks(model)[1])
    with pytest.raises(StageError, match="LlamaModel has no output head"):
        anatomy.head(model.model)
