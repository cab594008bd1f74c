"""What each field of a configuration may be: one table for all families, since they share most of their fields.

A value may depend on those that stand above it; `fixed` are the ones that a configuration is begun with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

Drawn = dict[str, Any]

WIDTHS, HEADS, SIZES = (6, 10, 13, 15, 24, 30, 32, 37), (1, 2, 3, 4, 5, 6), (2, 3, 4, 5, 6, 8, 10)
HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
INNER = (
    "intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim",
    "ffn_hidden_size",
)  # fmt: skip
COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
STACKED = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
ACTIVATIONS = ("silu", "gelu", "relu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "tanh", "mish")
ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def drawn(fields: frozenset[str], rng: Random) -> Drawn:
    """A value for each of these fields that the table knows; the others keep their default."""
    found = _attention(fields, rng)
    for name, draw in FIELDS.items():
        if name in fields and name not in found:
            found[name] = draw(rng, found)
    if "rope_parameters" in fields:
        found["rope_parameters"] = _ropes(found, rng)
    return found


def _attention(fields: frozenset[str], rng: Random) -> Drawn:
    """Width, heads and their size: the width is free only where a head has a size of its own."""
    heads, own = rng.choice(HEADS), next((name for name in ("head_dim", "d_kv") if name in fields), "")
    size = rng.choice([one for one in SIZES if one % 2 == 0 or "rope_parameters" not in fields])
    own = own if rng.random() < 0.8 else ""
    found: Drawn = {own: size} if own else {}
    if "d_kv" in fields:
        found["d_kv"] = size
    elif "head_dim" in fields and not own:
        found["head_dim"] = size  # as its default would be: width over heads
    found |= {name: rng.choice(WIDTHS) if own else heads * size for name in HIDDEN if name in fields}
    found |= dict.fromkeys([name for name in COUNTS if name in fields], heads)
    for name in ("encoder_attention_heads", "decoder_attention_heads"):
        if name in fields:
            found[name] = rng.choice([one for one in range(1, heads * size + 1) if heads * size % one == 0])
    grouped = rng.choice([one for one in range(1, heads + 1) if heads % one == 0])
    found |= {name: grouped for name in ("num_key_value_heads", "num_kv_heads") if name in fields}
    return found | {name: rng.randint(1, 3) for name in (*STACKED, "num_decoder_layers") if name in fields}


def _width(found: Mapping[str, Any]) -> int:
    return int(next(found[name] for name in HIDDEN if name in found))


def _layers(found: Mapping[str, Any]) -> int:
    return int(next(found[name] for name in STACKED if name in found))


def _of(*values: Any) -> Callable[[Random, Mapping[str, Any]], Any]:
    return lambda rng, _: rng.choice(values)


def _layer_types(rng: Random, found: Mapping[str, Any]) -> list[str] | None:
    if rng.random() < 0.3:
        return None
    kinds = ["full_attention"] if found["sliding_window"] is None else ["full_attention", "sliding_attention"]
    return [rng.choice(kinds) for _ in range(_layers(found))]


_BOTH, _EPSILON = _of(True, False), _of(1e-3, 1e-5, 1e-6, 1e-12)
_ACT = _of(*ACTIVATIONS)
_INNER = _of(8, 11, 20, 33, 48)

FIELDS: Mapping[str, Callable[[Random, Mapping[str, Any]], Any]] = {
    **dict.fromkeys(INNER, _INNER),
    **dict.fromkeys(("hidden_act", "activation_function", "activation", "hidden_activation"), _ACT),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), _EPSILON),
    **dict.fromkeys(("attention_bias", "mlp_bias", "bias", "use_bias", "enable_bias"), _BOTH),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), _of(16, 24, 33, 64)),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim"), lambda rng, c: rng.choice((_width(c), 7, 16, 28))),
    "tie_word_embeddings": _BOTH,
    "use_sliding_window": _BOTH,
    "sliding_window": lambda rng, c: rng.choice((4, 7) if c.get("use_sliding_window", True) else (None,)),
    "max_window_layers": _of(0, 1, 2),
    "layer_types": _layer_types,
    "no_rope_layers": lambda rng, c: rng.choice((None, [rng.randint(0, 1) for _ in range(_layers(c))])),
    "no_rope_layer_interval": _of(1, 2, 4),
    "query_pre_attn_scalar": _of(4, 8, 13),
    "attn_logit_softcapping": _of(None, 5.0, 50.0),
    "final_logit_softcapping": _of(None, 3.0, 30.0),
    "embedding_multiplier": _of(1.0, 0.5, 12.0),
    "logits_scaling": _of(1.0, 8.0, 0.5),
    "residual_multiplier": _of(1.0, 0.22),
    "attention_multiplier": _of(1.0, 0.125),
    "scale_attn_weights": _BOTH,
    "scale_attn_by_inverse_layer_idx": _BOTH,
    "reorder_and_upcast_attn": _BOTH,
    "use_parallel_residual": _BOTH,
    "do_layer_norm_before": _BOTH,
    "_remove_final_layer_norm": _BOTH,
    "layer_norm_elementwise_affine": _BOTH,
    "apply_residual_connection_post_layernorm": _BOTH,
    "slow_but_exact": _BOTH,
    "new_decoder_architecture": _BOTH,
    "multi_query": _BOTH,
    "parallel_attn": _BOTH,
    "num_ln_in_parallel_attn": _of(None, 1, 2),
    "alibi": _BOTH,
    "scale_embedding": _BOTH,
    "sinusoidal_pos_embds": _BOTH,
    "type_vocab_size": _of(1, 2, 3),
    "num_hidden_groups": lambda rng, c: rng.choice((1, _layers(c))),
    "inner_group_num": _of(1, 1, 2),
    "feed_forward_proj": _of("relu", "gelu", "gated-gelu", "gated-silu", "gated-relu"),
    "relative_attention_num_buckets": _of(4, 8, 32),
    "relative_attention_max_distance": _of(10, 64, 128),
    "summary_type": _of("first", "last", "mean"),
    "summary_use_proj": _BOTH,
    "num_local_experts": _of(2, 3, 4),
    "num_experts_per_tok": _of(1, 2),
    "state_size": _of(1, 4, 7),
    "expand": _of(1, 2),
    "conv_kernel": _of(2, 4),
    "use_conv_bias": _BOTH,
    "time_step_rank": _of("auto", 1, 3, 48),
    "residual_in_fp32": _BOTH,
}
"""Field -> its values, given those drawn before it."""


def _ropes(found: Mapping[str, Any], rng: Random) -> Drawn:
    """One way to turn for all layers, or one for each kind of layer where a configuration has that (Gemma 3)."""
    if "layer_types" in found and "query_pre_attn_scalar" in found and "attn_logit_softcapping" not in found:
        return {kind: _rope(found, rng) for kind in ("sliding_attention", "full_attention")}
    return _rope(found, rng)


def _rope(found: Mapping[str, Any], rng: Random) -> Drawn:
    kind, most = rng.choice(ROPES), int(found["max_position_embeddings"])
    rope: Drawn = {"rope_type": kind, "rope_theta": rng.choice((100.0, 10000.0, 500000.0))}
    heads = int(next(found[name] for name in COUNTS if name in found))
    size = int(found.get("head_dim") or _width(found) // heads)
    turned = size
    if rng.random() < 0.3 and size >= 4:
        rope["partial_rotary_factor"] = 0.5 if size % 4 == 0 else 1.0
        turned = int(size * rope["partial_rotary_factor"])
    if kind != "default":
        rope["factor"] = rng.choice((2.0, 4.0))
    if kind in ("yarn", "longrope", "llama3"):
        rope["original_max_position_embeddings"] = most // 2
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        rope |= {f"{which}_factor": [rng.uniform(1, 3) for _ in range(turned // 2)] for which in ("short", "long")}
    return rope
