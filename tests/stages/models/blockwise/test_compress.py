import pytest
import torch
from torch import nn

from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise import site_moments
from stages.models.blockwise.block_calls import arguments, embedded
from stages.models.blockwise.compress import compress
from stages.models.blockwise.sites import OUTPUT, added_to, listening, sites
from stages.models.blockwise.technique import Compressed
from stages.models.checkpoint.loading import load_model
from stages.quantize.rounding import Precision, Rounding, names
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.stages.models.families import family

ONE_STACK = ["llama", "qwen2", "qwen3", "gpt2", "neox", "opt", "bert_masked", "roberta", "distilbert"]
TWO_STACKS = ["t5", "t5_plain", "bart", "marian"]


class Halved:
    """Sets every second row of every map to zero, and keeps what it was told."""

    idle = False

    def __init__(self):
        self.seen, self.order = {}, []

    def enter(self, block):
        pass

    def begin(self, names, peak):
        assert peak > 0

    def read(self, name, z_MI):
        return z_MI

    def compress(self, block, found, seen):
        self.order.append([f"{block.name}.{path}" for path in found])
        made = {}
        for path, one in found.items():
            self.seen[f"{block.name}.{path}"] = (one.weight.detach().clone(), seen)
            w_OI = one.weight.detach().clone()
            w_OI[::2] = 0
            made[path] = Compressed({"weight": w_OI}, {"rows": len(w_OI)})
        return made

    def apply(self, model, path, tensors):
        model.get_submodule(path).weight = nn.Parameter(tensors["weight"], requires_grad=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: family(name, root / name) for name in ONE_STACK + TWO_STACKS}


def ids(windows=6, tokens=16):
    return torch.randint(5, 90, (windows, tokens), generator=torch.Generator().manual_seed(0))


def first_block(model, tokens=16):
    return anatomy.blocks(model)[0], embedded(model, ids(1, tokens)), arguments(model, tokens)[0]


def test_sites_of_a_llama_are_its_four_and_two_maps_are_summands(folders):
    block, x_1TH, kwargs = first_block(load_model(folders["llama"]))
    found = sites(block, x_1TH, kwargs)
    assert found == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    added = added_to(block, [path for site in found for path in site], x_1TH, kwargs)
    assert added == {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": OUTPUT}


def test_sites_of_a_parallel_block_read_two_norms_and_both_ends_reach_the_output(folders):
    block, x_1TH, kwargs = first_block(load_model(folders["neox"]))
    found = sites(block, x_1TH, kwargs)
    assert [len(site) for site in found] == [1, 1, 1, 1]
    added = added_to(block, [path for site in found for path in site], x_1TH, kwargs)
    assert set(added.values()) == {OUTPUT}
    assert len(added) == 2


def test_listening_gives_what_a_map_is_added_to(folders):
    block, x_1TH, kwargs = first_block(load_model(folders["llama"]))
    added = {"self_attn.o_proj": "post_attention_layernorm"}
    with listening(block, ["self_attn.q_proj"], added) as heard, torch.no_grad():
        y_1TH = block.module(x_1TH, **kwargs)
    torch.testing.assert_close(heard.residual("self_attn.o_proj", y_1TH), x_1TH)
    torch.testing.assert_close(heard.inputs["self_attn.q_proj"], block.module.input_layernorm(x_1TH))


@pytest.mark.parametrize("name", ONE_STACK + TWO_STACKS)
def test_compress_reaches_every_map_of_every_family(folders, name, tmp_path):
    model = load_model(folders[name])
    dense = load_model(folders[name])
    rows = compress(model, ids(), Halved(), tmp_path)
    maps = [f"{b.name}.{path}" for b in anatomy.blocks(model) for path in anatomy.maps(b)]
    assert sorted(row["layer"] for row in rows) == sorted(maps)
    for path in maps:
        new, old = model.get_submodule(path).weight, dense.get_submodule(path).weight
        assert not new[::2].any()
        assert torch.equal(new[1::2], old[1::2])


def test_seen_moments_are_those_of_both_models(folders, tmp_path, monkeypatch):
    # In float32, so that the moments can be had exactly from two whole models.
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: torch.inference_mode())
    model, dense = load_model(folders["llama"]), load_model(folders["llama"])
    technique = Halved()
    compress(model, ids(), technique, tmp_path)
    path = "model.layers.2.mlp.down_proj"
    # The compressed model before this map was: everything earlier is compressed, this map is not.
    model.get_submodule(path).weight = nn.Parameter(dense.get_submodule(path).weight.detach())
    x_NI, r_NH = before(dense, path)
    z_NI, s_NH = before(model, path)
    seen = technique.seen[path][1]
    torch.testing.assert_close(seen.moment_II, z_NI.T @ z_NI / len(z_NI), rtol=1e-4, atol=1e-6)
    # The dense inputs are kept with eight bits of mantissa.
    expected = (x_NI - z_NI).T @ z_NI / len(z_NI)
    torch.testing.assert_close(seen.drift_II, expected, rtol=0.05, atol=float(expected.abs().max()) * 0.02)
    expected = (r_NH - s_NH).T @ z_NI / len(z_NI)
    torch.testing.assert_close(
        seen.residual_OI["mlp.down_proj"], expected, rtol=0.05, atol=float(expected.abs().max()) * 0.02
    )


@torch.no_grad()
def before(model, path):
    """What a down map reads, and what its output is added to."""
    read, added = [], []
    layer = model.get_submodule(path.rpartition(".mlp")[0])
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda _m, args: read.append(args[0])),
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: added.append(args[0])),
    ]
    model(input_ids=ids())
    for hook in hooks:
        hook.remove()
    return read[0].flatten(0, 1), added[0].flatten(0, 1)


def test_compress_orders_sites_as_they_run(folders, tmp_path):
    technique = Halved()
    compress(load_model(folders["llama"]), ids(), technique, tmp_path)
    assert [site[0].rpartition(".")[2] for site in technique.order] == [
        "q_proj",
        "o_proj",
        "gate_proj",
        "down_proj",
    ] * 3


def test_compress_fitted_to_the_dense_outputs_loses_less_than_without(folders, tmp_path, monkeypatch):
    dense = load_model(folders["llama"])
    told = {}
    for strength in (0.0, 0.5):
        monkeypatch.setattr(site_moments, "corrected", with_strength(strength))
        model = load_model(folders["llama"])
        rounding = Rounding(dict.fromkeys(names(model), Precision("int4", 16)))
        compress(model, ids(32), rounding, tmp_path / str(strength))
        with torch.no_grad():
            told[strength] = float((model(ids(32)).logits - dense(ids(32)).logits).square().mean())
    assert told[0.5] < 0.8 * told[0.0]


def with_strength(strength):
    from stages.algorithms.correction import corrected

    return lambda *args, **_: corrected(*args, strength=strength)


def test_compress_of_a_map_that_never_runs_is_refused_by_name(folders, tmp_path):
    model = load_model(folders["llama"])
    model.model.layers[1].mlp.idle = nn.Linear(4, 4)
    with pytest.raises(StageError, match=r"layers\.1\.mlp\.idle read nothing"):
        compress(model, ids(), Halved(), tmp_path)


def test_rounding_leaves_alone_what_no_token_runs_through(folders, tmp_path):
    model = load_model(folders["llama"])
    model.model.layers[1].mlp.idle = nn.Linear(16, 16)
    wanted = names(model)
    rows = compress(model, ids(), Rounding(dict.fromkeys(wanted, Precision("int8", input_form="int8"))), tmp_path)
    assert {row["layer"] for row in rows} == {*wanted} - {"model.layers.1.mlp.idle"}
    left = [name for name in wanted if isinstance(model.get_submodule(name), nn.Linear)]
    assert left == ["model.layers.1.mlp.idle"]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("marian", "model.decoder.layers.1.encoder_attn.k_proj"),
        ("marian", "model.decoder.layers.1.self_attn.q_proj"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.v"),
        ("t5", "decoder.block.1.layer.2.DenseReluDense.wi_0"),
        ("bart", "model.encoder.layers.1.fc1"),
    ],
)
def test_seen_moments_of_two_stacks_are_those_of_the_tokens_that_count(folders, tmp_path, monkeypatch, name, path):
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: torch.inference_mode())
    model, dense = load_model(folders[name]), load_model(folders[name])
    technique, ids_NS = Halved(), ids()
    # Answers that end at different places: a random model would say one token for ever.
    answers_NS = (ids().flip(0, 1) + 1) % 96
    answers_NS[1, 5:], answers_NS[3, 9:] = -1, -1
    monkeypatch.setattr("stages.models.blockwise.compress.answered", lambda *_: answers_NS.clone())
    compress(model, ids_NS, technique, tmp_path)
    # Up to its site, the compressed model is the whole one with what comes later dense.
    maps = [f"{b.name}.{one}" for b in anatomy.blocks(model) for one in anatomy.maps(b)]
    sites_before = technique.order[: [path in site for site in technique.order].index(True)]
    earlier = {one for site in sites_before for one in site}
    with torch.no_grad():
        for one in maps:
            if one not in earlier:
                model.get_submodule(one).weight = nn.Parameter(dense.get_submodule(one).weight.detach())
    x_MI, z_MI = (read_by(whole, path, ids_NS, answers_NS) for whole in (dense, model))
    seen = technique.seen[path][1]
    torch.testing.assert_close(seen.moment_II, z_MI.T @ z_MI / len(z_MI), rtol=1e-4, atol=1e-5)
    expected = (x_MI - z_MI).T @ z_MI / len(z_MI)
    torch.testing.assert_close(seen.drift_II, expected, rtol=0.05, atol=float(expected.abs().max()) * 0.02)


@torch.no_grad()
def read_by(model, path, ids_NS, answers_NS):
    """What a map reads, [M, I]: of the encoder every token, of the decoder those that count."""
    read = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: read.append(args[0]))
    model(input_ids=ids_NS, decoder_input_ids=answers_NS.clamp_min(0))
    hook.remove()
    encoders = "encoder.layers" in path or "encoder_attn.k" in path or "EncDecAttention.v" in path
    return read[0].flatten(0, 1) if encoders else read[0][answers_NS >= 0]


def test_compress_of_two_stacks_goes_on_from_either_to_the_same_tensors(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.models.blockwise.compress.SAVE_EVERY_S", 0.0)

    def compressed(state, stop=None):
        model = load_model(folders["t5"])
        rounding = Rounding(dict.fromkeys(names(model), Precision("int4", 8)))

        class Stopping(Silent):
            def advanced(self, done, _total):
                if done == stop:
                    raise KeyboardInterrupt

        compress(model, ids(), rounding, state, Stopping())
        return dict(model.state_dict())

    whole = compressed(tmp_path / "whole")
    for stop in (2, 3, 4):  # in the encoder, at its end, in the decoder
        with pytest.raises(KeyboardInterrupt):
            compressed(tmp_path / str(stop), stop)
        again = compressed(tmp_path / str(stop))
        assert all(torch.equal(again[key], whole[key]) for key in whole)
