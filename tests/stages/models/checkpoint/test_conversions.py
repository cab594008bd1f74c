"""What a file holds beside its architecture's tensors is left out, as transformers does; what is of another is not."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from stages.models.checkpoint.files import weight_files
from stages.models.checkpoint.loading import load_model, outlined
from stages.runtime.contract import StageError
from tests.stages.models.families import answers, family

IN_A_BLOCK = {
    "bias of a map": ("model.layers.1.self_attn.o_proj.bias", torch.ones(32)),
    "norm": ("model.layers.0.self_attn.q_norm.weight", torch.ones(8)),
    "map": ("model.layers.0.mlp.router.weight", torch.ones(4, 32)),
    "experts": ("model.layers.0.mlp.experts.w1", torch.ones(4, 32, 48)),
    "block too many": ("model.layers.3.input_layernorm.weight", torch.ones(32)),
    "bias of the head": ("lm_head.bias", torch.ones(96)),
    "bias of a norm": ("model.norm.bias", torch.ones(32)),
    "scale": ("model.layers.0.mlp.up_proj.weight_scale", torch.ones(1)),
    "bare name": ("layers.0.mlp.router.weight", torch.ones(4, 32)),
}


def written(folder, tensors, **config):
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def left(folder):
    return outlined(folder, weight_files(folder))[1]


def as_the_library_does(folder):
    """Load by ours and by transformers: equal answers, and what transformers calls unexpected is left out and named."""
    ours = load_model(folder)
    theirs, info = type(ours).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(answers(ours), answers(theirs.eval()))
    assert {name.removeprefix(f"{ours.base_model_prefix}.") for name in info["unexpected_keys"]} <= {
        name.removeprefix(f"{ours.base_model_prefix}.") for name in left(folder)
    }
    return left(folder)


def test_masks_of_old_decoders_are_left_out_by_name(tmp_path):
    folder = family("gpt2", tmp_path)
    tensors = {name.removeprefix("transformer."): one for name, one in load_file(folder / "model.safetensors").items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(3)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    assert as_the_library_does(written(folder, tensors | masks)) == sorted(masks)


def test_tables_of_any_decoder_are_left_out_by_name(tmp_path):
    folder = family("llama", tmp_path)
    tables = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(64, 8),
        "model.layers.0.self_attn.bias": torch.ones(64, 64).tril().bool(),
        "model.layers.0.self_attn.causal": torch.ones(1, 1, 64, 64),
    }
    assert as_the_library_does(written(folder, load_file(folder / "model.safetensors") | tables)) == sorted(tables)


def test_pooler_and_next_sentence_head_beside_a_masked_head_are_left_out(tmp_path):
    folder = family("bert_masked", tmp_path)
    more = {
        "bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32),
        "cls.seq_relationship.weight": torch.ones(2, 32), "cls.seq_relationship.bias": torch.ones(2),
    }  # fmt: skip
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(folder / "model.safetensors")
    for new, name in old.items():
        tensors = {key.replace(new, name): one for key, one in tensors.items()}
    assert as_the_library_does(written(folder, tensors | more)) == sorted(more)


def test_head_beside_a_bare_model_is_left_out(tmp_path):
    folder = family("bert_classes", tmp_path)
    written(folder, load_file(folder / "model.safetensors"), architectures=["BertModel"])
    assert as_the_library_does(folder) == ["classifier.bias", "classifier.weight"]


def test_decoder_beside_an_encoder_alone_is_left_out(tmp_path):
    folder = family("t5", tmp_path)
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    tensors = {name: one.clone() for name, one in model.state_dict().items()}
    extra = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    assert as_the_library_does(written(folder, tensors | {extra: torch.ones(32, 4)})) == [extra]


@pytest.mark.parametrize("case", IN_A_BLOCK)
def test_weights_in_a_block_that_the_architecture_lacks_are_another_model(tmp_path, case):
    folder = family("llama", tmp_path)
    name, tensor = IN_A_BLOCK[case]
    written(folder, load_file(folder / "model.safetensors") | {name: tensor})
    for load in (left, load_model):
        with pytest.raises(
            StageError, match=rf"{folder} holds weights for which .*1 left over: {name};.*{folder}/config"
        ):
            load(folder)


def test_model_given_as_one_of_fewer_parts_is_refused(tmp_path):
    folder = family("qwen3", tmp_path)
    written(folder, load_file(folder / "model.safetensors"), architectures=["LlamaForCausalLM"], model_type="llama")
    with pytest.raises(StageError, match=r"6 left over: model\.layers\.0\.self_attn\.k_norm\.weight"):
        left(folder)


def test_pooler_that_a_file_lacks_is_refused_with_the_classes_that_fit(tmp_path):
    folder = family("bert_masked", tmp_path)
    written(folder, load_file(folder / "model.safetensors"), architectures=["BertModel"])
    with pytest.raises(StageError, match=r"2 missing: pooler\.dense\.weight, .*to .*\[\"BertForMaskedLM\"\], whose"):
        left(folder)


def test_class_of_a_checkpoints_own_has_the_one_of_transformers_for_its_task(tmp_path):
    folder = family("phi3", tmp_path)
    (folder / "modeling_own.py").write_text("raise SystemExit('code of others ran')\n")
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    before = answers(load_model(folder))
    written(folder, load_file(folder / "model.safetensors"), architectures=["OwnForCausalLM"], auto_map=own)
    assert torch.equal(answers(load_model(folder)), before)
    written(folder, load_file(folder / "model.safetensors"), architectures=["OwnForMusic"])
    with pytest.raises(StageError, match=f"{folder}/config.json names the architecture 'OwnForMusic'"):
        load_model(folder)


def test_one_tensor_under_two_names_is_refused(tmp_path):
    folder = shutil.copytree(family("gpt2", tmp_path), tmp_path / "two")
    tensors = load_file(folder / "model.safetensors")
    written(folder, tensors | {"wte.weight": tensors["transformer.wte.weight"] + 1})
    with pytest.raises(StageError, match="are one tensor of GPT2LMHeadModel"):
        load_model(folder)
