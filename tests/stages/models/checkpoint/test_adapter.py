"""A LoRA merged into its base answers as the base with the LoRA beside it, by peft's formulas written out here."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.models.checkpoint.adapter import merge
from stages.models.checkpoint.loading import load_model, merged, outlined
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.stages.models.families import answers, family

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
TABLE, HEAD = "model.embed_tokens", "lm_head"


class Noted(Silent):
    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)


def adapter(folder, tensors, **config):
    folder.mkdir(parents=True)
    save_file({f"base_model.model.{name}": one.contiguous() for name, one in tensors.items()},
              folder / "adapter_model.safetensors", {"format": "pt"})  # fmt: skip
    described = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4, "lora_alpha": 6}
    (folder / "adapter_config.json").write_text(json.dumps(described | config))
    return folder


def pair(path, rank, outputs, inputs):
    return {f"{path}.lora_A.weight": torch.randn(rank, inputs), f"{path}.lora_B.weight": torch.randn(outputs, rank)}


def beside(model, tensors, scales):
    """The base with each LoRA computed beside its map, as peft's forward does."""
    for path, scale in scales.items():
        a_rI, b_Or = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
        model.get_submodule(path).register_forward_hook(
            lambda _, given, out, a=a_rI, b=b_Or, s=scale: out + s * ((given[0] @ a.t()) @ b.t())
        )
    return answers(model)


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(3)
    return family("llama", tmp_path)


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, {Q: 6 / 4, UP: 6 / 8}),
        ({"use_rslora": True}, {Q: 6 / 2, UP: 6 / math.sqrt(8)}),
        (
            {"rank_pattern": {"up_proj": 8}, "alpha_pattern": {"layers.1.mlp.up_proj": 5, "proj": 9}},
            {Q: 6 / 4, UP: 5 / 8},
        ),
        ({"alpha_pattern": {"layers\\.0\\..*": 3}, "fan_in_fan_out": True}, {Q: 3 / 4, UP: 6 / 8}),
    ],
)
def test_merged_lora_answers_as_the_lora_beside_its_maps(llama, tmp_path, config, scales):
    tensors = pair(Q, 4, 32, 32) | pair(UP, 8, 48, 32)
    merged(llama, adapter(tmp_path / "a", tensors, **config), tmp_path / "out", Silent())
    wanted = beside(load_model(llama), tensors, scales)
    assert torch.allclose(answers(load_model(tmp_path / "out")), wanted, atol=1e-3, rtol=1e-3)
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {f"{Q}.weight", f"{UP}.weight"}


def test_lora_on_maps_that_the_file_holds_transposed_answers_as_beside_them(tmp_path):
    folder, path = family("gpt2", tmp_path), "transformer.h.1.attn.c_attn"
    tensors = pair(path, 4, 96, 32)
    merged(folder, adapter(tmp_path / "a", tensors, fan_in_fan_out=True), tmp_path / "out", Silent())
    wanted = beside(load_model(folder), tensors, {path: 6 / 4})
    assert torch.allclose(answers(load_model(tmp_path / "out")), wanted, atol=1e-3, rtol=1e-3)


def test_dora_brings_each_row_to_its_trained_length(llama, tmp_path):
    tensors, length = pair(Q, 4, 32, 32), torch.rand(32) + 0.5
    config = {"use_dora": True}
    merged(llama, adapter(tmp_path / "a", tensors | {f"{Q}.lora_magnitude_vector": length}, **config),
           tmp_path / "out", Silent())  # fmt: skip
    w = load_file(llama / "model.safetensors")[f"{Q}.weight"]
    v = w + 1.5 * tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]
    wanted = torch.stack([length[i] * v[i] / math.sqrt(sum(float(x) ** 2 for x in v[i])) for i in range(32)])
    assert torch.allclose(load_file(tmp_path / "out" / "model.safetensors")[f"{Q}.weight"], wanted, atol=1e-5)


def test_lora_of_a_tied_table_changes_the_table_alone(llama, tmp_path):
    a_rV, b_Hr = torch.randn(4, 96), torch.randn(32, 4)
    heard = Noted()
    tensors = {f"{TABLE}.lora_embedding_A": a_rV, f"{TABLE}.lora_embedding_B": b_Hr}
    merged(llama, adapter(tmp_path / "a", tensors), tmp_path / "out", heard)
    old, model = load_file(llama / "model.safetensors")[f"{TABLE}.weight"], load_model(tmp_path / "out")
    assert torch.allclose(model.get_parameter(f"{TABLE}.weight"), old + 1.5 * (b_Hr @ a_rV).t(), atol=1e-5)
    assert torch.equal(model.get_parameter(f"{HEAD}.weight"), old) and any(
        "they are two" in text for text in heard.said
    )


def test_modules_trained_whole_and_rows_for_new_tokens_take_their_place(llama, tmp_path):
    norm, table = torch.randn(32), torch.randn(100, 32)
    tensors = {"model.norm.modules_to_save.weight": norm, f"{TABLE}.weight": table}
    merged(
        llama, adapter(tmp_path / "a", tensors, modules_to_save=["norm", "embed_tokens"]), tmp_path / "out", Silent()
    )
    model = load_model(tmp_path / "out")
    assert torch.equal(model.get_parameter("model.norm.weight"), norm)
    assert torch.equal(model.get_parameter(f"{TABLE}.weight"), table) and model.config.vocab_size == 100
    assert model.get_parameter(f"{HEAD}.weight") is model.get_parameter(f"{TABLE}.weight")


def test_base_in_sixteen_bits_stays_so(llama, tmp_path):
    tensors = {name: one.bfloat16() for name, one in load_file(llama / "model.safetensors").items()}
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    config = json.loads((llama / "config.json").read_text()) | {"dtype": "bfloat16"}
    (llama / "config.json").write_text(json.dumps(config))
    lora = pair(Q, 4, 32, 32)
    merged(llama, adapter(tmp_path / "a", lora), tmp_path / "out", Silent())
    after = load_file(tmp_path / "out" / "model.safetensors")
    wanted = tensors[f"{Q}.weight"].float() + 1.5 * lora[f"{Q}.lora_B.weight"] @ lora[f"{Q}.lora_A.weight"]
    assert torch.equal(after[f"{Q}.weight"], wanted.bfloat16())
    assert {one.dtype for one in after.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("path", "shape", "config", "message"),
    [
        (Q, (32, 32), {"peft_type": "LOHA"}, "an adapter that is not merged here; measured LOHA"),
        (Q, (32, 32), {"init_lora_weights": "pissa_niter_4"}, "measured init_lora_weights pissa_niter_4"),
        (Q, (32, 32), {"target_parameters": ["experts"]}, "measured target_parameters"),
        ("model.layers.9.mlp.up_proj", (48, 32), {}, "does not fit its base; measured model.layers.9.mlp.up_proj"),
        (Q, (32, 31), {}, f"does not fit its base; measured {Q}"),
        ("model.layers.0.mlp", (32, 32), {}, "does not fit its base; measured model.layers.0.mlp"),
    ],
)
def test_adapter_that_cannot_be_merged_is_refused_by_name(llama, tmp_path, path, shape, config, message):
    given = adapter(tmp_path / "a", pair(path, 4, *shape), **config)
    with pytest.raises(StageError, match=message) as work:
        merged(llama, given, tmp_path / "out", Silent())
    assert not (tmp_path / "out" / "model.safetensors").exists()
    outline, _ = outlined(llama, [llama / "model.safetensors"])
    with pytest.raises(StageError) as ahead:
        merge(outline, llama, given, None, Silent())
    assert ahead.value.what == work.value.what and ahead.value.remedy == work.value.remedy


def test_an_adapters_shapes_are_those_of_the_merged_model_before_it_is_merged(llama, tmp_path):
    given = adapter(tmp_path / "a", pair(Q, 4, 32, 32) | {f"{TABLE}.weight": torch.randn(99, 32)})
    merged(llama, given, tmp_path / "out", Silent())
    outline, _ = outlined(llama, [llama / "model.safetensors"])
    merge(outline, llama, given, None, Silent())
    made = load_model(tmp_path / "out")
    assert outline.config.vocab_size == made.config.vocab_size == 99
    shapes = [{name: one.shape for name, one in model.named_parameters()} for model in (outline, made)]
    assert shapes[0] == shapes[1]
