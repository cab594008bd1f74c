import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.files import dtypes
from stages.models.checkpoint.loading import load_model, load_tokenizer, save_model
from stages.models.layers.quantized_linear import QuantizedLinear, quantized_modules
from stages.models.text.windows import windows
from stages.quantize import plan
from stages.quantize.input_ranges import CUT
from stages.quantize.params import QuantizeParams
from stages.quantize.stage import quantize
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.conftest import sealer
from tests.engines import Hears
from tests.stages.models.families import FAMILIES, family
from tests.stages.models.grouped import grouped

SHORT = {"windows": 8, "window_tokens": 128}
SCHEMES = ["int8_w8a8", "int8_weight_only", "fp8_e4m3", "int4_weight_only", "nvfp4", "mxfp4"]


@pytest.fixture(scope="session")
def group(shared_store, tiny, tmp_path_factory):
    """Fingerprint of a checkpoint with shared bases and a tied weight."""
    folder = grouped(tiny, tmp_path_factory.mktemp("grouped") / "model")
    return sealer(shared_store)("fetch", {"source": folder.as_uri()}).identity


@pytest.fixture(scope="session")
def made(shared_store, dense, topics):
    """The dense model in each scheme: name -> folder and metrics."""
    found = {}
    for scheme in SCHEMES:
        outcome = sealer(shared_store)("quantize", SHORT | {"scheme": scheme}, model=dense, text=topics)
        found[scheme] = (shared_store.checkout(outcome.identity), outcome.manifest.metrics)
    return found


@torch.no_grad()
def loss(folder, text, **more):
    model = load_model(folder, **more)
    ids_NT = windows(text, "test", load_tokenizer(folder), 128, most=24)
    return float(model(input_ids=ids_NT, labels=ids_NT).loss)


@pytest.mark.parametrize(
    ("scheme", "most"),
    [
        ("int8_w8a8", 0.006),
        ("int8_weight_only", 0.002),
        ("fp8_e4m3", 0.006),
        ("int4_weight_only", 0.02),
        ("nvfp4", 0.02),
        ("mxfp4", 0.03),
    ],
)
def test_quantize_keeps_the_loss_on_text_it_never_saw(made, scheme, most, shared_store, dense, topics):
    text = shared_store.checkout(topics)
    before, after = loss(shared_store.checkout(dense), text), loss(made[scheme][0], text)
    assert abs(after - before) < most
    assert after != before


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize_writes_integers_and_no_float_copy(made, scheme):
    folder, metrics = made[scheme]
    types = dtypes(folder)
    integers = [name for name, kind in types.items() if kind in ("I8", "U8", "F8_E4M3") and "scale" not in name]
    tensors = load_file(folder / "model.safetensors")
    assert len(integers) == metrics["integer_matrices"] == 6 * 7 + 1  # the tied table stands once
    assert all(tensors[name].ndim < 2 or "scale" in name for name, kind in types.items() if kind in ("F32", "F16"))
    assert "lm_head.weight" not in types or "model.embed_tokens.weight" not in types
    assert metrics["size_bytes"] == (folder / "model.safetensors").stat().st_size
    assert metrics["size_bytes"] < metrics["size_bytes_before"] * (
        0.2 if "4" in scheme and scheme != "fp8_e4m3" else 0.3
    )


def test_quantize_loads_again_with_the_table_shared_and_inputs_rounded(made):
    model = load_model(made["int8_w8a8"][0])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    maps = [m for m in quantized_modules(model).values() if isinstance(m, QuantizedLinear) and m is not model.lm_head]
    rounded = [m for m in maps if m.input_scale is not None]
    assert len(maps) == 42
    assert len(maps) - len(rounded) == made["int8_w8a8"][1]["kept_maps"] > 0


@pytest.mark.parametrize("scheme", ["int8_w8a8", "fp8_e4m3"])
def test_quantize_leaves_the_worst_inputs_in_float_and_says_why(made, scheme):
    layers = json.loads((made[scheme][0] / "quantization.json").read_text())["layers"]
    maps = {name: entry for name, entry in layers.items() if "note" in entry}
    sites = {}
    for entry in maps.values():
        sites.setdefault(json.dumps(entry["note"]), []).append(entry)
    sizes = {note: sum(e["shape"][0] * e["shape"][1] for e in some) for note, some in sites.items()}
    need = {note: json.loads(note)["input_loss_nats"] / size for note, size in sizes.items()}
    cut = {note for note in sites if scheme == "int8_w8a8" and json.loads(note)["input_error"] > CUT}
    kept = {note for note in sites if "kept" in json.loads(note)}
    total = sum(sizes.values())
    assert max((note for note in cut or sites if sizes[note] <= 0.07 * total), key=need.get) in kept
    assert all(entry["bits"] == 8 and entry["input"] == "float" for note in kept for entry in sites[note])
    assert 0 < sum(sizes[note] for note in kept) <= 0.07 * total


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize_explains_each_map(made, scheme):
    rows = json.loads((made[scheme][0] / "layers.json").read_text())["layers"]
    layers = json.loads((made[scheme][0] / "quantization.json").read_text())["layers"]
    assert {row["layer"] for row in rows} == layers.keys() - {"lm_head", "model.embed_tokens"}
    assert all(row["format"] == layers[row["layer"]]["format"] for row in rows)
    if scheme != "int8_weight_only":
        # Fitted to the dense outputs and rounded by columns, the maps lose less than rounded to nearest.
        assert sum(row["error"] for row in rows) < 0.8 * sum(row["error_nearest"] for row in rows)


@pytest.fixture(scope="module")
def bert(tiny, tmp_path_factory):
    """A classifier of another type, with a tokenizer."""
    root = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    settings = FAMILIES["bert_classes"][2] | {"vocab_size": 768, "max_position_embeddings": 128}
    BertForSequenceClassification(BertConfig(**settings)).save_pretrained(root / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "model" / name).write_bytes((tiny / name).read_bytes())
    return root / "model"


def test_inputs_of_a_type_whose_ranges_cannot_be_moved_are_rounded_by_their_largest(
    bert, shared_store, topics, tmp_path
):
    text, heard = shared_store.checkout(topics), Hears()
    params = QuantizeParams(**SHORT, scheme="int8_w8a8", observer="minmax", keep=0)
    quantize(params, {"model": bert, "text": text}, tmp_path / "out", heard)
    assert [note for note in heard.notes if "no range is moved in models of type bert" in note]
    ids_NT = windows(text, "calibrate", load_tokenizer(bert), 128, most=8)
    plain, peaks = BertForSequenceClassification.from_pretrained(bert), {}
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _m, args, name=name: peaks.update({name: float(args[0].abs().max())})
            )
    with torch.no_grad():
        wanted = plain(input_ids=ids_NT).logits
        made = load_model(tmp_path / "out")
        found = made(input_ids=ids_NT).logits
    maps = {name: m for name, m in quantized_modules(made).items() if isinstance(m, QuantizedLinear)}
    assert len(maps) == 18
    first = "bert.encoder.layer.0.attention.self.query"
    assert float(maps[first].input_scale) == pytest.approx(peaks[first] / 127, rel=0.01)  # seen in bfloat16
    assert all(m.input_scale is not None for m in maps.values())
    assert (found - wanted).abs().max() < 0.2 * wanted.std()


def test_ranges_that_would_have_to_move_are_refused_by_name(bert, shared_store, topics, tmp_path):
    params = QuantizeParams(**SHORT, scheme="int8_w8a8", smoothing=0.5)
    with pytest.raises(StageError, match=r"type 'bert'.*measured smoothing: 0.5.*Take `smoothing` out"):
        quantize(params, {"model": bert, "text": shared_store.checkout(topics)}, tmp_path, Hears())
    params = QuantizeParams(scheme="int8_w8a8", observer="mse")
    plan.refuse_moved(params, load_model(bert))
    for name in ("t5", "albert"):
        with pytest.raises(StageError, match=r"rounded by their largest.*observer: mse.*Take `observer` out"):
            plan.refuse_moved(params, load_model(family(name, tmp_path)))


@pytest.mark.parametrize("scheme", ["int8_w8a8", "fp8_e4m3"])
def test_inputs_that_lose_most_stay_float_in_models_of_any_type(bert, shared_store, topics, tmp_path, scheme):
    inputs = {"model": bert, "text": shared_store.checkout(topics)}
    params = QuantizeParams(**SHORT, scheme=scheme, keep=0.2)
    quantize(params, inputs, tmp_path / "out", Silent())
    kept = {
        name: one
        for name, one in quantized_modules(load_model(tmp_path / "out")).items()
        if isinstance(one, QuantizedLinear)
    }
    weights = {name: one.in_features * one.out_features for name, one in kept.items()}
    float_inputs = sum(weights[name] for name, one in kept.items() if one.input_scale is None)
    assert 0 < float_inputs <= 0.2 * sum(weights.values())
    layers = json.loads((tmp_path / "out" / "quantization.json").read_text())["layers"]
    noted = {name for name, one in layers.items() if "kept" in one.get("note", {})}
    assert noted == {name for name, one in kept.items() if one.input_scale is None}


@pytest.fixture(scope="session")
def spiky(tiny, tmp_path_factory):
    """The tiny model with channels of huge activations and small weights: the same function, hard to round."""
    model = load_model(tiny)
    with torch.no_grad():
        for block in anatomy.blocks(model):
            maps, norms = anatomy.projections(block), anatomy.norms(block)
            maps["up"].weight[7] *= 50
            maps["down"].weight[:, 7] /= 50
            norms["mlp"].weight[3] *= 50
            maps["gate"].weight[:, 3] /= 50
            maps["up"].weight[:, 3] /= 50
    folder = tmp_path_factory.mktemp("spiky") / "model"
    save_model(model, folder, like=tiny)
    return folder


def test_quantize_search_moves_outliers_that_plain_ranges_drown_in(spiky, shared_store, topics, tmp_path):
    inputs = {"model": spiky, "text": shared_store.checkout(topics)}
    divergences = {}
    for search in ("auto", "off"):
        params = QuantizeParams(**SHORT, keep=0, search=search, embedding="keep")
        quantize(params, inputs, tmp_path / search, Silent())
        divergences[search] = kl(spiky, tmp_path / search, inputs["text"])
    assert divergences["auto"] < 0.05 * divergences["off"]


def test_quantize_given_strength_is_the_strength_used(shared_store, dense, topics, tmp_path):
    inputs = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    quantize(QuantizeParams(**SHORT, smoothing=0.4, keep=0), inputs, tmp_path / "out", Silent())
    layers = json.loads((tmp_path / "out" / "quantization.json").read_text())["layers"]
    notes = [entry["note"] for entry in layers.values() if "note" in entry]
    assert {note["smoothing"] for note in notes} == {0.4}
    assert len({note["range"] for note in notes}) > 1  # ranges are searched layer by layer


@torch.no_grad()
def kl(reference, folder, text):
    ids_NT = windows(text, "test", load_tokenizer(reference), 128, most=16)
    p, q = (load_model(one)(input_ids=ids_NT).logits.log_softmax(-1) for one in (reference, folder))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize_keeps_bases_and_ties_shared(shared_store, group, topics, scheme):
    outcome = sealer(shared_store)("quantize", SHORT | {"scheme": scheme}, model=group, text=topics)
    folder = shared_store.checkout(outcome.identity)
    model = load_model(folder)
    layers = model.model.layers
    for role in ("gate_proj", "down_proj"):
        first, second = getattr(layers[1].mlp, role), getattr(layers[2].mlp, role)
        assert first.basis is second.basis
        assert isinstance(first.basis, QuantizedLinear)
        assert isinstance(first.coefficient, QuantizedLinear)
    assert layers[3].self_attn.v_proj.weight is layers[4].self_attn.v_proj.weight
    # Two bases and four coefficients stand for four maps, two v are one, and the table.
    assert outcome.manifest.metrics["integer_matrices"] == 42 - 4 + 2 + 4 - 1 + 1
    text = shared_store.checkout(topics)
    before = loss(shared_store.checkout(group), text)
    assert abs(loss(folder, text) - before) < (0.02 if "8" in scheme else 0.08)


def test_quantize_keeping_the_table_leaves_it_float(shared_store, dense, tmp_path):
    params = QuantizeParams(scheme="int8_weight_only", embedding="keep")
    metrics = quantize(params, {"model": shared_store.checkout(dense)}, tmp_path / "out", Silent())
    assert metrics["integer_matrices"] == 42
    assert dtypes(tmp_path / "out")["model.embed_tokens.weight"] == "F32"


def test_quantize_twice_gives_the_same_bytes(shared_store, made, dense, topics, tmp_path):
    inputs = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    quantize(QuantizeParams(**SHORT), inputs, tmp_path / "again", Silent())
    for name in ("model.safetensors", "quantization.json"):
        assert (tmp_path / "again" / name).read_bytes() == (made["int8_w8a8"][0] / name).read_bytes()


def test_quantize_again_hits(shared_store, made, dense, topics):
    assert sealer(shared_store)("quantize", SHORT, model=dense, text=topics).cached


def refused(shared_store, match, params, **inputs):
    sealed = sorted(name for name, _ in shared_store.manifests())
    with pytest.raises(StageError, match=match):
        sealer(shared_store)("quantize", params, **inputs)
    assert sorted(name for name, _ in shared_store.manifests()) == sealed


def test_quantize_block_that_does_not_divide_is_refused_with_those_that_do(shared_store, dense, topics):
    refused(
        shared_store, r"128.*64, 192 inputs.*2, 4, 8, 16, 32, 64", {"scheme": "int4_weight_only", "block": 128},
        model=dense, text=topics,
    )  # fmt: skip


def test_quantize_of_a_quantized_checkpoint_is_refused(shared_store, dense):
    done = sealer(shared_store)("quantize", {"scheme": "int8_weight_only"}, model=dense).identity
    refused(shared_store, "quantized already", {"scheme": "int8_weight_only"}, model=done)


def test_quantize_activations_without_text_is_refused(shared_store, dense):
    refused(shared_store, "needs an input 'text'", {}, model=dense)


def test_quantize_that_wrote_float_weights_is_refused(shared_store, dense, tmp_path, monkeypatch):
    import stages.quantize.rounding

    def lie(model, rounding, folder):
        return [{"layer": "model.layers.0.mlp.up_proj", "error": 0.0}]

    monkeypatch.setattr(stages.quantize.rounding, "plainly", lie)
    params = QuantizeParams(scheme="int8_weight_only")
    with pytest.raises(StageError, match=r"not quantized.*float copies"):
        quantize(params, {"model": shared_store.checkout(dense)}, tmp_path / "out", Silent())


class Cut(Silent):
    """Ends the run after some blocks, as a kill would: what is on disk stays as it is."""

    def advanced(self, done, total):
        if done == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("scheme", ["int8_w8a8", "int4_weight_only"])
def test_quantize_cut_off_goes_on_after_its_last_block_to_the_same_bytes(
    made, scheme, shared_store, dense, topics, tmp_path, monkeypatch
):
    import stages.models.blockwise.compress

    monkeypatch.setattr(stages.models.blockwise.compress, "SAVE_EVERY_S", 0.0)
    inputs = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    params, out, notes = QuantizeParams(**SHORT, scheme=scheme), tmp_path / "out", []
    with pytest.raises(KeyboardInterrupt):
        quantize(params, inputs, out, Cut())
    again = Silent()
    monkeypatch.setattr(again, "note", notes.append, raising=False)
    quantize(params, inputs, out, again)
    assert any("after block 3 of 6" in note for note in notes)
    for name in ("model.safetensors", "quantization.json", "layers.json"):
        assert (out / name).read_bytes() == (made[scheme][0] / name).read_bytes()


def test_quantize_of_a_nan_activation_names_the_layer(tiny, shared_store, topics, tmp_path):
    model = load_model(tiny)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1e38)
    save_model(model, tmp_path / "hot", like=tiny)
    inputs = {"model": tmp_path / "hot", "text": shared_store.checkout(topics)}
    with pytest.raises(StageError, match=r"layers\.2.*NaN or an infinity"):
        quantize(QuantizeParams(**SHORT, scheme="int4_weight_only"), inputs, tmp_path / "out", Silent())


def test_quantize_with_less_text_than_a_window_is_refused(shared_store, dense, tmp_path):
    (tmp_path / "short.txt").write_text("Too few words for a window.")
    params = {"source": str(tmp_path / "short.txt"), "splits": {"calibrate": 1.0}}
    text = sealer(shared_store)("corpus", params).identity
    refused(shared_store, "shorter than one window", {"window_tokens": 512}, model=dense, text=text)


def test_quantize_four_bits_without_text_rounds_to_nearest_when_asked_to(shared_store, dense, tmp_path):
    metrics = quantize(
        QuantizeParams(scheme="nvfp4", search="off"),
        {"model": shared_store.checkout(dense)},
        tmp_path / "out",
        Silent(),
    )
    assert metrics["quantized_maps"] == 42
    refused(shared_store, "or set `search: off`", {"scheme": "nvfp4"}, model=dense)


def test_quantize_layers_and_skip_choose_the_maps(shared_store, dense, topics):
    how = SHORT | {"scheme": "int4_weight_only", "block": 8, "layers": ("*.mlp.*", "*.q_proj"), "skip": ("*.0.*",)}
    done = sealer(shared_store)("quantize", how, model=dense, text=topics)
    layers = json.loads((shared_store.checkout(done.identity) / "quantization.json").read_text())["layers"]
    wanted = [f"mlp.{name}_proj" for name in ("gate", "up", "down")] + ["self_attn.q_proj"]
    expected = {f"model.layers.{index}.{name}" for index in range(1, 6) for name in wanted}
    assert layers.keys() - {"lm_head", "model.embed_tokens"} == expected


@pytest.mark.parametrize("scheme", ["int8_w8a8", "fp8_e4m3"])
def test_quantize_skips_a_map_of_a_site_whose_others_have_rounded_inputs(shared_store, dense, topics, scheme):
    how = SHORT | {"scheme": scheme, "skip": ("*.q_proj",), "keep": 0}
    model = load_model(shared_store.checkout(sealer(shared_store)("quantize", how, model=dense, text=topics).identity))
    attention = model.model.layers[2].self_attn
    assert isinstance(attention.q_proj, torch.nn.Linear)
    assert attention.k_proj.input_scale is not None
    assert torch.equal(attention.k_proj.input_scale, attention.v_proj.input_scale)


@pytest.mark.parametrize("field", ["layers", "skip"])
def test_quantize_pattern_that_matches_nothing_is_refused_by_name(shared_store, dense, topics, field):
    how = SHORT | {"scheme": "int4_weight_only", "block": 8, field: ("*.mlp.*", "*.ffn.*")}
    with pytest.raises(StageError, match=rf"'\*\.ffn\.\*' of `{field}` matches no layer; .*model\.layers\.0"):
        sealer(shared_store)("quantize", how, model=dense, text=topics)


def test_quantize_that_skips_everything_is_refused(shared_store, dense, topics):
    with pytest.raises(StageError, match="leave nothing to do"):
        sealer(shared_store)("quantize", SHORT | {"skip": ("*",)}, model=dense, text=topics)


def test_observer_that_the_search_alone_asks_is_refused_without_it():
    with pytest.raises(ValidationError, match="`search: off` takes the largest input"):
        QuantizeParams(search="off", observer="mse")


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "entropy"])
def test_quantize_observers_choose_different_ranges_that_all_serve(shared_store, dense, topics, made, observer):
    done = sealer(shared_store)("quantize", SHORT | {"observer": observer}, model=dense, text=topics)
    found = json.loads((shared_store.checkout(done.identity) / "quantization.json").read_text())["layers"]
    ranges = [entry["note"]["range"] for entry in found.values() if "range" in entry.get("note", {})]
    assert all(0 < one <= 1 for one in ranges)
    assert (min(ranges) == 1) == (observer == "minmax")
    assert len({round(one, 3) for one in ranges}) > 1 or observer == "minmax"


def test_quantize_fp8_without_a_search_takes_the_plain_range_everywhere(shared_store, dense, topics):
    how = SHORT | {"scheme": "fp8_e4m3", "search": "off"}
    done = sealer(shared_store)("quantize", how, model=dense, text=topics)
    assert done.manifest.metrics["kept_maps"] == 0
    layers = json.loads((shared_store.checkout(done.identity) / "quantization.json").read_text())["layers"]
    assert {entry["input"] for name, entry in layers.items() if ".layers." in name} == {"fp8_e4m3"}
