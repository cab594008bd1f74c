import pytest
import torch
import transformers

from stages.models.anatomy import attention
from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.loading import load_config, load_model
from stages.prune import units as surgery
from stages.prune.cut_proof import proven
from stages.prune.units import CHANNELS, HEADS
from stages.runtime.contract import StageError
from tests.stages.models.families import family


def halves(model, what):
    return [[one.count // 2 for one in surgery.of(block, what)] for block in anatomy.blocks(model)]


def test_proof_refuses_heads_whose_rows_lie_in_another_order(tmp_path, monkeypatch):
    model = load_model(family("neox", tmp_path))
    assert proven(model, HEADS, halves(model, HEADS)) == {}
    monkeypatch.setattr(attention, "_INTERLEAVED", ())
    with pytest.raises(StageError, match=r"the heads of GPTNeoX.* cannot go alone.*of the largest value away"):
        proven(model, HEADS, halves(model, HEADS))


def test_proof_refuses_channels_of_a_fused_map_whose_rows_take_turns(tmp_path, monkeypatch):
    model = load_model(family("phi3", tmp_path))
    proven(model, CHANNELS, halves(model, CHANNELS))
    real = surgery.of

    def turns(block, what):
        (one,) = real(block, what)
        rows = {path: torch.arange(rows.numel()).view(-1, 2) for path, rows in one.writers.items()}
        return [surgery.Units(what, one.reader, one.columns_GS, rows, one.owner, one.numbers)]

    monkeypatch.setattr(surgery, "of", turns)
    with pytest.raises(StageError, match=r"the channels of Phi3ForCausalLM cannot go alone"):
        proven(model, CHANNELS, halves(model, CHANNELS))


@pytest.mark.parametrize("name", ["t5_plain", "bloom"])
def test_proof_refuses_heads_that_a_bias_of_positions_is_made_for(name, tmp_path):
    model = load_model(family(name, tmp_path))
    with pytest.raises(StageError, match=r"the heads of .* cannot go alone.*RuntimeError"):
        proven(model, HEADS, halves(model, HEADS))


def test_proof_needs_no_weights_and_leaves_the_model_alone(tmp_path):
    model = load_model(family("llama", tmp_path)).to("meta")
    before = {name: one.shape for name, one in model.state_dict().items()}
    assert proven(model, CHANNELS, halves(model, CHANNELS)) == {"intermediate_size": 24}
    assert {name: one.shape for name, one in model.state_dict().items()} == before
    assert (model.config.intermediate_size, model.config.num_hidden_layers) == (48, 3)


@pytest.mark.parametrize(("name", "fields"), [("bert_classes", ["intermediate_size"]), ("bart", [])])
def test_numbers_that_equal_the_channels_by_chance_stay(name, fields, tmp_path):
    folder = family(name, tmp_path)
    config = load_config(folder)
    config.max_position_embeddings = config.to_dict().get("intermediate_size") or config.encoder_ffn_dim
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    found = proven(model, CHANNELS, halves(model, CHANNELS))
    assert sorted(found) == (fields or ["decoder_ffn_dim", "encoder_ffn_dim"])
