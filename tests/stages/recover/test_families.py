"""Whole runs of recover on families whose windows do not pass through every parameter, or whose forward is its own."""

import shutil

import pytest
import torch
import transformers

from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.loading import load_model, load_tokenizer, save_model
from stages.recover.params import RecoverParams
from stages.recover.stage import recover
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.stages.models.families import _BOTH, _ENCODER, FAMILIES, WIDER
from tests.stages.recover.test_stage import Heard, Stopped, sealed

PARAMS = {"tokens": 8 * 64, "window_tokens": 16, "batch_windows": 4, "check_windows": 8, "check_every_steps": 4}
PARAMS |= {"learning_rate": 3e-3, "warmup_steps": 1}
_LONG = {"attention_window": 8}
MODELS = {
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", _BOTH),
    "roformer": ("RoFormerForMaskedLM", "RoFormerConfig", _ENCODER),
    "bigbird": ("BigBirdForMaskedLM", "BigBirdConfig", _ENCODER | {"attention_type": "original_full"}),
    "longformer": ("LongformerForMaskedLM", "LongformerConfig", _ENCODER | _LONG | {"pad_token_id": 1}),
    "bert_decoder": ("BertLMHeadModel", "BertConfig", _ENCODER | {"is_decoder": True, "add_cross_attention": True}),
}
NO_GRADIENT = {
    "pegasus": "decoder.embed_positions",
    "roformer": "embed_positions",
    "bigbird": "pooler",
    "longformer": "key_global",
    "bert_decoder": "crossattention",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny, topics, shared_store):
    """Inputs of the stage by a family's name."""
    root, tokenizer = tmp_path_factory.mktemp("families"), load_tokenizer(tiny)

    def made(name, models=MODELS):
        folder, (kind, config, settings) = root / name, models[name]
        if not folder.is_dir():
            torch.manual_seed(3)
            said = {"vocab_size": len(tokenizer), **settings}
            said |= {"eos_token_id": tokenizer.eos_token_id} if "eos_token_id" in said else {}
            model = getattr(transformers, kind)(getattr(transformers, config)(**said))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            model.save_pretrained(folder)
            for file in tiny.glob("tokenizer*"):
                shutil.copyfile(file, folder / file.name)
            model = load_model(folder)
            with torch.no_grad():
                for block in anatomy.blocks(model):
                    for one in anatomy.linear_maps(block).values():
                        one.weight[:, ::4] = 0
            save_model(model, root / f"{name}-cut", like=folder)
        return {"model": root / f"{name}-cut", "teacher": folder, "text": shared_store.checkout(topics)}

    return made


@pytest.mark.parametrize("update", ["full", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_what_no_window_passes_through_stays_and_the_rest_learns(checkpoint, name, update, tmp_path):
    inputs = checkpoint(name)
    metrics = recover(RecoverParams(**PARAMS, update=update), inputs, tmp_path / "out", Silent())
    assert metrics["kl_after"] < metrics["kl_before"]
    old, new = (dict(load_model(one).named_parameters()) for one in (inputs["model"], tmp_path / "out"))
    untouched = [key for key in old if NO_GRADIENT[name] in key]
    assert untouched
    assert all(torch.equal(old[key], new[key]) for key in untouched)


def test_run_with_parameters_without_gradient_goes_on_to_the_same_bytes(checkpoint, tmp_path):
    class Stopper(Heard):
        def metric(self, name, value, step):
            super().metric(name, value, step)
            if name == "kl" and step == 6:
                raise Stopped

    inputs, params = checkpoint("longformer"), RecoverParams(**PARAMS)
    with pytest.raises(Stopped):
        recover(params, inputs, tmp_path / "cut-off", Stopper())
    found = [recover(params, inputs, tmp_path / name, Silent()) for name in ("cut-off", "whole")]
    assert found[0] == found[1]
    assert sealed(tmp_path / "cut-off") == sealed(tmp_path / "whole")


OWN_FORWARD = {
    "mamba": ("MambaForCausalLM", "MambaConfig", WIDER["mamba"][2]),
    "t5_span": ("T5ForQuestionAnswering", "T5Config", FAMILIES["t5"][2]),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64,
             "attention_hidden_size": 32, "intermediate_size": 48}),
    "esm": ("EsmForMaskedLM", "EsmConfig", _ENCODER | {"pad_token_id": 1, "mask_token_id": 3, "token_dropout": False,
            "position_embedding_type": "rotary"}),
    "mobilebert": ("MobileBertForMaskedLM", "MobileBertConfig", _ENCODER | {"embedding_size": 16,
                   "intra_bottleneck_size": 16, "num_feedforward_networks": 2}),
    "xlnet": ("XLNetLMHeadModel", "XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    "no_end": ("BartForSequenceClassification", "BartConfig", _BOTH | {"num_labels": 3}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", FAMILIES["gpt2"][2]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "more"), [("mamba", {}), ("t5_span", {}), ("xlnet", {"hidden_weight": 0.0}), ("gpt2", {})]
)
def test_model_whose_forward_reads_its_heads_weight_or_calls_by_name_learns(checkpoint, name, more, tmp_path):
    inputs = checkpoint(name, OWN_FORWARD)
    metrics = recover(RecoverParams(**PARAMS | more), inputs, tmp_path / "out", Silent())
    assert metrics["kl_after"] < metrics["kl_before"]


@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        ("esm", {}, r"logits of EsmForMaskedLM are not its head's product.*RuntimeError.*Take `recover` out"),
        ("mobilebert", {}, r"logits of MobileBertForMaskedLM are not its head's product.*Take `recover` out"),
        ("xlnet", {}, r"reads its tokens in another order.*\[16, 1, 32\] of one window of 16.*hidden_weight: 0"),
        ("rwkv", {"written_windows": 2}, r"RwkvForCausalLM cannot write text here.*written_windows: 0"),
        ("no_end", {}, r"BartForSequenceClassification does not read a window of the text.*<eos>.*a tokenizer that"),
    ],
)
def test_model_that_recovery_does_not_understand_is_refused_before_it_learns(checkpoint, name, more, why, tmp_path):
    heard = Heard()
    with pytest.raises(StageError, match=why):
        recover(RecoverParams(**PARAMS | more), checkpoint(name, OWN_FORWARD), tmp_path / "out", heard)
    assert not heard.points


def test_windows_that_the_model_cuts_short_are_counted_as_they_are_read(checkpoint, tmp_path):
    heard = Heard()
    how = {"tokens": 1024, "window_tokens": 512, "batch_windows": 2}
    metrics = recover(RecoverParams(**PARAMS | how), checkpoint("gpt2", OWN_FORWARD), tmp_path / "out", heard)
    assert metrics["steps"] == len(heard.steps()) == 8
    assert metrics["tokens"] == 8 * 2 * 64
