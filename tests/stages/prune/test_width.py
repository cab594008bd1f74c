import json

import pytest
import torch
from safetensors.torch import load_file

from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.loading import load_model, save_model
from stages.models.layers import low_rank_linear
from stages.prune.target import Asked
from stages.prune.width import cut, width
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.stages.models.families import VOCABULARY, WIDTH, answers, family, library


def narrowed(model, state, keep=0.8, multiple=8):
    """Rows of a model of these families whose hidden width is pruned."""
    ids_NT = torch.randint(0, VOCABULARY, (32, 32), generator=torch.Generator().manual_seed(0))
    asked = Asked(int(keep * anatomy.block_parameters(model)), multiple, "loss", state)
    return width(model, ids_NT, asked, Silent())


def written(model):
    """Every tensor that puts something into the stream, its dimensions last."""
    found = [anatomy.embedding(model).weight]
    for block in anatomy.blocks(model):
        maps = anatomy.projections(block)
        found += [maps[role].weight.t() for role in ("o", "down")]
    return found


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_width_of_a_family_loads_plainly_and_answers_the_same(name, tmp_path):
    folder = family(name, tmp_path)
    model = load_model(folder)
    before = anatomy.block_parameters(model)
    rows = narrowed(model, tmp_path / "state")
    save_model(model, tmp_path / "cut", like=folder)
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (config["hidden_size"], config["head_dim"], config["num_attention_heads"]) == (24, 8, 4)
    assert not (tmp_path / "cut" / "structure.json").exists()
    assert anatomy.block_parameters(model) <= 0.8 * before
    theirs = library(name, tmp_path / "cut")
    assert torch.equal(answers(theirs), answers(model))
    assert torch.equal(answers(load_model(tmp_path / "cut")), answers(model))
    tables = [w for w in load_file(tmp_path / "cut" / "model.safetensors").values() if VOCABULARY in w.shape]
    assert [tuple(w.shape) for w in tables] == [(VOCABULARY, 24)] * (1 if config["tie_word_embeddings"] else 2)
    assert rows[0]["dimensions"] == 24
    assert 0 < rows[0]["output_error_ratio"] < rows[0]["output_error_ratio_cut"] < 1
    assert len(rows) == 1 + 7 * len(anatomy.blocks(model))


def without_some(folder):
    """A model whose stream has dead dimensions, and those that live."""
    model, live = load_model(folder), torch.ones(WIDTH, dtype=torch.bool)
    live[1::4] = False
    with torch.no_grad():
        for tensor in written(model):
            tensor[:, ~live] = 0
    return model, live.nonzero().flatten()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_width_cut_to_the_dimensions_that_live_is_the_same_function(name, tmp_path):
    model, live = without_some(family(name, tmp_path))
    before = answers(model)
    cut(model, live, tmp_path / "state")
    assert model.config.hidden_size == len(live)
    torch.testing.assert_close(answers(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_width_takes_dead_dimensions_and_loses_nothing(name, tmp_path):
    model, live = without_some(family(name, tmp_path))
    before = answers(model)
    narrowed(model, tmp_path / "state")
    assert json_of(tmp_path / "state") == live.tolist()
    assert (answers(model) - before).norm() < 0.01 * before.norm()  # a fit's inputs are rounded to bfloat16


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_width_of_dimensions_in_pairs_takes_one_of_each_and_loses_next_to_nothing(name, tmp_path):
    half = WIDTH // 2
    model = load_model(family(name, tmp_path))
    order = torch.randperm(half, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for tensor in written(model):
            tensor[:, half:] = -tensor[:, order]
    before, plain = answers(model), load_model(family(name, tmp_path))
    plain.load_state_dict(model.state_dict())
    narrowed(model, tmp_path / "state", keep=0.52)
    assert model.config.hidden_size == half
    kept = torch.tensor(json_of(tmp_path / "state"))
    pair = torch.where(kept < half, kept, order[kept - half])
    assert sorted(pair.tolist()) == list(range(half))
    with torch.no_grad():  # without any fit
        gone = torch.ones(WIDTH, dtype=torch.bool).index_fill(0, kept, False)
        for tensor in written(plain):
            tensor[:, gone] = 0
    error, naive = (float((answers(one) - before).norm() / before.norm()) for one in (model, plain))
    assert error < 0.1 * naive
    assert error < 0.05


def json_of(state):
    from stages.models.memory.saved_state import read_record

    return read_record(state / "chosen.safetensors")["kept"]


def test_width_of_another_architecture_is_refused_by_name(tmp_path):
    with pytest.raises(StageError, match="the architecture 'gpt2' is not understood here"):
        narrowed(load_model(family("gpt2", tmp_path)), tmp_path / "state")


def test_width_of_maps_that_are_tied_is_refused_by_name(tmp_path):
    model = load_model(family("llama", tmp_path))
    low_rank_linear.tie(model, ["model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"])
    with pytest.raises(StageError, match=r"layers\.2\.mlp\.up_proj is tied to model\.layers\.0\.mlp\.up_proj"):
        narrowed(model, tmp_path / "state")


def test_width_behind_a_basis_is_refused_by_name(tmp_path):
    model = load_model(family("llama", tmp_path))
    low_rank_linear.install(model, {"shared": [{"modules": ["model.layers.1.self_attn.q_proj"], "rank": 4}]})
    with pytest.raises(StageError, match=r"layers\.1\.self_attn\.q_proj is no dense map"):
        narrowed(model, tmp_path / "state")


def test_width_that_cannot_go_so_far_names_the_best(tmp_path):
    model = load_model(family("llama", tmp_path))
    with pytest.raises(StageError, match=r"measured keep 0\.2500 at best; limit keep 0\.1"):
        narrowed(model, tmp_path / "state", keep=0.1)
