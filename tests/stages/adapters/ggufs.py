"""GGUF files of the tiny Llama, written as llama.cpp's converter would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

ROLES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def write_gguf(
    folder: Path, path: Path, *, kind: str = "F32", architecture: str = "llama", leave_out: str = ""
) -> None:
    """Write a checkpoint in Hugging Face layout as one GGUF file; matrices are stored as `kind`."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name != leave_out:
            _add_tensor(writer, name, tensor, kind, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {added["content"] for added in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, tensor: np.ndarray[Any, Any], kind: str, config: dict[str, Any]
) -> None:
    if ".q_proj" in name or ".k_proj" in name:
        # llama.cpp rotates neighbouring pairs of a head, the Hugging Face layout its two halves.
        heads = config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
        rows = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        tensor = rows.swapaxes(1, 2).reshape(tensor.shape)
    stored = WHOLE.get(name)
    if stored is None:
        _, _, number, role = name.removesuffix(".weight").split(".", 3)
        stored = f"blk.{number}.{ROLES[role]}.weight"
    if tensor.ndim == 2 and kind != "F32":
        quantized = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(stored, gguf.quantize(tensor, quantized), raw_dtype=quantized)
    else:
        writer.add_tensor(stored, np.ascontiguousarray(tensor))
