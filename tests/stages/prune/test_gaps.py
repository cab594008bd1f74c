import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise import block_calls, compress, run
from stages.models.blockwise.technique import OnWeights
from stages.models.checkpoint.loading import load_model, load_tokenizer, save_model
from stages.models.text.windows import windows
from stages.prune import blocks as dropping
from stages.prune import depth
from stages.prune.gaps import Mended, check_next_token
from stages.runtime.contract import StageError
from tests.stages.models.families import family

IDS = (torch.arange(40).view(2, 20) * 13) % 768


@pytest.fixture
def model(tiny):
    return load_model(tiny)


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
    rows = compress.compress(model, ids, OnWeights(Mended(gone[0])), folder, gone=gone)
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


@pytest.mark.parametrize("name", ["granite", "gemma2", "xglm", "biogpt", "mamba"])
def test_loss_without_a_block_is_that_of_the_models_own_answers(name, tmp_path, monkeypatch):
    """Whatever its last norm is called, and whatever it does to its logits."""
    monkeypatch.setattr(dropping, "in_short", nullcontext)
    folder, ids = family(name, tmp_path), 3 + IDS % 50
    (first, *_) = dropping.greedy(load_model(folder), ids, lambda gone: bool(gone), lambda _done: None)
    whole, cut = load_model(folder), load_model(folder)
    depth.drop_blocks(cut, [first.block])
    with torch.no_grad():
        log_p, log_q = (one(input_ids=ids, use_cache=False).logits[:, ::2].log_softmax(-1) for one in (whole, cut))
    assert first.cost == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)


def test_gradient_of_what_comes_next_is_refused_of_models_that_do_not_predict_it(tmp_path):
    for name in ("bert_masked", "t5"):
        with pytest.raises(StageError, match=r"no decoder that predicts the next token.*wanda"):
            check_next_token(load_model(family(name, tmp_path)))


def test_block_goes_by_the_source_that_it_costs_most(model):
    ids = torch.cat([IDS, IDS.flip(1), (IDS * 31 + 5) % 768])
    sources = [f"s{at}" for at in range(len(ids))]
    (found, *_) = dropping.greedy(model, ids, lambda gone: bool(gone), lambda _done: None, sources)
    costs = []
    for index in range(len(anatomy.blocks(model))):
        cut = copy.deepcopy(model)
        depth.drop_blocks(cut, [index])
        with torch.no_grad():
            log_p, log_q = (one(input_ids=ids).logits[:, ::2].log_softmax(-1) for one in (model, cut))
        costs.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean(1).max()))
    assert found.block == costs.index(min(costs)) and found.cost == pytest.approx(min(costs), rel=0.05)
    least = dropping.least_influential(model, ids, lambda gone: bool(gone), lambda _done: None, sources)
    whole = dropping.least_influential(model, ids, lambda gone: bool(gone), lambda _done: None)
    assert least[0].cost >= whole[0].cost
