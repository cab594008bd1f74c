"""Checkpoints as the hub and other tools lay them out: each must load as the model that it is.

Where a case has a `plain` checkpoint, it is the same model as transformers saves it: what comes out is judged against
that one, so that a weight read wrongly shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tests.cases.inputs import END, TOKENS, llama, plain, saved, small, stored, told, words
from tests.cases.place import FIRST_S, SPLITS, Place, Result, held, judge

INT8, KEPT = "scheme: int8_weight_only", "scheme: int8_weight_only, embedding: keep"
INT4 = "scheme: int4_weight_only, block: 16, window_tokens: 64"
NEAR = 0.01
"""KL divergence that INT8 weights stay below."""
FOUR_BITS = 0.09
"""Three times what INT4 in blocks of 16 costs a random Llama of this size: 0.03."""


def near(result: Result, *artifacts: str, within: float = NEAR) -> None:
    """Hold that each artifact predicts as the baseline does."""
    for name in artifacts:
        assert 0 <= result.measured("kl_divergence", name) < within, (name, result.said.err[-2000:])
        assert abs(result.measured("perplexity", name) / result.measured("perplexity", "dense") - 1) < 4 * within**0.5


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by name."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def config(folder: Path) -> dict[str, object]:
    """A checkpoint's config.json."""
    return dict(json.loads((folder / "config.json").read_text()))


def gpt2_hub_layout(place: Place) -> None:
    """Names without a prefix, causal masks and their fill value beside the weights: no weights, and no obstacle."""
    source = place.folder / "in"
    plain(source / "text.txt")
    model = small("GPT2", "LMHeadModel", n_positions=128, bos_token_id=END)
    saved(model, source / "plain")
    for name, fill in (("hub", False), ("old", True)):
        saved(model, source / name, max_position_embeddings=None)
        found = {key.removeprefix("transformer."): one for key, one in model.transformer.state_dict().items()}
        for block in range(2):
            found[f"h.{block}.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
            found |= {f"h.{block}.attn.masked_bias": torch.tensor(-1e4)} if fill else {}
        stored(source / name, found)
        near(place.quantized(INT8, f"in/{name}", "in/plain", name), "q")


def bert_hub_layout(place: Place) -> None:
    """gamma and beta, a pooler and a next-sentence head: loaded as transformers does, and judged as a masked model."""
    source = place.folder / "in"
    plain(source / "text.txt")
    model = small("Bert", "ForPreTraining", intermediate_size=128, max_position_embeddings=128)
    masked = small("Bert", "ForMaskedLM", intermediate_size=128, max_position_embeddings=128)
    masked.load_state_dict(model.state_dict(), strict=False)
    for folder in (source / "plain", source / "hub"):
        saved(masked, folder)
        words(folder, cls_token="<bos>", sep_token="<end>", eos_token=None)
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    found = {}
    for key, one in model.state_dict().items():
        for new, old in names.items():
            key = key.replace(new, old)
        found |= {} if "predictions.decoder" in key else {key: one}
    assert any(key.startswith("cls.seq_relationship") for key in found) and "bert.pooler.dense.weight" in found
    stored(source / "hub", found)
    result = place.quantized(INT8, "in/hub", "in/plain")
    dense, q = (result.measured("pseudo_perplexity", name) for name in ("dense", "q"))
    assert abs(q / dense - 1) < 0.02
    assert "perplexity" not in result.step("validate-q-text")["metrics"], "nobody asks it for the next word"


def opt_hub_names(place: Place) -> None:
    """16 bits, names without `model.`, the tied head stored beside its table: INT4 fits it."""
    source = place.folder / "in"
    plain(source / "text.txt")
    positions = {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 128, "init_std": 0.12}
    model = small("OPT", bos_token_id=END, **positions)
    for folder in (source / "plain", source / "hub"):
        saved(model, folder, "float16")
    stored(source / "hub", {key.removeprefix("model."): one for key, one in model.state_dict().items()})
    near(place.quantized(INT4, "in/hub", "in/plain"), "q", within=FOUR_BITS)


def phi3_auto_map(place: Place) -> None:
    """A configuration that points to code, of an architecture that transformers has: its own class, never the code."""
    source = place.folder / "in"
    plain(source / "text.txt")
    sizes = {"intermediate_size": 128, "num_key_value_heads": 4, "tie_word_embeddings": False}
    limits = {"max_position_embeddings": 256, "original_max_position_embeddings": 256}
    model = small("Phi3", **sizes, **limits)
    saved(model, source / "plain", "bfloat16")
    ours = saved(model, source / "hub", "bfloat16")
    told(ours, auto_map={"AutoConfig": "modeling_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3"})
    ran = place.folder / "the-code-ran"
    (ours / "modeling_phi3.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise SystemExit('it ran')\n")
    near(place.quantized(KEPT, "in/hub", "in/plain"), "q")
    assert not ran.exists()


def compressed_tensors_in(place: Place) -> None:
    """What was written in the layout of compressed-tensors is read again: judged and exported, not quantized twice."""
    source = place.folder / "in"
    plain(source / "text.txt")
    saved(llama(), source / "model")
    steps = f"""dense fetch {{source: in/model}}
        text corpus {{source: in/text.txt, {SPLITS}}}
        q quantize model=dense text=text {{{INT4}, layout: compressed-tensors, embedding: keep}}"""
    made = place.run(place.recipe("a", steps, judge("q")), "--output", place.folder / "out")
    near(made, "q", within=FOUR_BITS)
    steps = f"""dense fetch {{source: out/q}}
        text corpus {{source: in/text.txt, {SPLITS}}}
        graph export model=dense {{parity_tokens: 64}}
        cpu compile graph=graph {{backend: onnxruntime}}"""
    again = place.run(place.recipe("b", steps, judge("cpu")))
    near(again, "cpu", within=1e-3)
    assert abs(again.measured("perplexity", "dense") / made.measured("perplexity", "q") - 1) < 1e-3
    twice = f"dense fetch {{source: out/q}}\nq quantize model=dense {{{INT8}}}"
    said = place.enginery("run", place.recipe("c", twice))
    assert said.code == 1 and "quantized" in said.err and "compressed-tensors" in said.err


def fp8_block_in(place: Place) -> None:
    """FP8 with a scale for each block of 128 by 128, as DeepSeek ships it: read as the numbers it stands for."""
    source = place.folder / "in"
    plain(source / "text.txt")
    model = llama()
    saved(model, source / "plain")
    hub = saved(model, source / "hub")
    found, meant = {}, {}
    for key, one in model.state_dict().items():
        if one.dim() != 2 or "embed" in key or key == "lm_head.weight":
            found[key] = one.bfloat16()
            meant[key] = found[key].float()
            continue
        out, into = one.shape
        scale = torch.stack(
            [torch.stack([block.abs().amax() / 448 for block in row.split(128, 1)]) for row in one.split(128)]
        )
        wide = scale.repeat_interleave(128, 0)[:out].repeat_interleave(128, 1)[:, :into]
        found[key] = (one / wide).to(torch.float8_e4m3fn)
        found[f"{key}_scale_inv"] = scale
        meant[key] = found[key].float() * wide
    del found["lm_head.weight"], meant["lm_head.weight"]
    stored(hub, found)
    stored(source / "plain", meant)
    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    told(hub, quantization_config=how, dtype="bfloat16")
    near(place.quantized(INT8, "in/hub", "in/plain"), "q")


def adapter_without_base(place: Place) -> None:
    """The folder that a LoRA training leaves: said to be an adapter, of which base, and to be merged first."""
    source = place.folder / "in"
    plain(source / "text.txt")
    words(source / "model")
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    halves = {f"{path}.lora_A.weight": torch.randn(8, 64), f"{path}.lora_B.weight": torch.randn(64, 8)}
    stored(source / "model", halves, "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B", "target_modules": ["q_proj"]}
    (source / "model" / "adapter_config.json").write_text(json.dumps(facts | {"r": 8, "lora_alpha": 16}))
    steps = f"dense fetch {{source: in/model}}\nq quantize model=dense {{{INT8}}}"
    said = place.refused("run", place.recipe("r", steps), within_s=FIRST_S)
    assert "adapter" in said and "meta-llama/Llama-3.2-1B" in said and "merge" in said


def gemma3_text(place: Place) -> None:
    """Norms that multiply by one more than their weight, heads wider than the stream, tables whose output is scaled."""
    source = place.folder / "in"
    plain(source / "text.txt")
    heads = {"num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32, "intermediate_size": 128}
    layers = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    limits = {"num_hidden_layers": 3, "max_position_embeddings": 256}
    model = small("Gemma3", settings="Gemma3Text", **heads, **layers, **limits)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(0, 0.2)
    saved(model, source / "model", "bfloat16")
    steps = f"""dense fetch {{source: in/model}}
        text corpus {{source: in/text.txt, {SPLITS}}}
        q quantize model=dense text=text {{{INT4}}}
        f quantize model=dense text=text {{scheme: fp8_e4m3, window_tokens: 64, windows: 8}}
        w quantize model=dense {{{INT8}}}"""
    result = place.run(place.recipe("r", steps, judge("q", "f", "w")))
    near(result, "q", within=0.05)
    near(result, "f", "w")
    steps = f"""dense fetch {{source: in/model}}
        text corpus {{source: in/text.txt, {SPLITS}}}
        q quantize model=dense text=text {{{INT4}, rotation: heads}}"""
    rotated = place.enginery("run", place.recipe("rotated", steps, judge("q")), "--json")
    if rotated.code:  # rotation is for decoders of the Llama family, as README.md says
        assert "gemma3_text" in rotated.err and "limit llama" in rotated.err
    else:
        near(held(rotated), "q", within=0.05)


def tied_but_differs(place: Place) -> None:
    """A head that was trained apart while the configuration still says tied: used, or refused with a way that works."""
    source = place.folder / "in"
    plain(source / "text.txt")
    model = llama()
    head = model.lm_head.weight.detach() + 0.1 * torch.randn(TOKENS, 64)
    apart = {key: one.clone() for key, one in model.state_dict().items()} | {"lm_head.weight": head}
    for name, tied in (("plain", False), ("model", True)):
        folder = saved(model, source / name, tie_word_embeddings=tied)
        stored(folder, apart)
    said = place.enginery(
        "run", place.recipe("a", f"dense fetch {{source: in/model}}\nq quantize model=dense {{{INT8}}}")
    )
    if said.code:
        remedy = f'Set "tie_word_embeddings": false in {source / "model" / "config.json"}.'
        assert said.busy_s < FIRST_S and remedy in said.err, said.err
        told(source / "model", tie_word_embeddings=False)
    near(place.quantized(INT8, "in/model", "in/plain"), "q")


def spurious_equal_head(place: Place) -> None:
    """A merge wrote the head again though it is the table: stored once, tied still."""
    source = place.folder / "in"
    plain(source / "text.txt")
    model = llama()
    saved(model, source / "plain")
    folder = saved(model, source / "model")
    stored(folder, model.state_dict())
    came = sum(one.stat().st_size for one in folder.glob("*.safetensors"))
    result = place.quantized("scheme: bf16", "in/model", "in/plain")
    near(result, "q")
    made = tensors(result.folder("q"))
    assert "lm_head.weight" not in made and config(result.folder("q"))["tie_word_embeddings"] is True
    table_bytes = TOKENS * 64 * 4
    assert sum(one.numel() * one.element_size() for one in made.values()) <= (came - table_bytes) / 2


def odd_shards(place: Place) -> None:
    """Two shards under names that nobody else gives, without metadata: the index says where everything is."""
    source = place.folder / "in"
    plain(source / "text.txt")
    model = llama()
    saved(model, source / "plain")
    folder = saved(model, source / "model")
    (folder / "model.safetensors").unlink()
    names = sorted(key for key in model.state_dict() if key != "lm_head.weight")
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        name = f"model.safetensors-{number:05d}-of-00002.safetensors"
        stored(folder, {key: model.state_dict()[key] for key in part}, name, bare=True)
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    near(place.quantized(INT8, "in/model", "in/plain"), "q")


def generation_config(place: Place) -> None:
    """Settings of generation that transformers would not save: carried on as they are."""
    source = place.folder / "in"
    plain(source / "text.txt")
    folder = saved(llama(), source / "model")
    given = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": [0, 3], "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(given | {"transformers_version": "4.36.0"}))
    result = place.quantized(INT4)
    near(result, "q", within=FOUR_BITS)
    carried = json.loads((result.folder("q") / "generation_config.json").read_text())
    assert carried == json.loads((folder / "generation_config.json").read_text())


def no_position_limit(place: Place) -> None:
    """BLOOM and Falcon name no length that they read: quantized and judged all the same."""
    source = place.folder / "in"
    plain(source / "text.txt")
    saved(small("Bloom", n_layer=2, n_head=4), source / "bloom")
    falcon = {"multi_query": True, "parallel_attn": True, "bias": False}
    saved(small("Falcon", **falcon), source / "falcon", max_position_embeddings=None)
    for name in ("bloom", "falcon"):
        assert "max_position_embeddings" not in config(source / name)
        near(place.quantized(KEPT, f"in/{name}", name=name), "q")


def mixture_of_experts(place: Place) -> None:
    """Experts that transformers holds as one tensor: rounded like the rest, or refused by name at once."""
    source = place.folder / "in"
    plain(source / "text.txt")
    common = {"num_key_value_heads": 2, "max_position_embeddings": 256}
    qwen = {"moe_intermediate_size": 32, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
    saved(small("Qwen3Moe", intermediate_size=128, **common, **qwen), source / "qwen")
    saved(small("Mixtral", intermediate_size=64, num_local_experts=4, **common), source / "mixtral")
    for name, params, share in (("qwen", INT8, 0.4), ("mixtral", "scheme: bf16", 0.51)):
        recipe = f"""dense fetch {{source: in/{name}}}
            text corpus {{source: in/text.txt, {SPLITS}}}
            q quantize model=dense {{{params}}}"""
        path = place.recipe(name, recipe, judge("q"))
        said = place.enginery("run", path, "--json")
        if said.code:
            assert name == "qwen", said.err  # 16 bits need not know of experts
            assert "expert" in said.err and said.busy_s < FIRST_S, f"{said.busy_s:.1f} s: {said.err}"
            continue
        result = place.run(path)
        near(result, "q")
        sizes = [result.step(step)["metrics"]["size_bytes"] for step in ("q", "dense")]
        assert sizes[0] <= share * sizes[1], "the experts are most of it"
