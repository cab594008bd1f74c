"""Rounded keys and values: numbers of a hand-written attention, the same with a cache and without, in every layout."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from stages.export import to_onnx
from stages.export.checks import expected, require_effect
from stages.export.stage import ExportParams, export
from stages.graphs import onnx_graph
from stages.graphs.parity import parity
from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.loading import load_model, load_tokenizer, save_model
from stages.models.layers import rounded_cache
from stages.models.layers.quantization_spec import annotate
from stages.models.text.windows import windows
from stages.quantize import cache_ranges
from stages.quantize.params import QuantizeParams
from stages.quantize.stage import quantize
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.conftest import sealer
from tests.engines import literal, one_block, token_windows
from tests.stages.models.families import FAMILIES, VOCABULARY, answers, family

FORMS = ("int8", "fp8_e4m3")
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "neox", "opt", "bert_decoder")
SHORT = {"windows": 4, "window_tokens": 64}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def ids_NT():
    return torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))


def by_numpy(x, scale, form):
    """Eight bits by another library."""
    if form == "int8":
        return np.clip(np.rint(x / np.float32(scale)), -128, 127) * np.float32(scale)
    inside = np.clip(x / np.float32(scale), -448, 448)
    return inside.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale)


@pytest.mark.parametrize("form", FORMS)
def test_rounding_is_that_of_numpy_and_changes_nothing_twice(form):
    x = torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(1))
    for scale in (0.013, 1 / 127, 0.5, 2.0**-12):
        once = rounded_cache.rounded(x, scale, form)
        assert np.array_equal(once.numpy(), by_numpy(x.numpy(), scale, form))
        assert torch.equal(rounded_cache.rounded(once, scale, form), once)
        assert not torch.equal(once, x)


def attention_by_hand(x_TH, module, config, round_key, round_value):
    """One layer of grouped attention with rotary positions, in numpy."""
    size, tokens = config.head_dim, len(x_TH)
    q, k, v = (x_TH @ getattr(module, f"{one}_proj").weight.detach().numpy().T for one in "qkv")
    angle = np.arange(tokens)[:, None] / config.rope_parameters["rope_theta"] ** (np.arange(0, size, 2) / size)
    cos, sin = np.cos(np.concatenate([angle, angle], 1)), np.sin(np.concatenate([angle, angle], 1))

    def turned(one):
        heads = one.reshape(tokens, -1, size).transpose(1, 0, 2)
        return heads * cos + np.concatenate([-heads[..., size // 2 :], heads[..., : size // 2]], -1) * sin

    q, k, v = turned(q), round_key(turned(k)), round_value(v.reshape(tokens, -1, size).transpose(1, 0, 2))
    group = len(q) // len(k)
    score = q @ k.repeat(group, 0).transpose(0, 2, 1) / np.sqrt(size)
    score[:, np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
    share = np.exp(score - score.max(-1, keepdims=True))
    out = (share / share.sum(-1, keepdims=True)) @ v.repeat(group, 0)
    return out.transpose(1, 0, 2).reshape(tokens, -1) @ module.o_proj.weight.detach().numpy().T


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("form", FORMS)
def test_attention_reads_keys_after_their_positions_and_values_rounded(root, ids_NT, form, base):
    model = load_model(family("llama", root))
    rows = cache_ranges.calibrated(model, ids_NT, form, search=False)
    rounded_cache.use(model, base)
    seen = {}
    module = model.model.layers[1].self_attn
    module.register_forward_hook(
        lambda _m, _a, kwargs, out: seen.update(x=kwargs["hidden_states"], y=out[0]), with_kwargs=True
    )
    answers(model)
    x_TH, y_TH = seen["x"][1].numpy().astype(np.float64), seen["y"][1].numpy()

    def near(name):
        return lambda one: by_numpy(one.astype(np.float32), rows[1][name], form)

    wanted = attention_by_hand(x_TH, module, model.config, near("key_scale"), near("value_scale"))
    plain = attention_by_hand(x_TH, module, model.config, lambda one: one, lambda one: one)
    assert np.abs(wanted - y_TH).max() < 2e-5
    assert np.abs(plain - y_TH).max() > 1e-4


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_of_any_family_answers_the_same_with_a_cache_and_loads_again(root, ids_NT, tmp_path, name):
    model = load_model(family(name, root))
    dense = answers(model)
    rows = cache_ranges.calibrated(model, ids_NT, "int8", search=True)
    found = answers(model)
    assert 0 < (found - dense).norm() < 0.1 * dense.norm()
    with rounded_cache.left_float(model):
        assert torch.equal(answers(model), dense)
    prompt = ids_NT[:, :5]
    with torch.no_grad():
        whole, parted = model(input_ids=ids_NT, use_cache=False).logits, []
        cache = None
        for ids_N1 in ids_NT.split(1, dim=1):
            said = model(input_ids=ids_N1, past_key_values=cache, use_cache=True)
            parted, cache = [*parted, said.logits], said.past_key_values
        with rounded_cache.left_float(model):
            plain = model(input_ids=ids_NT, use_cache=False).logits
        # Products of one row differ in the last digit, and a number between two steps may fall to either: few do.
        difference = (torch.cat(parted, 1) - whole).abs()
        assert difference.median() < 1e-5
        assert difference.mean() < 0.1 * (whole - plain).abs().mean()
        said = model.generate(
            prompt, max_new_tokens=10, do_sample=False, use_cache=True, eos_token_id=-1, pad_token_id=0
        )
        logits = model(input_ids=said, use_cache=False).logits[:, 4:-1]
    chosen = logits.gather(2, said[:, 5:, None])[..., 0]
    assert said.shape == (4, 15)
    assert (logits.amax(2) - chosen).max() < 0.02 * logits.std()
    annotate(model, rounded_cache.described(model), {})
    save_model(model, tmp_path / "a", like=family(name, root))
    again = load_model(tmp_path / "a")
    assert torch.equal(answers(again), found)
    assert cache_ranges.proven(tmp_path / "a", rows)["rounded_caches"] == len(rows) == 3
    save_model(again, tmp_path / "b", like=tmp_path / "a")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - set(DECODERS)))
def test_model_that_is_no_decoder_alone_is_refused(root, name):
    with pytest.raises(StageError, match="is no decoder alone"):
        rounded_cache.attentions(load_model(family(name, root)))


def test_attention_that_is_called_in_another_way_is_refused_by_its_block(root):
    model = load_model(family("llama", root))
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states.cumsum(1), None)
    with pytest.raises(StageError, match=r"model\.layers\.1 .*cannot be rounded; measured 0 calls") as refused:
        rounded_cache.attentions(model)
    assert "kv_cache: keep" in str(refused.value)


def peaks(model, ids_NT):
    with torch.no_grad():
        cache = model(input_ids=ids_NT, use_cache=True).past_key_values
    return [[float(one.abs().max()) for one in (layer.keys, layer.values)] for layer in cache.layers]


@pytest.mark.parametrize("form", FORMS)
def test_plain_ranges_reach_the_largest_cached_number_and_a_search_loses_no_more(root, ids_NT, form):
    model = load_model(family("llama", root))
    plain = cache_ranges.calibrated(load_model(family("llama", root)), ids_NT, form, search=False)
    top = 127 if form == "int8" else 448
    for row, pair in zip(plain, peaks(model, ids_NT), strict=True):
        found = [row["key_scale"] * top, row["value_scale"] * top]
        assert found == pytest.approx(pair, rel=0.02)  # measured on products in bfloat16
        assert (row["key_range"], row["value_range"]) == (1, 1)
    searched = cache_ranges.calibrated(model, ids_NT, form, search=True)
    assert sum(row["error"] for row in searched) < sum(row["error"] for row in plain)
    assert [row["layer"] for row in searched] == list(rounded_cache.modules(model))


@torch.no_grad()
def loss(model, folder, text):
    ids = windows(text, "test", load_tokenizer(folder), 128, most=8)
    return float(model(input_ids=ids, labels=ids).loss)


@pytest.fixture(scope="module")
def made(shared_store, dense, topics):
    """The tiny model with rounded caches beside rounded maps: scheme -> folder."""
    found = {}
    for scheme, form in (("int8_w8a8", "int8"), ("int4_weight_only", "fp8_e4m3"), ("bf16", "int8")):
        asked = SHORT | {"scheme": scheme, "kv_cache": form}
        found[scheme] = shared_store.checkout(
            sealer(shared_store)("quantize", asked, model=dense, text=topics).identity
        )
    return found


@pytest.mark.parametrize("scheme", ["int8_w8a8", "int4_weight_only", "bf16"])
def test_quantize_rounds_the_cache_beside_any_scheme_and_keeps_the_loss(made, scheme, shared_store, topics):
    folder, text = made[scheme], shared_store.checkout(topics)
    model = load_model(folder)
    with rounded_cache.left_float(model):
        before = loss(model, folder, text)
    after = loss(model, folder, text)
    assert after != before
    assert abs(after - before) < 0.008
    spec = json.loads((folder / "quantization.json").read_text())
    form = "fp8_e4m3" if "int4" in scheme else "int8"
    paths = [f"model.layers.{index}.self_attn" for index in range(6)]
    assert spec["kv_cache"] == {"format": form, "layers": paths}
    assert (spec["scheme"], bool(spec["layers"])) == (scheme, scheme != "bf16")
    rows = {row["layer"]: row for row in json.loads((folder / "layers.json").read_text())["layers"]}
    stored = load_file(folder / "model.safetensors")
    for path in paths:
        assert stored[f"{path}.k_scale"].dtype == stored[f"{path}.v_scale"].dtype == torch.float32
        assert float(stored[f"{path}.k_scale"]) == rows[path]["key_scale"] > 0
        assert 0 < rows[path]["error"] < 0.01
    assert sum(row["layer"].endswith("_proj") for row in rows.values()) == 42


def test_quantize_with_a_rounded_cache_is_quantized_for_every_later_stage(made, shared_store, topics, tmp_path):
    with pytest.raises(StageError, match="quantized already"):
        quantize(QuantizeParams(scheme="int8_weight_only"), {"model": made["bf16"]}, tmp_path / "out", Silent())


def test_quantize_of_the_cache_without_text_is_refused(shared_store, dense):
    for scheme in ("bf16", "int8_weight_only"):
        asked = {"scheme": scheme, "kv_cache": "int8", "search": "off"}
        with pytest.raises(StageError, match="kv_cache int8 needs an input 'text'"):
            sealer(shared_store)("quantize", asked, model=dense)


def test_quantize_of_the_cache_names_the_layer_whose_keys_are_not_finite(tiny, shared_store, topics, tmp_path):
    shutil.copytree(tiny, tmp_path / "hot")
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.weight"] *= 1e38
    save_file(tensors, tmp_path / "hot" / "model.safetensors", {"format": "pt"})
    inputs = {"model": tmp_path / "hot", "text": shared_store.checkout(topics)}
    with pytest.raises(StageError, match=r"the keys of model\.layers\.2\.self_attn hold a NaN"):
        quantize(QuantizeParams(**SHORT, scheme="bf16", kv_cache="int8"), inputs, tmp_path / "out", Silent())


@pytest.fixture(scope="module")
def cached_block(tiny, shared_store, topics, tmp_path_factory):
    """One block with a rounded cache: form -> checkpoint."""
    root = tmp_path_factory.mktemp("cached")
    one = one_block(tiny, root / "one")
    inputs = {"model": one, "text": shared_store.checkout(topics)}
    asked = {"int8": {"scheme": "int8_w8a8"}, "fp8_e4m3": {"scheme": "bf16"}}
    for form, how in asked.items():
        quantize(QuantizeParams(**SHORT, **how, kv_cache=form, search="off"), inputs, root / form, Silent())
    return {form: root / form for form in asked}


@pytest.mark.parametrize(("form", "opset"), [("int8", 23), ("int8", 21), ("fp8_e4m3", 23)])
def test_graph_rounds_keys_and_values_as_torch_does(cached_block, tmp_path, form, opset):
    (tmp_path / "graph").mkdir()
    metrics = export(ExportParams(opset=opset), {"model": cached_block[form]}, tmp_path / "graph", Silent())
    assert metrics["parity_logit_difference"] < 1e-3
    held = onnx_graph.held(onnx_graph.load(tmp_path / "graph" / "model.onnx"))
    model = load_model(cached_block[form])
    stored = load_file(cached_block[form] / "model.safetensors")
    wanted = [float(one) for name, one in stored.items() if name.endswith((".k_scale", ".v_scale"))]
    assert held.caches == Counter(wanted)
    assert len(wanted) == 2
    ids = token_windows(2, 40)
    found = literal(tmp_path / "graph" / "model.onnx", ids)
    with torch.no_grad():
        reference = model(input_ids=torch.from_numpy(ids)).logits.numpy()
        with rounded_cache.left_float(model):
            plain = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    # A number between two steps may fall to either, in the graph and in torch: most do not.
    assert np.abs(found - reference).mean() < 0.2 * np.abs(found - plain).mean()
    assert parity(ids, reference, found).logit_difference < 0.1


def test_graph_that_rounds_no_cache_is_refused(cached_block, tmp_path):
    model = load_model(cached_block["fp8_e4m3"])
    wanted = expected(model, token_windows(1, 16))
    assert wanted.caches.total() == 2
    written = onnx_graph.held(to_onnx.to_onnx(model, 23, "generate", token_windows(1, 16)))
    require_effect(written, wanted)
    with pytest.raises(StageError, match=r"does not round the keys and values.*measured 0 tensors; limit 2"):
        require_effect(replace(written, caches=Counter()), wanted)


@pytest.fixture(scope="module")
def packed(tiny, shared_store, topics, tmp_path_factory):
    """One block of FP8 maps with an FP8 cache, laid out for other engines."""
    root = tmp_path_factory.mktemp("packed")
    inputs = {"model": one_block(tiny, root / "one"), "text": shared_store.checkout(topics)}
    how = {"scheme": "fp8_e4m3", "kv_cache": "fp8_e4m3", "embedding": "keep", "search": "off"}
    for layout in ("compressed-tensors", "enginery"):
        quantize(QuantizeParams(**SHORT, **how, layout=layout), inputs, root / layout, Silent())
    return root


def test_layout_of_other_engines_names_the_cache_and_is_read_back(packed, tmp_path):
    folder = packed / "compressed-tensors"
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = config["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"]) == (8, "float", "tensor")
    assert (scheme["symmetric"], scheme["dynamic"]) == (True, False)
    stored, own = (load_file(packed / one / "model.safetensors") for one in ("compressed-tensors", "enginery"))
    for name in ("model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale"):
        assert stored[name].shape == (1,)
        assert float(stored[name]) == float(own[name])
    ids = torch.from_numpy(token_windows(2, 30))
    ours, theirs = (load_model(packed / one) for one in ("enginery", "compressed-tensors"))
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    save_model(theirs, tmp_path, like=folder, layout="compressed-tensors")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("change", [{"dynamic": True}, {"num_bits": 4}, {"strategy": "attn_head"}, {"type": None}])
def test_scheme_of_a_cache_that_is_not_ours_is_refused(packed, tmp_path, change):
    out = shutil.copytree(packed / "compressed-tensors", tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] |= change
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match=r"`kv_cache_scheme` .*not understood"):
        load_model(out)


def test_scale_that_is_missing_is_named(packed, tmp_path):
    out = shutil.copytree(packed / "compressed-tensors", tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    del stored["model.layers.0.self_attn.v_scale"]
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageError, match=re.escape("1 missing: model.layers.0.self_attn.v_scale")):
        load_model(out)


def test_layout_of_other_engines_holds_no_cache_of_integers(tiny, tmp_path):
    model = load_model(tiny)
    rounded_cache.put(model, "int8", {"model.layers.0.self_attn": (0.1, 0.1)})
    from tests.stages.models.checkpoint.test_compressed_tensors import put

    put(model, "model.layers.0.mlp.up_proj", "int8", None, None)
    with pytest.raises(StageError, match="no scales of such a cache; measured int8"):
        save_model(model, tmp_path, like=tiny, layout="compressed-tensors")
    assert anatomy.blocks(model)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2", "neox", "opt"])
def test_attention_token_by_token_answers_as_the_models_own_does(name, tmp_path):
    """Also where nothing is cached yet, and where several tokens come at once."""
    model, ids_NT = load_model(family(name, tmp_path)), torch.arange(3, 27).view(2, 12)
    with torch.no_grad(), rounded_cache.by(model, "eager"):
        expected_NTV = model(input_ids=ids_NT).logits
    cache, found = None, []
    with torch.no_grad(), rounded_cache.by(model, rounded_cache.STEPWISE):
        for part_NT in ids_NT.split([1, 1, 4, 1, 1, 4], dim=1):
            said = model(input_ids=part_NT, past_key_values=cache, use_cache=True)
            cache = said.past_key_values
            found.append(said.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected_NTV, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "extra",
    [
        {"model_type": "gemma2", "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "sliding_window": 4},
        {"model_type": "mistral", "sliding_window": 4},
    ],
)
def test_attention_token_by_token_keeps_soft_caps_and_sliding_windows(extra):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    asked = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, **sizes, **extra}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**asked)).eval()
    ids_NT, cache, found = torch.arange(3, 27).view(2, 12), None, []
    with torch.no_grad(), rounded_cache.by(model, "eager"):
        expected_NTV = model(input_ids=ids_NT, use_cache=False).logits
    with torch.no_grad(), rounded_cache.by(model, rounded_cache.STEPWISE):
        for one_N1 in ids_NT.split(1, dim=1):
            said = model(input_ids=one_N1, past_key_values=cache, use_cache=True)
            cache = said.past_key_values
            found.append(said.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected_NTV, atol=1e-5, rtol=1e-4)
