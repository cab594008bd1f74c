import json

import pytest
import torch

from stages.models.checkpoint.loading import load_model, save_model
from stages.recover.headless import LOGIT_TOLERANCE, load_apart
from stages.runtime.contract import StageError
from tests.stages.models.families import family

IDS = 3 + torch.arange(24).view(2, 12) * 7 % 90


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt", "bert_masked", "roberta", "distilbert"])
def test_head_of_the_hidden_states_is_the_whole_model(tmp_path, name):
    made = load_apart(family(name, tmp_path), 12)
    with torch.no_grad():
        whole = load_model(tmp_path / name, dtype=torch.bfloat16)(input_ids=IDS).logits
        apart = made.head.logits(made.hidden(IDS))
    assert made.hidden(IDS).shape[-1] == made.head.weight_VH.shape[1]
    torch.testing.assert_close(apart, whole, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["t5", "t5_plain", "bart", "marian"])
def test_head_of_a_decoders_hidden_states_is_the_whole_model(tmp_path, name):
    whole = load_model(family(name, tmp_path))
    if name in ("bart", "marian"):
        whole.final_logits_bias.normal_()
        save_model(whole, tmp_path / "biased", like=tmp_path / name)
        name = "biased"
    made, whole = load_apart(tmp_path / name, 12), load_model(tmp_path / name, dtype=torch.bfloat16)
    answer_NT = (IDS + 1) % 96
    windows_NT = torch.cat([IDS, torch.where(torch.arange(12) < 9, answer_NT, -1)], dim=1)
    with torch.no_grad():
        expected = whole(input_ids=IDS, decoder_input_ids=answer_NT).logits[:, :9]
        apart = made.head.logits(made.hidden(windows_NT))[made.counted(windows_NT)].view_as(expected)
    assert (apart.float() - expected.float()).abs().max() < LOGIT_TOLERANCE * expected.abs().max()
    assert made.length(windows_NT) == 12
    assert (made.labels(windows_NT) == -1).all()


@pytest.mark.parametrize(("name", "match"), [("bert_bare", "no output head"), ("bert_classes", "no output head")])
def test_model_that_does_not_predict_tokens_is_refused(tmp_path, name, match):
    with pytest.raises(StageError, match=match):
        load_apart(family(name, tmp_path), 12)


def test_model_that_changes_its_heads_product_is_refused(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.1,
    )
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(StageError, match=r"logits of Gemma2ForCausalLM are not its head's product alone"):
        load_apart(tmp_path, 12)


def test_windows_longer_than_the_model_reads_are_refused(tmp_path):
    with pytest.raises(StageError, match=r"no windows of this length.*measured 65.*limit 64"):
        load_apart(family("gpt2", tmp_path), 65)


def test_dropout_stays_off(tmp_path):
    folder = family("gpt2", tmp_path)
    read = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(read | {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}))
    made = load_apart(folder, 12)
    assert torch.equal(made.hidden(IDS), made.hidden(IDS))
