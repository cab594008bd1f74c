import pytest
import torch
from torch import nn

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.attention import attentions
from stages.models.checkpoint.loading import load_model
from stages.models.layers import low_rank_linear
from stages.runtime.contract import StageError
from tests.stages.models.families import family


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
    low_rank_linear.tie(model, ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"])
    assert anatomy.block_parameters(model) == inside - 64 * 192


def test_replace_reaches_every_place_of_an_instance(model):
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    low_rank_linear.install(model, {"shared": [{"modules": paths, "rank": 8}]})
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
    with pytest.raises(StageError, match="'bert' is not understood here; limit llama"):
        anatomy.check_type("bert")
    anatomy.check_type("qwen3")
    with pytest.raises(StageError, match="LlamaModel has no output head"):
        anatomy.head(model.model)
    block = anatomy.blocks(model)[1]
    with pytest.raises(
        StageError, match=r"model\.layers\.1 has no map for 'qkv'; measured LlamaDecoderLayer with q, k"
    ):
        anatomy.projections(block)["qkv"]
    block.module.mlp.extra = nn.Linear(4, 4)
    with pytest.raises(StageError, match=r"model\.layers\.1\.mlp\.extra is not understood"):
        anatomy.projections(block)
    del block.module.mlp.extra
    block.module.mlp.fc1 = nn.Linear(4, 4)
    with pytest.raises(StageError, match=r"model\.layers\.1\.mlp\.fc1 is not understood; measured up"):
        anatomy.projections(block)
    del block.module.mlp.fc1
    del block.module.mlp.up_proj
    with pytest.raises(StageError, match=r"model\.layers\.1 has no up: this block is not understood"):
        anatomy.projections(block)
    block.module.mlp.experts = nn.Parameter(torch.ones(3, 4, 4))
    with pytest.raises(
        StageError, match=r"model\.layers\.1\.mlp\.experts holds experts.*measured 3 experts in one tensor of LlamaMLP"
    ):
        anatomy.maps(block)
    with pytest.raises(StageError, match="not of one kind; measured LlamaDecoderLayer, LlamaMLP"):
        model.model.layers[0] = model.model.layers[0].mlp
        anatomy.blocks(model)
    with pytest.raises(StageError, match="LlamaModel has no stack of blocks"):
        model.model.layers = nn.ModuleList()
        anatomy.blocks(model.model)


def test_parts_that_only_one_stack_has_are_refused_for_two(tmp_path):
    both = load_model(family("bart", tmp_path))
    with pytest.raises(StageError, match="BartForConditionalGeneration has two stacks"):
        anatomy.decoder(both)
    with pytest.raises(StageError, match="BertForMaskedLM has no norm after its last block"):
        anatomy.last_norm(load_model(family("bert_masked", tmp_path)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt"])
def test_last_norm_feeds_the_head_of_every_decoder(name, tmp_path):
    model = load_model(family(name, tmp_path))
    seen = []
    anatomy.last_norm(model).register_forward_hook(lambda _m, _a, out: seen.append(out))
    logits = model(input_ids=torch.tensor([[3, 5]])).logits
    assert torch.equal(anatomy.head(model)(seen[0]), logits)


def test_norms_that_scale_by_more_than_their_weight_are_refused(model):
    class OnePlus(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(64))

        def forward(self, x):
            return x * (1 + self.weight)

    block = anatomy.blocks(model)[0]
    block.module.input_layernorm = OnePlus()
    with pytest.raises(StageError, match=r"the norms of model\.layers\.0 are not understood"):
        anatomy.norms(block)


def test_heads_that_do_not_fit_their_maps_are_refused(model):
    block = anatomy.blocks(model)[0]
    block.module.self_attn.head_dim = 24
    with pytest.raises(StageError, match=r"the heads of model\.layers\.0\.self_attn are not understood"):
        attentions(block)
    block.module.self_attn.head_dim = 64
    with pytest.raises(
        StageError, match=r"the heads of model\.layers\.0\.self_attn are not understood; measured 1 heads"
    ):
        attentions(block)
