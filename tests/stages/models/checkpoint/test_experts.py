"""Mixtures of experts: a file holds each by itself, the model all as one tensor, and plain transformers reads both."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from stages.models.checkpoint.files import weight_files
from stages.models.checkpoint.loading import load_model, outlined, save_model
from stages.quantize.params import QuantizeParams
from stages.quantize.stage import quantize
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.stages.models.families import answers

COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
ROUTED = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
KINDS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": ROUTED | {"shared_expert_intermediate_size": 24},
    "Qwen3Moe": ROUTED | {"head_dim": 8},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Phimoe": {"num_local_experts": 4},
    "DeepseekV3": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 2,
                   "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
                   "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1},
}  # fmt: skip


def made(kind, root):
    folder = root / kind
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(COMMON | KINDS[kind]))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def library(kind, folder):
    model, info = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_experts_load_and_are_written_as_transformers_does(kind, tmp_path):
    folder = made(kind, tmp_path)
    ours, theirs = load_model(folder), library(kind, folder)
    assert torch.equal(answers(ours), answers(theirs)) and outlined(folder, weight_files(folder))[1] == []
    save_model(ours, tmp_path / "out", like=folder)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[name], one) for name, one in before.items())
    assert torch.equal(answers(library(kind, tmp_path / "out")), answers(theirs))


def test_experts_in_sixteen_bits_are_those_that_transformers_rounds(tmp_path):
    folder = made("Mixtral", tmp_path)
    metrics = quantize(QuantizeParams(scheme="bf16"), {"model": folder}, tmp_path / "out", Silent())
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert metrics["halved_tensors"] == len(after) == len(before)
    assert all(torch.equal(after[name], one.bfloat16()) for name, one in before.items())
    assert torch.equal(answers(load_model(tmp_path / "out")), answers(library("Mixtral", tmp_path / "out")))


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts_in_few_bits_are_refused_by_name(kind, tmp_path):
    folder = made(kind, tmp_path)
    with pytest.raises(StageError, match=r"mlp\.experts\.gate_up_proj holds experts.*scheme: bf16"):
        quantize(QuantizeParams(scheme="int8_weight_only"), {"model": folder}, tmp_path / "out", Silent())
    assert not list((tmp_path).glob("out/*.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, name: t.pop(name), "the parts of model.layers.1.mlp.experts.gate_up_proj are not alike"),
        (lambda t, name: t.update({name: torch.ones(24, 33)}), "the parts of .*gate_up_proj are not alike"),
        (lambda t, name: t.update({name.replace(".3.", ".12."): torch.ones(24, 32)}), "are not alike"),
    ],
)
def test_expert_that_is_missing_misshapen_or_too_many_is_refused(change, message, tmp_path):
    folder = made("Qwen3Moe", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors, "model.layers.1.mlp.experts.3.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageError, match=message):
        load_model(folder)


def test_fewer_experts_than_the_configuration_says_are_misshapen(tmp_path):
    folder = made("Mixtral", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 8}))
    with pytest.raises(StageError, match=r"mlp\.gate\.weight of .* is misshapen; measured \(4, 32\); limit \(8, 32\)"):
        load_model(folder)
