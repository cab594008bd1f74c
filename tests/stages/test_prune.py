import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.models import loading
from stages.models.anatomy import block_parameters
from stages.models.loading import load_model
from stages.prune import PRUNE, PruneParams
from stages.runtime.contract import StageError
from tests.conftest import sealer
from tests.stages.test_share import Notes, ids, perplexity

PARAMS = {"keep": 0.9, "windows": 32, "window_tokens": 64}


@pytest.fixture(scope="module")
def pruned(shared_store, dense, topics):
    """The tiny model with fewer channels, sealed once."""
    return sealer(shared_store)("prune", PARAMS, model=dense, text=topics)


def rows(store, identity):
    return json.loads((store.checkout(identity) / "layers.json").read_text())["layers"]


def test_prune_channels_removes_what_was_asked_and_loads_plainly(shared_store, dense, pruned):
    folder = shared_store.checkout(pruned.identity)
    config = json.loads((folder / "config.json").read_text())
    # A block holds 12,288 attention, 36,864 feed-forward and 128 norm parameters.
    block = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 192 + 128
    widest = max(w for w in range(8, 193, 8) if block - 3 * 64 * (192 - w) <= 0.9 * block)
    assert config["intermediate_size"] == widest == pruned.manifest.metrics["channels"]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.model.layers[3].mlp.up_proj.weight.shape == (widest, 64)
    assert block_parameters(model) == pruned.manifest.metrics["block_parameters"] <= 0.9 * 6 * block
    x = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=x).logits, load_model(folder)(input_ids=x).logits)


def test_prune_channels_loses_less_than_cutting_the_weakest_without_mending(shared_store, dense, topics, pruned):
    test = ids(shared_store, topics, dense, "test")
    before, after, naive = (load_model(shared_store.checkout(i)) for i in (dense, pruned.identity, dense))
    width = after.config.intermediate_size
    with torch.no_grad():
        for layer in naive.model.layers:
            weakest = layer.mlp.down_proj.weight.norm(dim=0).argsort()[: 192 - width]
            layer.mlp.down_proj.weight[:, weakest] = 0
    ratio, plain = (perplexity(m, test) / perplexity(before, test) for m in (after, naive))
    assert 1 - 1e-3 < ratio < 1.08
    assert ratio - 1 < 0.5 * (plain - 1)


def test_prune_channels_table_shows_that_the_fit_mends(shared_store, pruned):
    table = rows(shared_store, pruned.identity)
    assert [row["block"] for row in table] == list(range(6))
    for row in table:
        assert 0 < row["output_error_ratio"] < row["output_error_ratio_cut"] < 1
        assert row["channels"] == pruned.manifest.metrics["channels"]


def test_prune_channels_after_sharing_narrows_the_coefficients(shared_store, dense, topics):
    run = sealer(shared_store)
    how = {"keep": 0.9, "windows": 4, "window_tokens": 64}
    first = run("share", how | {"projections": ["gate+up"]}, model=dense, text=topics)
    both = run("prune", how, model=first.identity, text=topics)
    model = load_model(shared_store.checkout(both.identity))
    width = model.config.intermediate_size
    coefficients = {
        tuple(module.weight.shape) for name, module in model.named_modules() if name.endswith("_proj.coefficient")
    }
    assert coefficients
    assert {shape[0] for shape in coefficients} == {width}
    assert block_parameters(model) <= 0.9 * first.manifest.metrics["block_parameters"]
    test = ids(shared_store, topics, dense, "test")
    parent = load_model(shared_store.checkout(first.identity))
    assert perplexity(model, test) / perplexity(parent, test) < 1.15


def test_prune_channels_behind_a_shared_down_is_refused_by_name(shared_store, dense, topics):
    how = {"keep": 0.98, "windows": 2, "window_tokens": 64}
    first = sealer(shared_store)("share", how | {"projections": ["down"]}, model=dense, text=topics)
    with pytest.raises(StageError, match=r"layers\.\d\.mlp\.down_proj stands on a basis"):
        sealer(shared_store)("prune", how, model=first.identity, text=topics)


def test_prune_blocks_takes_the_least_influential(shared_store, dense, topics):
    made = sealer(shared_store)("prune", PARAMS | {"method": "blocks", "keep": 0.7}, model=dense, text=topics)
    folder = shared_store.checkout(made.identity)
    table = rows(shared_store, made.identity)
    gone = [row["influence"] for row in table if not row["kept"]]
    assert len(gone) == 2
    assert max(gone) < min(row["influence"] for row in table if row["kept"])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.config.num_hidden_layers == made.manifest.metrics["layers"] == 4
    original = load_model(shared_store.checkout(dense))
    survivors = [row["block"] for row in table if row["kept"]]
    for new, old in enumerate(survivors):
        ours, theirs = (m.model.layers[i].mlp.up_proj.weight for m, i in ((model, new), (original, old)))
        assert torch.equal(ours, theirs)
    assert model.generate(torch.arange(9)[None], max_new_tokens=3, do_sample=False).shape == (1, 12)


def test_prune_blocks_of_a_shared_group_leaves_the_rest_sharing(shared_store, dense, topics):
    how = {"windows": 2, "window_tokens": 64}
    first = sealer(shared_store)("share", how | {"keep": 0.9}, model=dense, text=topics)
    made = sealer(shared_store)("prune", how | {"method": "blocks", "keep": 0.9}, model=first.identity, text=topics)
    model = load_model(shared_store.checkout(made.identity))
    assert block_parameters(model) == made.manifest.metrics["block_parameters"]
    assert made.manifest.metrics["layers"] < 6


def test_prune_is_deterministic_and_idempotent(shared_store, dense, topics, pruned, tmp_path):
    assert sealer(shared_store)("prune", PARAMS, model=dense, text=topics).cached
    given = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    notes = Notes()
    PRUNE.run(PruneParams(**PARAMS), given, tmp_path, notes)
    assert notes.told == [pytest.approx((i + 1) / 6) for i in range(6)]
    for name in ("model.safetensors", "layers.json", "config.json"):
        assert (tmp_path / name).read_bytes() == (shared_store.checkout(pruned.identity) / name).read_bytes()


@pytest.mark.parametrize(("method", "best"), [("channels", r"0\.28"), ("blocks", r"0\.16")])
def test_prune_that_cannot_remove_so_much_names_the_best(shared_store, dense, topics, method, best):
    before = len(list(shared_store.manifests()))
    with pytest.raises(StageError, match=rf"measured keep {best}\d+ at best; limit keep 0\.05"):
        sealer(shared_store)("prune", PARAMS | {"method": method, "keep": 0.05}, model=dense, text=topics)
    assert len(list(shared_store.manifests())) == before


def test_prune_of_a_quantized_checkpoint_is_refused(shared_store, dense, topics):
    made = sealer(shared_store)("quantize", {"scheme": "int8_weight_only"}, model=dense)
    with pytest.raises(StageError, match="Prune first, quantize afterwards"):
        sealer(shared_store)("prune", PARAMS, model=made.identity, text=topics)


def test_prune_that_wrote_its_input_is_caught(shared_store, dense, topics, tmp_path, monkeypatch):
    given = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    untouched = load_model(given["model"])
    real = loading.save_model
    monkeypatch.setattr(loading, "save_model", lambda _model, folder, *, like: real(untouched, folder, like=like))
    with pytest.raises(StageError, match="lost less than was asked"):
        PRUNE.run(PruneParams(**PARAMS), given, tmp_path, Notes())


def test_prune_text_shorter_than_asked_is_told(shared_store, dense, topics, tmp_path):
    given = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    notes = Notes()
    PRUNE.run(PruneParams(keep=0.97, windows=9999, window_tokens=512), given, tmp_path, notes)
    assert any("of 9999 windows" in text for text in notes.notes)
