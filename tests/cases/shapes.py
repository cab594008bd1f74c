"""Shapes, lengths and heads that models have: cut, rounded, exported and judged without a surprise at the end."""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedModel

from tests.cases.checkpoints import FOUR_BITS, INT4, INT8, config, near, tensors
from tests.cases.inputs import END, TOKENS, llama, plain, saved, small, told
from tests.cases.place import FIRST_S, SPLITS, WINDOWS, Place, Result, judge

FIELDS = "splits: {calibrate: 0.2, train: 0.3, validate: 0.2, test: 0.3}"
HEALED = "tokens: 4096, window_tokens: 64, batch_windows: 4, check_every_steps: 4, check_windows: 2"


def pipeline(model: str = "in/model") -> str:
    """Every stage, one after the other."""
    return f"""dense fetch {{source: '{model}'}}
        text corpus {{source: in/text.txt, {FIELDS}}}
        shared share model=dense text=text {{method: basis, keep: 0.95, {WINDOWS}}}
        pruned prune model=shared text=text {{method: channels, keep: 0.9, {WINDOWS}}}
        healed recover model=pruned teacher=dense text=text {{{HEALED}}}
        int8 quantize model=healed text=text {{scheme: int8_w8a8, {WINDOWS}}}
        graph export model=int8 {{parity_tokens: 64}}
        cpu compile graph=graph {{backend: onnxruntime}}"""


def engine_answers_as_its_checkpoint(result: Result, checkpoint: str = "int8", engine: str = "cpu") -> None:
    """Hold that ONNX Runtime and torch measure the same, but for sums in another order before inputs are rounded."""
    torchs, onnx = (result.measured("perplexity", name) for name in (checkpoint, engine))
    assert abs(onnx / torchs - 1) < 0.01, (torchs, onnx)


def vocabulary_padded(place: Place) -> None:
    """A table with more rows than the tokenizer has words: they stay through the whole pipeline."""
    source = place.folder / "in"
    plain(source / "text.txt")
    saved(llama(vocab_size=TOKENS + 64, tie_word_embeddings=False), source / "model", "bfloat16")
    held = "gates: [{measure: kl_divergence, at_most: 100}]\nregister: {model: case, alias: champion}"
    result = place.run(place.recipe("r", pipeline(), judge("int8", "cpu"), held))
    assert result.data["model"]["version"] == "1"
    engine_answers_as_its_checkpoint(result)
    folder = result.folder("int8")
    assert config(folder)["vocab_size"] == TOKENS + 64
    tables = [one.shape for name, one in tensors(folder).items() if "embed" in name and one.dim() == 2]
    assert TOKENS + 64 in {shape[0] for shape in tables}


def dead_channels(place: Place) -> None:
    """Channels that no text wakes, and one window to calibrate on: every method that solves for weights gets by."""
    source = place.folder / "in"
    plain(source / "text.txt")
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:8] = layer.post_attention_layernorm.weight[:8] = 0
            layer.mlp.up_proj.weight[:24] = 0
    saved(model, source / "model")
    one = "windows: 1, window_tokens: 64"
    steps = f"""dense fetch {{source: in/model}}
        text corpus {{source: in/text.txt, {SPLITS}}}
        q quantize model=dense text=text {{{INT4}, windows: 1}}
        sp prune model=dense text=text {{method: sparsegpt, keep: 0.5, {one}}}
        sh share model=dense text=text {{method: basis, keep: 0.9, {one}}}
        fa factorize model=dense text=text {{{one}}}"""
    result = place.run(place.recipe("r", steps, judge("q", "sp", "sh", "fa", windows="windows: 4, window_tokens: 64")))
    near(result, "q", within=FOUR_BITS)
    for name, most in (("sp", 1.0), ("sh", 1.0), ("fa", 1.0)):
        assert 0 < result.measured("kl_divergence", name) < most, name
    assert 0.5 <= result.step("sp")["metrics"]["sparsity"] < 0.51


def group_does_not_divide(place: Place) -> None:
    """A width that INT4's blocks do not divide: rounded in time, or told by `plan` with a way that works."""
    source = place.folder / "in"
    plain(source / "text.txt")
    saved(llama(intermediate_size=192), source / "model")
    steps = f"""dense fetch {{source: in/model}}
        text corpus {{source: in/text.txt, {SPLITS}}}
        pruned prune model=dense text=text {{method: channels, keep: 0.8, {WINDOWS}}}
        q quantize model=pruned text=text {{scheme: int4_weight_only, window_tokens: 64}}"""
    recipe = place.recipe("r", steps, judge("q"))
    said = place.enginery("plan", recipe)
    way: list[str] = []
    if said.code:
        assert said.busy_s < FIRST_S, said.err
        (setting,) = re.findall(r"--set (steps\.[\w.]+=[^\s`,;]+)", said.err)[:1]
        way = ["--set", setting]
    result = place.run(recipe, *way)
    metrics = result.step("q")["metrics"]
    assert metrics["quantized_maps"] == 14 and metrics["kept_maps"] == 0
    assert result.measured("kl_divergence", "q") < 1


def sliding_window(place: Place) -> None:
    """A window of attention that is shorter than the text: the graph keeps it."""
    source = place.folder / "in"
    plain(source / "text.txt")
    model = llama(kind="Mistral", sliding_window=32, max_position_embeddings=256)
    assert _without_its_window(model) > 0.05, "a graph that forgot the window would show"
    saved(model, source / "model")
    steps = f"""dense fetch {{source: in/model}}
        text corpus {{source: in/text.txt, {SPLITS}}}
        graph export model=dense {{parity_tokens: 64}}
        cpu compile graph=graph {{backend: onnxruntime}}
        pruned prune model=dense text=text {{method: channels, keep: 0.9, {WINDOWS}}}
        int8 quantize model=pruned text=text {{scheme: int8_w8a8, {WINDOWS}}}
        graph8 export model=int8 {{parity_tokens: 64}}
        cpu8 compile graph=graph8 {{backend: onnxruntime}}"""
    recipe = place.recipe("r", steps, judge("cpu", "int8", "cpu8"))
    assert place.enginery("plan", recipe).code == 0
    result = place.run(recipe)
    near(result, "cpu", within=1e-4)
    engine_answers_as_its_checkpoint(result, "int8", "cpu8")


def _without_its_window(model: PreTrainedModel) -> float:
    """KL divergence to the same model whose attention sees everything."""
    from transformers import AutoModelForCausalLM

    wide = type(model.config)(**{**model.config.to_dict(), "sliding_window": None})
    other = AutoModelForCausalLM.from_config(wide).eval()
    other.load_state_dict(model.state_dict())
    ids = torch.randint(4, TOKENS, (2, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        here, there = (one(input_ids=ids).logits.log_softmax(-1) for one in (model, other))
    return float((here.exp() * (here - there)).sum(-1).mean())


def classifiers(place: Place) -> None:
    """A classifier and a reward model: rounded and exported with their own heads, judged by what they answer."""
    source = place.folder / "in"
    plain(source / "text.txt")
    labels = {0: "neg", 1: "neu", 2: "pos"}
    named = {"num_labels": 3, "id2label": labels, "label2id": {name: number for number, name in labels.items()}}
    sizes = {"intermediate_size": 128, "max_position_embeddings": 128}
    saved(small("Bert", "ForSequenceClassification", **sizes, **named), source / "model")
    saved(llama("ForSequenceClassification", num_labels=1), source / "reward")
    result = place.quantized(INT8)
    kept = config(result.folder("q"))
    assert kept["id2label"] == {str(number): name for number, name in labels.items()}
    assert kept["architectures"] == ["BertForSequenceClassification"]
    _answers(result, "q")
    steps = f"""dense fetch {{source: in/reward}}
        text corpus {{source: in/text.txt, {FIELDS}}}
        pruned prune model=dense text=text {{method: channels, keep: 0.9, {WINDOWS}}}
        int8 quantize model=pruned text=text {{scheme: int8_w8a8, {WINDOWS}}}
        graph export model=int8 {{parity_tokens: 64}}
        cpu compile graph=graph {{backend: onnxruntime}}"""
    result = place.run(place.recipe("s", steps, judge("int8", "cpu")))
    assert config(result.folder("int8"))["architectures"] == ["LlamaForSequenceClassification"]
    _answers(result, "int8", "cpu")


def _answers(result: Result, *artifacts: str) -> None:
    """Hold that artifacts are measured by what they answer, never by a next word."""
    for name in artifacts:
        metrics = result.step(f"validate-{name}-text")["metrics"]
        assert "perplexity" not in metrics and set(metrics) - {"size_bytes", "tokens", "documents"}, metrics
        assert all(value == value and abs(value) != float("inf") for value in metrics.values())
        assert metrics.get("top1_agreement", 1) > 0.9 and metrics.get("kl_divergence", 0) < 0.05, metrics


def position_limit(place: Place) -> None:
    """Models that read 128 tokens under defaults of 512: windows as long as the model reads, and it is said."""
    source = place.folder / "in"
    plain(source / "text.txt")
    saved(small("GPT2", "LMHeadModel", n_positions=128, bos_token_id=END), source / "gpt2")
    saved(llama(max_position_embeddings=128), source / "llama")
    for name, params in (("gpt2", "scheme: int4_weight_only, block: 16"), ("llama", "scheme: int8_w8a8")):
        steps = f"""dense fetch {{source: in/{name}}}
            text corpus {{source: in/text.txt, {SPLITS}}}
            q quantize model=dense text=text {{{params}}}"""
        result = place.run(place.recipe(name, steps, judge("q", windows="windows: 4")))
        near(result, "q", within=FOUR_BITS)
        assert result.step("validate-q-text")["metrics"]["tokens"] == 4 * 127
        assert "128" in result.said.err, "nobody said that windows are shorter than asked"


def sixteen_bits_grow(place: Place) -> None:
    """A model of 16 bits, made smaller: the folder is no larger than what came."""
    source = place.folder / "in"
    plain(source / "text.txt")
    saved(llama(), source / "model", "bfloat16")
    steps = f"""dense fetch {{source: in/model}}
        text corpus {{source: in/text.txt, {SPLITS}}}
        pruned prune model=dense text=text {{method: channels, keep: 0.8, {WINDOWS}}}"""
    gate = "gates:\n  - {measure: size_bytes, against: dense, at_most: 1.0}"
    result = place.run(place.recipe("r", steps, judge("pruned"), gate))
    (held,) = result.data["gates"]
    assert result.data["verdict"] == "passed" and held["passed"] and held["measured"] < 1
    assert {one.dtype for one in tensors(result.folder("pruned")).values()} == {torch.bfloat16}
    assert result.measured("kl_divergence", "pruned") < 1


def grouped_heads(place: Place) -> None:
    """Three query heads to a key-value head: groups go whole, and the graph has the heads that are left."""
    source = place.folder / "in"
    plain(source / "text.txt")
    saved(
        llama(num_attention_heads=12, num_key_value_heads=4, hidden_size=96, head_dim=8), source / "model", "bfloat16"
    )
    steps = f"""dense fetch {{source: in/model}}
        text corpus {{source: in/text.txt, {SPLITS}}}
        pruned prune model=dense text=text {{method: heads, keep: 0.9, {WINDOWS}}}
        graph export model=pruned {{parity_tokens: 64}}
        cpu compile graph=graph {{backend: onnxruntime}}"""
    result = place.run(place.recipe("r", steps, judge("pruned", "cpu")))
    left = config(result.folder("pruned"))
    assert left["num_attention_heads"] == 3 * left["num_key_value_heads"] < 12  # type: ignore[operator]
    assert (
        result.step("pruned")["metrics"]["block_parameters"]
        < 0.9 * result.step("pruned")["metrics"]["block_parameters_before"]
    )
    engine_answers_as_its_checkpoint(result, "pruned")


def long_ropes(place: Place) -> None:
    """Qwen3 with yarn, and Llama 3.1's rope, as their files spell it: the whole pipeline; ONNX answers as torch."""
    source = place.folder / "in"
    plain(source / "text.txt")
    saved(llama(kind="Qwen3", head_dim=32), source / "qwen3", "bfloat16")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    told(source / "qwen3", rope_parameters=None, rope_theta=1e6, rope_scaling=yarn)
    saved(llama(), source / "llama31", "bfloat16")
    bands = {"high_freq_factor": 4.0, "low_freq_factor": 1.0, "factor": 8.0}
    stretched = {"rope_type": "llama3", "original_max_position_embeddings": 128} | bands
    told(source / "llama31", rope_parameters=None, rope_theta=5e5, rope_scaling=stretched)
    for name in ("qwen3", "llama31"):
        result = place.run(place.recipe(name, pipeline(f"in/{name}"), judge("int8", "cpu")))
        engine_answers_as_its_checkpoint(result)
        assert result.measured("kl_divergence", "cpu") < 1
