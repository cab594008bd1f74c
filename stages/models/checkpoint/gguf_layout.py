"""A Llama-type checkpoint as one GGUF file, as llama.cpp and transformers read it.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.json_files import read_json
from stages.models.checkpoint.layout import CONFIG, GENERATION
from stages.models.checkpoint.loading import load_model, load_tokenizer
from stages.models.checkpoint.plain_layout import plain
from stages.runtime.contract import Progress, StageError

Stored = Literal["f32", "f16", "q8_0"]
FILE = "model.gguf"
TYPES = ("llama", "qwen2", "qwen3")
"""Model types whose architecture has the same name in GGUF."""
_KINDS = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_BLOCK = 32
"""Weights of a row that share a scale in Q8_0."""
_F16 = float(np.finfo(np.float16).max)
_SPLITS = ("llama-bpe", "qwen2", "tekken", "gpt-4o")
"""Names of ways to split text, of those that transformers knows by more than one."""
_COMPOSED = "NFC"
"""The one change of a text that readers of GGUF leave out of the tokenizers of Qwen, whose texts are nearly all so."""
_UNLIKE = "Take --format hf, onnx or genai."


def refuse(folder: Path) -> None:
    """Raise StageError where GGUF has no place for what a checkpoint is; no weight is read."""
    config = read_json(folder / CONFIG)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    biases = [name for name in ("attention_bias", "mlp_bias") if config.get(name)]
    window = config.get("use_sliding_window") and config.get("sliding_window")
    for strange, what, measured, limit in (
        (config.get("model_type") not in TYPES, "its type is not written", config.get("model_type"), ", ".join(TYPES)),
        (rope.get("rope_type", "default") != "default", "its positions are scaled", rope.get("rope_type"), "default"),
        (config.get("hidden_act", "silu") != "silu", "its activation is not written", config.get("hidden_act"), "silu"),
        (biases, "its maps have a bias", ", ".join(biases), "none"),
        (window, "its attention is cut to a window", window, "all tokens"),
    ):
        if strange:
            raise StageError(
                f"the checkpoint becomes no GGUF file: {what}", measured=measured, limit=limit, remedy=_UNLIKE
            )
    _split(_written(load_tokenizer(folder)))


def write_gguf(folder: Path, output: Path, stored: Stored, progress: Progress) -> None:
    """Write `model.gguf`: configuration, tokenizer with its chat template, weights.

    Args:
        folder: a CHECKPOINT artifact that `refuse` lets pass.
        output: where to.
        stored: type of the matrices. Rows that Q8_0 cannot divide into blocks are in F16, vectors always in F32.
        progress: told what is not as it was.

    Raises:
        StageError: the checkpoint does not open, no plain model answers as it does, or values do not fit into F16.
    """
    model = plain(load_model(folder), progress)
    config = model.config.to_dict()
    writer = gguf.GGUFWriter(output / FILE, config["model_type"])
    _add_config(writer, config, stored)
    _add_tokenizer(writer, folder, config, progress)
    _add_tensors(writer, model, config, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: gguf.GGUFWriter, config: Mapping[str, Any], stored: Stored) -> None:
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_file_type(_KINDS[stored][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(config["vocab_size"])


def _written(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A tokenizer as transformers has made it of a folder, in the words of `tokenizer.json`."""
    if not tokenizer.is_fast:
        raise StageError(
            "the checkpoint becomes no GGUF file: its tokenizer is not written",
            measured=type(tokenizer).__name__,
            limit="one of the library tokenizers",
            remedy=_UNLIKE,
        )
    written: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return written


def _split(written: Mapping[str, Any]) -> str:
    """GGUF's name of the way in which text is split before it is merged."""
    before, model = written.get("pre_tokenizer") or {}, written.get("model") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [one.get("type") for one in steps]
    _refuse_changed_texts(written, steps)
    if model.get("type") == "BPE" and not model.get("byte_fallback") and kinds and kinds[-1] == "ByteLevel":
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"]:
            pattern = steps[0]["pattern"].get("Regex")
            found = [name for name in _SPLITS if GGUF_PRE_TOKENIZER_SPLITS[name] == pattern]
            if found:
                return found[0]
    raise StageError(
        "the checkpoint becomes no GGUF file: its tokenizer is not written",
        measured=f"{model.get('type')} behind {', '.join(map(str, kinds))}",
        limit="bytes in pairs (BPE), split as GPT-2, Llama 3, Qwen2, Tekken, GPT-4o or SmolLM split",
        remedy=_UNLIKE,
    )


def _refuse_changed_texts(written: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> None:
    """Raise StageError where a text is changed before it is split: readers of GGUF take it as it is."""
    normalizer = (written.get("normalizer") or {}).get("type")
    spaced = any(one.get("add_prefix_space") for one in steps if one.get("type") == "ByteLevel")
    for strange, what, measured, limit in (
        (normalizer not in (None, _COMPOSED), "it changes texts before it splits them", normalizer, _COMPOSED),
        (spaced, "it puts a space before each text", "add_prefix_space: true", "false"),
    ):
        if strange:
            raise StageError(
                f"the checkpoint becomes no GGUF file: its tokenizer is not written, as {what}",
                measured=measured,
                limit=limit,
                remedy=_UNLIKE,
            )


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: Mapping[str, Any], progress: Progress) -> None:
    tokenizer = load_tokenizer(folder)
    written = _written(tokenizer)
    if written.get("normalizer"):
        progress.note(f"readers of GGUF split texts as they come: one that is not in {_COMPOSED} becomes other tokens")
    words = {place: word for word, place in written["model"]["vocab"].items()}
    added = {one["id"]: one for one in written.get("added_tokens", [])}
    words |= {place: one["content"] for place, one in added.items()}
    kinds = gguf.TokenType
    tokens, types = list[str](), list[int]()
    for place in range(config["vocab_size"]):  # a table may have rows that no word has
        tokens.append(words.get(place, f"[PAD{place}]"))
        special = added[place]["special"] if place in added else None
        usual = kinds.NORMAL if place in words else kinds.UNUSED
        types.append(usual if special is None else kinds.CONTROL if special else kinds.USER_DEFINED)
    merges = [one if isinstance(one, str) else " ".join(one) for one in written["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(written))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    said = {**config, **read_json(folder / GENERATION, optional=True)}
    _add_ends(writer, tokenizer, said, progress)
    if isinstance(template := tokenizer.chat_template, str):
        writer.add_chat_template(template)


def _add_ends(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, said: Mapping[str, Any], progress: Progress
) -> None:
    bare, framed = (tokenizer.backend_tokenizer.encode("a", add_special_tokens=said).ids for said in (False, True))
    before = next(place for place in range(len(framed)) if framed[place : place + len(bare)] == bare)
    told = said.get("eos_token_id")
    ends = list(told) if isinstance(told, list) else [told] if told is not None else []
    # What is the tokenizer's own end stays it: chats are written with that one. Readers end answers by all three.
    ends.sort(key=lambda one: one != tokenizer.eos_token_id)
    if more := ends[3:]:
        names = ", ".join(map(str, more))
        progress.note(f"GGUF has places for three tokens that end an answer: {names} end none any more")
    begins = framed[0] if before else said.get("bos_token_id")
    for value, add in (
        (begins, writer.add_bos_token_id),
        *zip(ends, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), strict=False),
        (said.get("pad_token_id"), writer.add_pad_token_id),
    ):
        if value is not None:
            add(value)
    writer.add_add_bos_token(before > 0)
    writer.add_add_eos_token(len(framed) > before + len(bare))


def _add_tensors(writer: gguf.GGUFWriter, model: PreTrainedModel, config: Mapping[str, Any], stored: Stored) -> None:
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[config["model_type"]], config["num_hidden_layers"])
    for places, tensor in anatomy.distinct_tensors(model):
        stem, _, suffix = places[0].rpartition(".")
        found = names.get_name(stem)
        if found is None:
            raise StageError(f"GGUF has no place for {places[0]}", remedy=_UNLIKE)
        array = np.asarray(tensor.detach().float().numpy())
        if config["model_type"] == "llama" and found.endswith(("attn_q", "attn_k")):
            array = _neighbours(array, config["num_attention_heads" if found.endswith("q") else "num_key_value_heads"])
        _add(writer, f"{found}.{suffix}", array, stored)


def _neighbours(w_OI: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows in the order in which llama.cpp turns them: a pair beside each other, not half a head apart."""
    halves = w_OI.reshape(heads, 2, -1, w_OI.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(w_OI.shape))


def _add(writer: gguf.GGUFWriter, name: str, array: NDArray[np.float32], stored: Stored) -> None:
    chosen = _KINDS[stored][0]
    if array.ndim < 2 or stored == "f32":
        writer.add_tensor(name, np.ascontiguousarray(array))
        return
    if stored == "q8_0" and array.shape[-1] % _BLOCK:
        chosen = _KINDS["f16"][0]
    # A block's scale, in which its largest value is 127, is in F16, too.
    limit = _F16 * (127 if chosen == _KINDS["q8_0"][0] else 1)
    if (most := float(np.abs(array).max())) > limit:
        raise StageError(
            f"{name} does not fit into {stored}", measured=f"{most:.3g}", limit=limit, remedy="Take --dtype f32."
        )
    writer.add_tensor(name, gguf.quantize(array, chosen), raw_dtype=chosen)
