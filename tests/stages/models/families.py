"""Tiny random checkpoints of many architectures, saved by transformers itself."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY, WIDTH, INNER, HEADS, BLOCKS = 96, 32, 48, 4, 3
_ENCODER = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}  # fmt: skip
_DECODER = {**_ENCODER, "bos_token_id": 0, "eos_token_id": 1}
_BOTH = {
    "d_model": WIDTH, "encoder_layers": BLOCKS, "decoder_layers": BLOCKS, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "bos_token_id": 0,
    "max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}  # fmt: skip
_GROUPED = {**_DECODER, "num_key_value_heads": 2, "head_dim": 8}
_T5 = {
    "d_model": WIDTH, "d_kv": 6, "d_ff": INNER, "num_layers": BLOCKS, "num_decoder_layers": 2, "num_heads": HEADS,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, str, dict[str, object]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED | {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": WIDTH, "n_inner": INNER, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": 64, "bos_token_id": 0,
         "eos_token_id": 1},
    ),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _DECODER),
    "opt": ("OPTForCausalLM", "OPTConfig", {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": INNER,
            "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "max_position_embeddings": 64}),
    "bert_masked": ("BertForMaskedLM", "BertConfig", _ENCODER),
    "bert_classes": ("BertForSequenceClassification", "BertConfig", _ENCODER | {"num_labels": 3}),
    "bert_tokens": ("BertForTokenClassification", "BertConfig", _ENCODER | {"num_labels": 5}),
    "bert_answers": ("BertForQuestionAnswering", "BertConfig", _ENCODER),
    "bert_choices": ("BertForMultipleChoice", "BertConfig", _ENCODER),
    "bert_bare": ("BertModel", "BertConfig", _ENCODER),
    "bert_untied": ("BertForMaskedLM", "BertConfig", _ENCODER | {"tie_word_embeddings": False}),
    "bert_decoder": (
        "BertLMHeadModel", "BertConfig", _ENCODER | {"is_decoder": True, "add_cross_attention": True},
    ),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _ENCODER),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", {"dim": WIDTH, "hidden_dim": INNER, "n_layers": BLOCKS,
                   "n_heads": HEADS, "max_position_embeddings": 64}),
    # Its attention is not scaled: by T5's own factor of 1 the same errors of the weights cost 13 times the Llama's.
    "t5": ("T5ForConditionalGeneration", "T5Config",
           _T5 | {"feed_forward_proj": "gated-gelu", "initializer_factor": 0.75}),
    "t5_plain": ("T5ForConditionalGeneration", "T5Config", _T5 | {"tie_word_embeddings": False}),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BOTH),
    "marian": ("MarianMTModel", "MarianConfig", _BOTH),
}  # fmt: skip
"""Name -> class, configuration class, and the settings that make it tiny."""

WIDER: dict[str, tuple[str, str, dict[str, object]]] = {
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", _BOTH | {"scale_embedding": True}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _GROUPED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GROUPED | {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GROUPED | {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "xglm": ("XGLMForCausalLM", "XGLMConfig", {"d_model": WIDTH, "ffn_dim": INNER, "num_layers": BLOCKS,
             "attention_heads": HEADS, "max_position_embeddings": 64}),
    "biogpt": ("BioGptForCausalLM", "BioGptConfig", _DECODER),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": WIDTH, "n_layer": BLOCKS, "n_head": HEADS,
              "bos_token_id": 0, "eos_token_id": 1}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS,
               "num_attention_heads": HEADS, "bos_token_id": 0, "eos_token_id": 1}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER | {"num_key_value_heads": 2, "pad_token_id": 0}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", _DECODER | {"num_key_value_heads": 2,
                "embedding_multiplier": 12.0, "logits_scaling": 8.0}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", _DECODER | {"num_key_value_heads": 2, "pad_token_id": 0}),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", _ENCODER | {"embedding_size": WIDTH}),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", _ENCODER | {"embedding_size": 16}),
    "deberta": ("DebertaV2ForMaskedLM", "DebertaV2Config", _ENCODER | {"relative_attention": True, "type_vocab_size": 0,
                "pos_att_type": ["p2c", "c2p"], "position_buckets": 16, "norm_rel_ebd": "layer_norm",
                "share_att_key": True, "position_biased_input": False, "pooler_hidden_size": WIDTH}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "state_size": 4}),
}  # fmt: skip
"""Those whose modules do more than their weights say, and others that not every technique takes."""

CHOOSERS: dict[str, tuple[str, str, dict[str, object]]] = {
    f"{name}_choices": (kind.replace("ForMaskedLM", "ForMultipleChoice"), config, settings)
    for name, (kind, config, settings) in (FAMILIES | WIDER).items()
    if name in ("roberta", "distilbert", "electra", "albert", "deberta")
}
"""Encoders that choose, beside BERT's."""

EXPERTS: dict[str, tuple[str, str, dict[str, object]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
"""Mixtures of experts, whose maps no technique takes one by one."""

_ATTENTION = {"q_norm": -0.43, "k_norm": -0.43}
_SOFTER = {"qwen3": _ATTENTION, "gemma3": _ATTENTION | {"post_attention_layernorm": -0.5,
           "post_feedforward_layernorm": -0.5}}  # fmt: skip
"""What norms have more than at the start. Scores as large as those of models without norms of queries and keys, and a
stream that is not all what blocks add: else the same errors of the weights cost Gemma 3 twice what they cost the Llama.
"""


def family(name: str, root: Path, draw: int = 0) -> Path:
    """The checkpoint of a family below `root`, made at first use; each draw has other weights."""
    folder = root / (f"{name}-{draw}" if draw else name)
    if not folder.is_dir():
        made, config, settings = (FAMILIES | WIDER | CHOOSERS | EXPERTS)[name]
        torch.manual_seed(len(name) + 100 * draw)
        model = getattr(transformers, made)(getattr(transformers, config)(vocab_size=VOCABULARY, **settings))
        with torch.no_grad():
            for path, parameter in model.named_parameters():  # biases and norms that are not trivial
                module = path.removesuffix(".weight").rpartition(".")[2]
                parameter.add_(torch.randn_like(parameter) * 0.1 + _SOFTER.get(name, {}).get(module, 0.0))
        model.save_pretrained(folder)
    return folder


def library(name: str, folder: Path) -> PreTrainedModel:
    """The checkpoint as transformers loads it, with no key missing or left over."""
    model, info = getattr(transformers, (FAMILIES | WIDER | CHOOSERS | EXPERTS)[name][0]).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def answers(model: PreTrainedModel) -> torch.Tensor:
    """What the model answers to two short texts."""
    ids_NT = 3 + torch.arange(20).view(2, 10) * 7 % (VOCABULARY - 3)
    given = {"input_ids": ids_NT, "attention_mask": torch.ones_like(ids_NT)}
    if type(model).__name__.endswith("ForMultipleChoice"):  # each text is the one choice of a question of its own
        given = {name: one[:, None] for name, one in given.items()}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids_NT.flip(1)[:, :6]
    out = model(**given, return_dict=True)
    return torch.cat([one.flatten() for one in out.values() if isinstance(one, torch.Tensor)])
