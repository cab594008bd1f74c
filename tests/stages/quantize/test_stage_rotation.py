"""quantize with `rotation`: what was turned stands in the bytes and in the tables, and `auto` turns where it helps."""

import json

import pytest
import torch

from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.files import dtypes
from stages.models.checkpoint.loading import load_model, load_tokenizer, save_model
from stages.models.text.windows import windows
from stages.quantize import rotation
from stages.quantize.params import QuantizeParams
from stages.quantize.rounding import Precision, nearest
from stages.quantize.stage import quantize
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.conftest import sealer

SHORT = {"windows": 4, "window_tokens": 128}


@torch.no_grad()
def loss(folder, text):
    model = load_model(folder)
    ids_NT = windows(text, "test", load_tokenizer(folder), 128, most=24)
    return float(model(input_ids=ids_NT, labels=ids_NT).loss)


def distance(one, other):
    return float((one - other.detach()).norm() / other.detach().norm())


def tables(folder):
    rows = json.loads((folder / "layers.json").read_text())["layers"]
    layers = json.loads((folder / "quantization.json").read_text())["layers"]
    return {row["layer"]: row for row in rows}, layers


@pytest.mark.parametrize("scheme", ["int8_w8a8", "int8_weight_only", "fp8_e4m3", "int4_weight_only"])
@pytest.mark.parametrize("how", ["heads", "stream"])
def test_quantize_rotated_keeps_the_loss_and_holds_the_turned_weights(
    how, scheme, shared_store, dense, topics, tmp_path
):
    folder, text = shared_store.checkout(dense), shared_store.checkout(topics)
    params = QuantizeParams(**SHORT, scheme=scheme, rotation=how, keep=0)
    metrics = quantize(params, {"model": folder, "text": text}, tmp_path / "out", Silent())
    assert abs(loss(tmp_path / "out", text) - loss(folder, text)) < (0.03 if "4_" in scheme else 0.01)
    before, turned, made = load_model(folder), load_model(folder), load_model(tmp_path / "out")
    rotation.heads(turned, anatomy.blocks(turned))
    if how == "stream":
        rotation.stream(turned)
    rows, layers = tables(tmp_path / "out")
    if scheme == "int8_weight_only":  # no smoothing, no fit: the written maps are the turned ones to a rounding
        for name, row in rows.items():
            asked = how == "stream" or name.endswith(("v_proj", "o_proj"))
            written_OI = made.get_submodule(name).dequantized()
            assert distance(written_OI, turned.get_submodule(name).weight) < 0.02
            assert (distance(written_OI, before.get_submodule(name).weight) > 0.5) == asked
            assert (row.get("rotation"), layers[name].get("note", {}).get("rotation")) == (
                (how, how) if asked else (None, None)
            )
    assert metrics["rotated_maps"] == (42 if how == "stream" else 12)
    types = dtypes(tmp_path / "out")
    assert (types.get("lm_head.weight") == "I8") == (how == "stream")  # a tied table became two


@pytest.mark.parametrize(
    "params, rotated",
    [({}, 12), ({"scheme": "fp8_e4m3"}, 12), ({"search": "off"}, 0), ({"rotation": "off"}, 0)]
    + [({"scheme": scheme}, 0) for scheme in ("int4_weight_only", "int8_weight_only")],
)
def test_quantize_that_is_told_nothing_rotates_heads_where_inputs_are_rounded(
    params, rotated, shared_store, dense, topics, tmp_path
):
    folders = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    metrics = quantize(QuantizeParams(**SHORT, **params), folders, tmp_path / "out", Silent())
    assert metrics["rotated_maps"] == rotated


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)


@pytest.mark.parametrize("pair", [("k", "v"), ("q", "o")])
def test_quantize_of_heads_whose_tensor_stands_elsewhere_leaves_them_or_refuses_by_name(
    pair, tiny, shared_store, topics, tmp_path
):
    model = load_model(tiny)
    attention = model.model.layers[1].self_attn
    one, other = (getattr(attention, f"{role}_proj") for role in pair)
    one.weight = other.weight
    save_model(model, tmp_path / "tied", like=tiny)
    said, text = Notes(), shared_store.checkout(topics)
    folders = {"model": tmp_path / "tied", "text": text}
    with pytest.raises(StageError, match="shares a tensor"):
        quantize(QuantizeParams(**SHORT, rotation="heads"), folders, tmp_path / "asked", Silent())
    with pytest.raises(StageError, match="shares its tensor"):
        quantize(QuantizeParams(**SHORT), folders, tmp_path / "int8", Silent())
    for params in ({"scheme": "fp8_e4m3"}, {"smoothing": 0}):
        output = tmp_path / "-".join(params)
        metrics = quantize(QuantizeParams(**SHORT, **params), folders, output, said)
        assert metrics["rotated_maps"] == 0
        assert said.said.pop(0).startswith("heads are not rotated: ")
        said.said.clear()
        assert abs(loss(output, text) - loss(tmp_path / "tied", text)) < 0.01


@pytest.fixture(scope="module")
def uneven(tiny, tmp_path_factory):
    """Block 2: one weight of each row of o is far larger than the others. Block 4: v and o lie on the grid of INT4."""
    model = load_model(tiny)
    with torch.no_grad():
        hot, exact = (anatomy.projections(anatomy.blocks(model)[index]) for index in (2, 4))
        rows = torch.arange(64)
        hot["o"].weight[rows, rows * 7 % 64] = 16 * hot["o"].weight.square().mean().sqrt()
        for role in "vo":
            exact[role].weight.copy_(nearest(exact[role].weight, Precision("int4", block=64)))
    folder = tmp_path_factory.mktemp("uneven") / "model"
    save_model(model, folder, like=tiny)
    return folder


def test_quantize_auto_rotates_the_blocks_where_it_helps_and_says_so(uneven, shared_store, topics, tmp_path):
    inputs = {"model": uneven, "text": shared_store.checkout(topics)}
    params = QuantizeParams(**SHORT, scheme="int4_weight_only", rotation="auto")
    metrics = quantize(params, inputs, tmp_path / "out", Silent())
    rows, layers = tables(tmp_path / "out")
    before, turned, made = load_model(uneven), load_model(uneven), load_model(tmp_path / "out")
    rotation.heads(turned, anatomy.blocks(turned))
    said = [rows[f"model.layers.{index}.self_attn.o_proj"] for index in range(6)]
    assert said[2]["rotation"] == "heads"
    assert said[2]["error_rotated"] < 0.5 * said[2]["error_unrotated"]
    assert said[4]["rotation"] == "off"
    assert said[4]["error_unrotated"] < 1e-6 < said[4]["error_rotated"]
    for index, row in enumerate(said):
        assert (row["rotation"] == "heads") == (row["error_rotated"] < row["error_unrotated"])
        for role in "vo":
            name = f"model.layers.{index}.self_attn.{role}_proj"
            kind = turned if row["rotation"] == "heads" else before
            assert distance(made.get_submodule(name).dequantized(), kind.get_submodule(name).weight) < 0.5
            assert layers[name]["note"]["rotation"] == rows[name]["rotation"] == row["rotation"]
    assert metrics["rotated_maps"] == 2 * sum(row["rotation"] == "heads" for row in said)
    quantize(params, inputs, tmp_path / "again", Silent())
    for name in ("model.safetensors", "quantization.json", "layers.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("scheme", ["int8_w8a8", "fp8_e4m3", "int8_weight_only"])
def test_quantize_auto_judges_every_scheme_by_its_own_rounding(scheme, uneven, shared_store, topics, tmp_path):
    inputs = {"model": uneven, "text": shared_store.checkout(topics)}
    quantize(QuantizeParams(**SHORT, scheme=scheme, rotation="auto"), inputs, tmp_path / "out", Silent())
    rows, _ = tables(tmp_path / "out")
    row = rows["model.layers.2.self_attn.v_proj"]
    # A float keeps its precision beside an outlier; integers lose theirs.
    assert scheme == "fp8_e4m3" or row["error_rotated"] < 0.9 * row["error_unrotated"]
    assert (row["rotation"] == "heads") == (row["error_rotated"] < row["error_unrotated"])


def test_quantize_auto_rotation_without_text_is_refused_and_seals_nothing(shared_store, dense):
    sealed = sorted(name for name, _ in shared_store.manifests())
    with pytest.raises(StageError, match="needs an input 'text'"):
        sealer(shared_store)("quantize", {"scheme": "int8_weight_only", "rotation": "auto"}, model=dense)
    assert sorted(name for name, _ in shared_store.manifests()) == sealed


class Cut(Silent):
    """Ends the run after some blocks, as a kill would."""

    def advanced(self, done, total):
        if done == 3:
            raise KeyboardInterrupt


def test_quantize_rotated_and_cut_off_goes_on_to_the_same_bytes(shared_store, dense, topics, tmp_path, monkeypatch):
    import stages.models.blockwise.compress

    monkeypatch.setattr(stages.models.blockwise.compress, "SAVE_EVERY_S", 0.0)
    inputs = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    params = QuantizeParams(**SHORT, scheme="int8_w8a8", rotation="stream")
    quantize(params, inputs, tmp_path / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        quantize(params, inputs, tmp_path / "out", Cut())
    quantize(params, inputs, tmp_path / "out", Silent())
    for name in ("model.safetensors", "quantization.json", "layers.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_quantize_rotated_in_the_layout_of_compressed_tensors_answers_alike(shared_store, dense, topics, tmp_path):
    inputs = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    how = SHORT | {"scheme": "int4_weight_only", "rotation": "stream", "embedding": "keep"}
    for layout in ("enginery", "compressed-tensors"):
        quantize(QuantizeParams(**how, layout=layout), inputs, tmp_path / layout, Silent())
    ids_NT = torch.arange(64).view(2, 32) * 11 % 768
    with torch.no_grad():
        ours, theirs = (load_model(tmp_path / one)(ids_NT).logits for one in ("enginery", "compressed-tensors"))
    assert torch.allclose(ours, theirs, atol=1e-4)
