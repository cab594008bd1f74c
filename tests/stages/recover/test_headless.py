import json

import pytest
import torch
import transformers

from stages.algorithms.products import SHORT
from stages.models.checkpoint.loading import load_model, save_model
from stages.recover.headless import LOGIT_TOLERANCE, load_apart
from stages.runtime.contract import StageError
from tests.stages.models.families import FAMILIES, family

IDS = 3 + torch.arange(24).view(2, 12) * 7 % 90


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt", "bert_masked", "roberta", "distilbert"])
def test_head_of_the_hidden_states_is_the_whole_model(tmp_path, name):
    made = load_apart(family(name, tmp_path), 12)
    with torch.no_grad():
        whole = load_model(tmp_path / name, dtype=SHORT)(input_ids=IDS).logits
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
    made, whole = load_apart(tmp_path / name, 12), load_model(tmp_path / name, dtype=SHORT)
    answer_NT = (IDS + 1) % 96
    windows_NT = torch.cat([IDS, torch.where(torch.arange(12) < 9, answer_NT, -1)], dim=1)
    with torch.no_grad():
        expected = whole(input_ids=IDS, decoder_input_ids=answer_NT).logits[:, :9]
        apart = made.head.logits(made.hidden(windows_NT))[made.counted(windows_NT)].view_as(expected)
    assert (apart.float() - expected.float()).abs().max() < LOGIT_TOLERANCE * expected.abs().max()
    assert made.length(windows_NT) == 12
    assert (made.labels(windows_NT) == -1).all()


def test_model_that_answers_neither_tokens_nor_classes_is_refused(tmp_path):
    with pytest.raises(StageError, match="no output head"):
        load_apart(family("bert_bare", tmp_path), 12)


@pytest.mark.parametrize(
    ("name", "answers"), [("bert_classes", 1), ("bert_choices", 1), ("bert_tokens", 12), ("bert_answers", 2)]
)
def test_classifiers_logits_are_its_answers(tmp_path, name, answers):
    made, whole = load_apart(family(name, tmp_path), 12), load_model(tmp_path / name)
    with torch.no_grad():
        said = whole(input_ids=IDS)
        expected = torch.stack([said.start_logits, said.end_logits], 1) if name == "bert_answers" else said.logits
        apart = made.head.logits(made.hidden(IDS))
    assert apart.dtype == torch.float32
    assert apart.shape[:2] == made.counted(IDS).shape == made.labels(IDS).shape
    assert made.length(IDS) == answers
    assert made.counted_tokens(IDS).shape == IDS.shape
    assert (made.labels(IDS) == -1).all()
    torch.testing.assert_close(apart.view_as(expected), expected, atol=0.03 * float(expected.abs().max()), rtol=0)


def test_two_windows_of_a_decoder_that_scores_need_no_token_of_padding(tmp_path):
    from tests.stages.export.test_called import classifier

    plain = classifier(tmp_path, pad_token_id=None)
    with torch.no_grad():
        expected = torch.cat([plain(input_ids=ids).logits for ids in IDS.split(1)])
        found = load_apart(tmp_path, 12).hidden(IDS)[:, 0]
    torch.testing.assert_close(found, expected, atol=0.03 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}),
        ("Granite", {"logits_scaling": 3.0}),
        ("Cohere", {"logit_scale": 0.0625}),
    ],
)
def test_scale_and_cap_of_logits_are_the_heads(tmp_path, name, said):
    settings = FAMILIES["llama"][2] | {"vocab_size": 96, "initializer_range": 0.3, "pad_token_id": 0} | said
    if name != "Gemma2":
        settings.pop("head_dim")
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings)).save_pretrained(
        tmp_path
    )
    made, whole = load_apart(tmp_path, 12), load_model(tmp_path, dtype=SHORT)
    assert (made.head.cap is not None) == (name == "Gemma2")
    with torch.no_grad():
        expected = whole(input_ids=IDS).logits.float()
        found = made.head.logits(made.hidden(IDS)).float()
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    wild = expected.abs().max() / (made.head.cap or 1)
    assert name != "Gemma2" or wild > 0.5  # a cap that no logit comes near would prove nothing


def test_logits_that_are_no_product_of_the_head_are_refused(tmp_path, monkeypatch):
    forward = transformers.LlamaForCausalLM.forward

    def centred(self, *args, **kwargs):
        said = forward(self, *args, **kwargs)
        said.logits = said.logits - said.logits.mean(-1, keepdim=True) * 3
        return said

    folder = family("llama", tmp_path)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", centred)
    with pytest.raises(StageError, match=r"logits of LlamaForCausalLM are not its head's product.*Take `recover`"):
        load_apart(folder, 12)


def test_windows_longer_than_the_model_reads_are_refused(tmp_path):
    with pytest.raises(StageError, match=r"no windows of this length.*measured 65.*limit 64"):
        load_apart(family("gpt2", tmp_path), 65)


def test_dropout_stays_off(tmp_path):
    folder = family("gpt2", tmp_path)
    read = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(read | {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}))
    made = load_apart(folder, 12)
    assert torch.equal(made.hidden(IDS), made.hidden(IDS))
