"""compressed-tensors: bytes as the layout is defined, read back bit for bit; what is not understood is refused."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from stages.models.checkpoint import compressed_tensors
from stages.models.checkpoint.compressed_tensors import METHOD, pack, unpack
from stages.models.checkpoint.loading import load_config, load_model, save_model
from stages.models.layers import quantized_linear
from stages.models.layers.quantized_linear import QuantizedLinear, quantized_modules
from stages.quantize.params import QuantizeParams
from stages.quantize.rounding import quantize_tables
from stages.quantize.stage import quantize
from stages.quantize.stored_forms import rounded
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.conftest import sealer
from tests.engines import one_block

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
MAPS = {
    "self_attn.q_proj": ("int8", None, "int8"),
    "self_attn.k_proj": ("int8", None, None),
    "self_attn.v_proj": ("int4", 32, None),
    "self_attn.o_proj": ("fp8_e4m3", None, "fp8_e4m3"),
    "mlp.gate_proj": ("nvfp4", 16, None),
    "mlp.up_proj": ("mxfp4", 32, None),
}
BLOCK = "model.layers.0."


def put(model, path, form, block, read):
    """Round one map to nearest in place."""
    old = model.get_submodule(path)
    new = QuantizedLinear(old.in_features, old.out_features, form=form, block=block, input_form=read)
    tensors = rounded(old.weight.detach(), form, block, None, search=False)
    new.put(tensors | ({"input_scale": torch.tensor(0.0123)} if read else {}))
    quantized_linear.replace(model, path, new)


@pytest.fixture(scope="module")
def mixture(tiny, tmp_path_factory):
    """One block with a map in every form and one left float: the model, and its folder in the layout."""
    root = tmp_path_factory.mktemp("mixture")
    one = one_block(tiny, root / "one")
    model = load_model(one)
    for path, asked in MAPS.items():
        put(model, BLOCK + path, *asked)
    save_model(model, root / "packed", like=one, layout=METHOD)
    return model, root / "packed"


def by_hand(word: int, place: int, bits: int) -> int:
    return ((word % 2**32) // 2 ** (bits * place)) % 2**bits - 2 ** (bits - 1)


def decoded(stored, path, form):
    """A map's float weights from the file's tensors alone, as the layout's definition says."""
    own = {name.removeprefix(f"{path}."): one for name, one in stored.items() if name.startswith(f"{path}.")}
    scale = own["weight_scale"].float().numpy()
    if form in ("int4", "int8") and "weight_packed" in own:
        bits, (outputs, inputs) = (4, 8)[form == "int8"], own["weight_shape"].tolist()
        rows = own["weight_packed"].tolist()
        a_word = 32 // bits
        q = [[by_hand(row[i // a_word], i % a_word, bits) for i in range(inputs)] for row in rows]
        values = np.array(q, np.float32)
        assert values.shape == (outputs, inputs)
    elif form in ("nvfp4", "mxfp4"):
        byte = own["weight_packed"].numpy()
        values = E2M1[np.stack((byte % 16, byte // 16), -1).reshape(len(byte), -1)]
        scale = np.float32(2.0) ** (scale - 127) if form == "mxfp4" else scale
        if form == "nvfp4":
            scale = scale * (np.float32(1) / own["weight_global_scale"].numpy())
    else:
        kept = own["weight"]
        values = kept.numpy() if form == "int8" else kept.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return values.astype(np.float32) * scale.repeat(values.shape[1] // scale.shape[1], axis=1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [5, 16])
def test_pack_lays_values_lowest_first_offset_by_half_the_range(bits, inputs):
    low = 2 ** (bits - 1)
    q_OI = torch.randint(-low, low, (3, inputs), dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    q_OI[0, 0], q_OI[1, -1] = -low, low - 1
    words = pack(q_OI, bits)
    assert words.dtype == torch.int32
    found = [[by_hand(row[i * bits // 32], i % (32 // bits), bits) for i in range(inputs)] for row in words.tolist()]
    assert found == q_OI.tolist()
    assert torch.equal(unpack(words, bits, inputs), q_OI)


@pytest.mark.parametrize("path", MAPS)
def test_written_bytes_stand_for_the_weights_of_each_form(mixture, path):
    model, folder = mixture
    form, _, read = MAPS[path]
    stored = load_file(folder / "model.safetensors")
    found, wanted = decoded(stored, BLOCK + path, form), model.get_submodule(BLOCK + path).dequantized().numpy()
    if form == "nvfp4":  # the reciprocal of the scale is stored
        np.testing.assert_allclose(found, wanted, rtol=3e-7)
    else:
        assert np.array_equal(found, wanted)
    assert (f"{BLOCK}{path}.input_scale" in stored) == (read is not None)


def test_checkpoint_read_back_has_the_weights_that_were_stored_and_the_same_logits(mixture):
    model, folder = mixture
    again = load_model(folder)
    stored = load_file(folder / "model.safetensors")
    assert quantized_modules(again).keys() == {BLOCK + path for path in MAPS}
    for path, (form, block, read) in MAPS.items():
        module = again.get_submodule(BLOCK + path)
        assert (module.form.name, module.block, module.input_form) == (form, block, read)
        assert np.array_equal(module.dequantized().numpy(), decoded(stored, BLOCK + path, form))
    ids = torch.randint(1, 768, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=2e-5)


def test_checkpoint_read_and_written_again_has_the_same_bytes(mixture, tmp_path):
    save_model(load_model(mixture[1]), tmp_path, like=mixture[1], layout=METHOD)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (mixture[1] / name).read_bytes()
    save_model(load_model(mixture[1]), tmp_path / "own", like=mixture[1])
    assert "quantization_config" not in json.loads((tmp_path / "own" / "config.json").read_text())
    assert (tmp_path / "own" / "quantization.json").is_file()


def test_config_names_each_map_in_the_group_of_its_form(mixture):
    folder = mixture[1]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == (METHOD, "mixed-precision")
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == [f"{BLOCK}mlp.down_proj", "lm_head"]
    groups = {group["targets"][0].removeprefix(BLOCK): group for group in config["config_groups"].values()}
    assert groups.keys() == MAPS.keys()
    formats = {path: group["format"] for path, group in groups.items()}
    assert formats["self_attn.q_proj"] == "int-quantized"
    assert formats["self_attn.k_proj"] == formats["self_attn.v_proj"] == "pack-quantized"
    assert formats["self_attn.o_proj"] == "float-quantized"
    assert (formats["mlp.gate_proj"], formats["mlp.up_proj"]) == ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
    assert groups["mlp.gate_proj"]["weights"]["strategy"] == "tensor_group"
    assert groups["self_attn.o_proj"]["input_activations"]["strategy"] == "tensor"
    assert not (folder / "quantization.json").exists()


def test_quantize_in_the_layout_is_small_loads_and_hits(shared_store, dense):
    params = {"scheme": "int4_weight_only", "search": "off", "embedding": "keep", "layout": METHOD}
    outcome = sealer(shared_store)("quantize", params, model=dense)
    folder = shared_store.checkout(outcome.identity)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]
    assert config["ignore"] == ["lm_head"]
    assert outcome.manifest.metrics["integer_matrices"] == len(quantized_modules(load_model(folder))) == 42
    assert sealer(shared_store)("quantize", params, model=dense).cached
    assert load_config(folder).architectures == ["LlamaForCausalLM"]
    with pytest.raises(StageError, match="quantized already"):
        quantize(QuantizeParams(scheme="int8_weight_only"), {"model": folder}, folder / "never", Silent())


def test_quantize_in_the_layout_with_an_int8_table_is_refused():
    with pytest.raises(ValueError, match="set `embedding: keep`"):
        QuantizeParams(scheme="int8_weight_only", layout=METHOD)


def foreign(folder, out, change=None, tensors=None):
    """A copy of a checkpoint with another `quantization_config` or other tensors."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config, stored = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    if change:
        change(config["quantization_config"])
    if tensors:
        tensors(stored)
    (out / "config.json").write_text(json.dumps(config))
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    return out


def test_conventions_of_other_writers_are_read(mixture, tmp_path):
    key, o, v = (BLOCK + path for path in ("self_attn.k_proj", "self_attn.o_proj", "self_attn.v_proj"))

    def change(config):
        config["config_groups"]["group_1"]["targets"] = [r"re:.*\.k_proj$"]
        config["config_groups"]["group_3"]["weights"]["strategy"] = "tensor"
        config["config_groups"]["group_2"]["weights"]["actorder"] = "static"
        config["ignore"] = ["re:.*lm_head", f"{BLOCK}mlp.down_proj"]
        config["config_groups"]["group_5"]["targets"] = ["Linear"]
        config |= {"sparsity_config": {"format": "dense"}, "transform_config": {}}

    def tensors(stored):
        stored[f"{key}.weight_zero_point"] = torch.zeros(stored[f"{key}.weight_scale"].shape, dtype=torch.int8)
        stored[f"{o}.weight_scale"] = torch.tensor([0.25])
        stored[f"{v}.weight_scale"] = stored[f"{v}.weight_scale"].bfloat16()

    stored = load_file(mixture[1] / "model.safetensors")
    found = load_model(foreign(mixture[1], tmp_path / "out", change, tensors))
    assert np.array_equal(found.get_submodule(key).dequantized().numpy(), decoded(stored, key, "int8"))
    expected = stored[f"{o}.weight"].float() * 0.25
    assert torch.equal(found.get_submodule(o).dequantized(), expected)
    stored[f"{v}.weight_scale"] = stored[f"{v}.weight_scale"].bfloat16()
    assert np.array_equal(found.get_submodule(v).dequantized().numpy(), decoded(stored, v, "int4"))
    assert isinstance(found.get_submodule(f"{BLOCK}mlp.down_proj"), nn.Linear)


def test_rows_of_four_bit_integers_are_one_block(mixture, tmp_path):
    v = f"{BLOCK}self_attn.v_proj"

    def change(config):
        config["config_groups"]["group_2"]["weights"] |= {"strategy": "channel", "group_size": None}

    def tensors(stored):
        stored[f"{v}.weight_scale"] = stored[f"{v}.weight_scale"][:, :1].contiguous()

    folder = foreign(mixture[1], tmp_path / "out", change, tensors)
    expected = decoded(load_file(folder / "model.safetensors"), v, "int4")
    assert np.array_equal(load_model(folder).get_submodule(v).dequantized().numpy(), expected)


def of(group, part, **changes):
    return lambda config: config["config_groups"][f"group_{group}"][part].update(changes)


REFUSED = {
    "dynamic inputs": (of(0, "input_activations", dynamic=True), "the scheme of .*q_proj is not understood"),
    "asymmetric": (of(2, "weights", symmetric=False), "the scheme of .*v_proj"),
    "reordered": (of(2, "weights", actorder="group"), "the scheme of .*v_proj"),
    "two bits": (of(2, "weights", num_bits=2), "the scheme of .*v_proj"),
    "blocks of INT8": (of(1, "weights", strategy="group", group_size=32), "the scheme of .*k_proj"),
    "other blocks of FP4": (of(5, "weights", group_size=16), "the scheme of .*up_proj"),
    "rows of inputs": (of(0, "input_activations", strategy="token"), "the rounding of the inputs of .*q_proj"),
    "inputs of INT4": (lambda config: config["config_groups"]["group_2"].update(
        input_activations=config["config_groups"]["group_0"]["input_activations"]), "the rounding of the inputs of"),
    "cache": (lambda config: config.update(kv_cache_scheme={"num_bits": 8}), "`kv_cache_scheme`"),
    "sparse": (lambda config: config.update(sparsity_config={"format": "sparse-bitmask"}), "`sparsity_config`"),
    "preset": (lambda config: config.update(config_groups={"W4A16": ["Linear"]}), "a group of its"),
    "no group": (lambda config: config["config_groups"].pop("group_1"), "the scale of .*k_proj"),
    "float": (lambda config: config.update(ignore=["lm_head"]) or of(0, "weights")(config) or
              config["config_groups"]["group_0"]["targets"].append("Linear"), "down_proj has no weight_scale"),
    "wrong block": (of(2, "weights", group_size=64), "v_proj.weight_scale of .* is misshapen"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_scheme_that_our_layers_have_not_is_refused_by_name(mixture, tmp_path, case):
    change, said = REFUSED[case]
    with pytest.raises(StageError, match=said):
        load_model(foreign(mixture[1], tmp_path / "out", change))


def test_zero_point_that_is_not_zero_is_refused(mixture, tmp_path):
    name = f"{BLOCK}self_attn.k_proj.weight_zero_point"
    with pytest.raises(StageError, match=r"the zero point of .*k_proj"):
        load_model(
            foreign(mixture[1], tmp_path / "out", tensors=lambda stored: stored.update({name: torch.ones(1).char()}))
        )


def test_quantization_of_another_method_is_still_refused(mixture, tmp_path):
    folder = foreign(mixture[1], tmp_path / "out", lambda config: config.update(quant_method="gptq"))
    with pytest.raises(StageError, match="quantized by gptq"):
        load_model(folder)


def test_what_the_layout_cannot_hold_is_refused_with_a_way_out(mixture, tiny, tmp_path):
    model = load_model(tiny)
    with pytest.raises(StageError, match="holds quantized checkpoints alone"):
        save_model(model, tmp_path / "a", like=tiny, layout=METHOD)
    quantize_tables(model)
    with pytest.raises(StageError, match=re.escape("no table of INT8 rows; measured model.embed_tokens. Set `emb")):
        save_model(model, tmp_path / "b", like=tiny, layout=METHOD)
    with pytest.raises(StageError, match="shared, factorized or of another size"):
        compressed_tensors.write(mixture[0], {}, {"shared": []})
    turned = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=16))
    quantized_linear.replace(turned, "transformer.h.0.attn.c_attn", QuantizedLinear(32, 96, bias=True))
    with pytest.raises(StageError, match=r"keeps transposed; measured transformer\.h\.0\.attn\.c_attn"):
        compressed_tensors.write(turned, {}, {})
    assert not (tmp_path / "a" / "model.safetensors").exists()


def test_bias_of_a_map_is_stored_with_it(mixture, tmp_path):
    again = load_model(mixture[1])
    module = again.get_submodule(f"{BLOCK}self_attn.q_proj")
    module.bias = torch.arange(float(module.out_features))
    tensors, _ = compressed_tensors.write(again, again.state_dict(), {})
    assert torch.equal(tensors[f"{BLOCK}self_attn.q_proj.bias"], module.bias)


def test_maps_that_engines_multiply_as_one_are_named_where_they_are_unlike(tiny):
    model = load_model(tiny)
    layers, alike = model.model.layers, {"form": "int4", "block": 32, "read": None}
    for part in ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj", "1.mlp.gate_proj", "1.mlp.up_proj"):
        put(model, f"model.layers.{part}", **alike)
    assert compressed_tensors.unlike(model) == []
    put(model, "model.layers.3.mlp.up_proj", **alike)
    layers[0].self_attn.v_proj = QuantizedLinear(64, 32)
    for path in ("model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj"):
        put(model, path, "nvfp4", 16, None)
    modules = ["model.layers.0.self_attn", "model.layers.2.mlp", "model.layers.3.mlp"]
    assert compressed_tensors.unlike(model) == modules
    layers[2].mlp.gate_proj.weight_scale_2 = layers[2].mlp.up_proj.weight_scale_2.clone()
    assert compressed_tensors.unlike(model) == [modules[0], modules[2]]
