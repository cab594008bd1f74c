import json
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages.models.anatomy.blocks import block_parameters
from stages.models.blockwise import compress
from stages.models.blockwise.block_calls import arguments
from stages.models.checkpoint import loading
from stages.models.checkpoint.loading import load_model
from stages.prune import zeros
from stages.prune.depth import drop_blocks
from stages.prune.stage import PRUNE, PruneParams
from stages.runtime.contract import PARTIAL, StageError
from tests.conftest import sealer
from tests.stages.test_share import Notes, ids, log_probabilities, perplexity

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
    table = [row for row in rows(shared_store, pruned.identity) if "inputs" in row]
    assert [row["layer"] for row in table] == [f"model.layers.{block}.mlp.down_proj" for block in range(6)]
    for row in table:
        assert 0 < row["output_error_ratio"] < row["output_error_ratio_cut"] < 1
        assert row["inputs"] == pruned.manifest.metrics["channels"]


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


@pytest.mark.parametrize(("method", "role", "keep"), [("channels", "down", 0.85), ("heads", "o", 0.92)])
def test_prune_narrows_the_basis_that_a_map_has_alone(shared_store, dense, topics, method, role, keep):
    run, how = sealer(shared_store), {"windows": 4, "window_tokens": 64}
    first = run("factorize", how | {"keep": 0.95, "layers": [f"*.{role}_proj"]}, model=dense, text=topics)
    both = run("prune", how | {"method": method, "keep": keep}, model=first.identity, text=topics)
    model, parent = (load_model(shared_store.checkout(one.identity)) for one in (both, first))
    bases = {name: one for name, one in model.named_modules() if name.endswith(f"{role}_proj.basis")}
    assert bases
    for name, one in bases.items():
        before = parent.get_submodule(name)
        assert one.in_features == one.weight.shape[1] < before.in_features
        assert one.out_features == before.out_features
    table = [row for row in rows(shared_store, both.identity) if "inputs" in row]
    assert len(table) == model.config.num_hidden_layers
    assert all(0 < row["output_error_ratio"] < row["output_error_ratio_cut"] < 1 for row in table)
    assert block_parameters(model) <= keep * first.manifest.metrics["block_parameters"]
    test = ids(shared_store, topics, dense, "test")
    assert perplexity(model, test) / perplexity(parent, test) < 1.2


def test_prune_blocks_by_influence_takes_the_least_influential(shared_store, dense, topics):
    how = PARAMS | {"method": "blocks", "by": "influence", "keep": 0.7}
    made = sealer(shared_store)("prune", how, model=dense, text=topics)
    folder = shared_store.checkout(made.identity)
    table = rows(shared_store, made.identity)
    original = load_model(shared_store.checkout(dense))
    text = ids(shared_store, topics, dense, "calibrate", 32)
    with torch.no_grad():
        states = original(input_ids=text, output_hidden_states=True).hidden_states
    with torch.no_grad():  # the last of `states` comes after the last norm
        states = [*states[:6], original.model.layers[5](states[5], **arguments(original, text.shape[1])[5])]
    changed = [1 - torch.cosine_similarity(x, y, dim=-1).mean().item() for x, y in pairwise(states)]
    gone = [row["block"] for row in table if not row["kept"]]
    assert len(gone) == 2
    assert {row["block"]: row["influence"] for row in table if not row["kept"]} == pytest.approx(
        {index: changed[index] for index in gone}, rel=0.02
    )
    assert max(changed[index] for index in gone) <= min(one for index, one in enumerate(changed) if index not in gone)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.config.num_hidden_layers == made.manifest.metrics["layers"] == 4
    survivors = [index for index in range(6) if index not in gone]
    for new, old in enumerate(survivors):
        ours, theirs = (m.model.layers[i].mlp.up_proj.weight for m, i in ((model, new), (original, old)))
        assert torch.equal(ours, theirs)
    assert model.generate(torch.arange(9)[None], max_new_tokens=3, do_sample=False).shape == (1, 12)


def without(folder, dropped):
    model = load_model(folder)
    drop_blocks(model, list(dropped))
    return model


def test_prune_blocks_by_loss_goes_greedily_and_mends(shared_store, dense, topics):
    how = {"method": "blocks", "keep": 0.7, "windows": 32, "window_tokens": 64}
    made = sealer(shared_store)("prune", how, model=dense, text=topics)
    table = rows(shared_store, made.identity)
    gone = sorted((row["kl_without"], row["block"]) for row in table if not row["kept"])
    folder, text = shared_store.checkout(dense), ids(shared_store, topics, dense, "calibrate", 2)
    log_p = log_probabilities(load_model(folder), text)
    kl = {}
    for index in range(6):
        log_q = log_probabilities(without(folder, [index]), text)
        kl[index] = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert gone[0][1] == min(kl, key=kl.get)
    assert gone[0][0] == pytest.approx(min(kl.values()), rel=0.15)  # bfloat16, every second position
    test = ids(shared_store, topics, dense, "test")
    plain = without(folder, [block for _, block in gone])
    ours = load_model(shared_store.checkout(made.identity))
    base = perplexity(load_model(folder), test)
    assert perplexity(ours, test) / base - 1 < 0.7 * (perplexity(plain, test) / base - 1)


def test_prune_heads_takes_whole_groups_and_loads_plainly(shared_store, dense, topics):
    made = sealer(shared_store)("prune", PARAMS | {"method": "heads", "keep": 0.9}, model=dense, text=topics)
    folder = shared_store.checkout(made.identity)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_key_value_heads"], config["num_attention_heads"], config["head_dim"]) == (1, 2, 16)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.model.layers[2].self_attn.k_proj.weight.shape == (16, 64)
    original = load_model(shared_store.checkout(dense))
    rows_of_k = original.model.layers[2].self_attn.k_proj.weight.view(2, 16, 64)
    rows_of_q = original.model.layers[2].self_attn.q_proj.weight.view(2, 32, 64)
    kept = [torch.equal(one, model.model.layers[2].self_attn.k_proj.weight) for one in rows_of_k]
    assert sum(kept) == 1
    assert torch.equal(rows_of_q[kept.index(True)], model.model.layers[2].self_attn.q_proj.weight)
    x = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=x).logits, load_model(folder)(input_ids=x).logits)
    test = ids(shared_store, topics, dense, "test")
    assert perplexity(model, test) / perplexity(original, test) < 1.15


def test_prune_width_loses_far_less_than_cutting_the_weakest_dimensions(shared_store, dense, topics):
    made = sealer(shared_store)("prune", PARAMS | {"method": "width", "keep": 0.8}, model=dense, text=topics)
    folder = shared_store.checkout(made.identity)
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["head_dim"]) == (48, 16)
    assert made.manifest.metrics["hidden_size"] == 48
    assert made.manifest.metrics["block_parameters"] <= 0.8 * made.manifest.metrics["block_parameters_before"]
    ours = AutoModelForCausalLM.from_pretrained(folder).eval()
    original, naive = (load_model(shared_store.checkout(dense)) for _ in range(2))
    with torch.no_grad():  # a norm's mean square over fewer dimensions is left out: that alone would favour ours
        weakest = original.model.embed_tokens.weight.norm(dim=0).argsort()[:16]
        naive.model.embed_tokens.weight[:, weakest] = 0
        for layer in naive.model.layers:
            layer.self_attn.o_proj.weight[weakest] = 0
            layer.mlp.down_proj.weight[weakest] = 0
    test = ids(shared_store, topics, dense, "test")
    base = perplexity(original, test)
    assert perplexity(ours, test) / base - 1 < 0.6 * (perplexity(naive, test) / base - 1)


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
    for name in ("model.safetensors", "config.json", "layers.json"):
        assert (tmp_path / name).read_bytes() == (shared_store.checkout(pruned.identity) / name).read_bytes()


ZEROS = {"windows": 32, "window_tokens": 64}


@pytest.fixture(scope="module")
def halved(shared_store, dense, topics):
    """Perplexity ratio and folder of 2:4 by each method."""
    test = ids(shared_store, topics, dense, "test")
    base = perplexity(load_model(shared_store.checkout(dense)), test)
    found = {}
    for method in ("magnitude", "wanda", "gradient", "sparsegpt"):
        made = sealer(shared_store)("prune", ZEROS | {"method": method, "pattern": "2:4"}, model=dense, text=topics)
        folder = shared_store.checkout(made.identity)
        found[method] = (perplexity(AutoModelForCausalLM.from_pretrained(folder), test) / base, folder)
        assert made.manifest.metrics["sparsity"] == 0.5
    return found


def test_prune_two_of_four_is_in_the_bytes_and_counted_and_nothing_grows(halved, shared_store, dense):
    whole = (shared_store.checkout(dense) / "model.safetensors").stat().st_size
    for _, folder in halved.values():
        counted, weights = json.loads((folder / "zeros.json").read_text()), load_file(folder / "model.safetensors")
        assert len(counted) == 7 * 6
        for name, count in counted.items():
            assert ((weights[name] != 0).unflatten(1, (-1, 4)).sum(2) == 2).all()
            assert count == weights[name].numel() // 2
        assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= whole


def test_prune_sparsegpt_loses_far_less_than_masks_alone(halved):
    ratios = {method: ratio for method, (ratio, _) in halved.items()}
    assert ratios["sparsegpt"] < 1.1
    assert ratios["sparsegpt"] - 1 < 0.6 * min(ratio - 1 for method, ratio in ratios.items() if method != "sparsegpt")


def test_prune_share_of_zeros_is_spread_by_measured_loss(shared_store, dense, topics):
    made = sealer(shared_store)("prune", ZEROS | {"method": "wanda", "keep": 0.6}, model=dense, text=topics)
    metrics = made.manifest.metrics
    assert metrics["weights"] == 6 * 49152
    assert 0.4 <= metrics["sparsity"] < 0.41
    shares = [row["zeros"] for row in rows(shared_store, made.identity)]
    assert max(shares) - min(shares) > 0.1
    test = ids(shared_store, topics, dense, "test")
    even = load_model(shared_store.checkout(dense))
    with torch.no_grad():
        for layer in even.model.layers:
            for one in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
                one.weight[one.weight.abs() < one.weight.abs().flatten().quantile(metrics["sparsity"])] = 0
    ours = load_model(shared_store.checkout(made.identity))
    assert perplexity(ours, test) < perplexity(even, test)


def test_prune_zeros_that_cannot_be_had_names_the_best(shared_store, dense, topics):
    with pytest.raises(StageError, match=r"cannot remove so much; measured keep 0\.09\d+ at best; limit keep 0\.05"):
        sealer(shared_store)("prune", ZEROS | {"method": "magnitude", "keep": 0.05}, model=dense, text=topics)


def test_prune_zeros_behind_a_basis_is_refused_by_name(shared_store, dense, topics):
    first = sealer(shared_store)("share", ZEROS | {"keep": 0.9}, model=dense, text=topics)
    with pytest.raises(StageError, match=r"layers\.\d\.[a-z_.]+ is no dense map"):
        sealer(shared_store)("prune", ZEROS | {"method": "wanda", "pattern": "2:4"}, model=first.identity, text=topics)


def test_prune_pattern_that_does_not_divide_names_the_map(tiny):
    model = load_model(tiny)
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(190, 64, bias=False)
    with pytest.raises(StageError, match=r"2:4 does not divide the inputs of model.layers.1.mlp.down_proj"):
        zeros.keepers(model, zeros.How("wanda", "2:4", 0.5, tuple(zeros.linears(model))), {})


def test_prune_params_refuse_a_pattern_of_blocks():
    with pytest.raises(ValidationError, match="blocks leaves no pattern of zeros"):
        PruneParams(method="blocks", pattern="2:4")


@pytest.mark.parametrize("pattern", ["2:4", None])
def test_prune_whose_zeros_were_not_written_is_caught(shared_store, dense, topics, tmp_path, monkeypatch, pattern):
    given = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    untouched = load_model(given["model"])
    real = loading.save_model
    monkeypatch.setattr(loading, "save_model", lambda _model, *at, **how: real(untouched, *at, **how))
    how = PruneParams(method="magnitude", pattern=pattern, keep=0.5, windows=2, window_tokens=64)
    with pytest.raises(StageError, match=r"does not have the zeros|fewer zeros"):
        PRUNE.run(how, given, tmp_path, Notes())


CUTS = {
    "sparsegpt": {"method": "sparsegpt", "pattern": "2:4"},
    "channels": {"method": "channels"},
    "uneven": {"method": "channels", "widths": "uneven"},
    "auto": {"method": "auto"},
    "width": {"method": "width"},
}
CUT_AT = {"auto": 0.4}
"""Amid the second of four passes, of channels: here heads and ranks stay, and their passes are not run."""


@pytest.mark.parametrize("cut_by", CUTS)
def test_prune_cut_off_goes_on_and_ends_in_the_same_bytes(shared_store, dense, topics, tmp_path, monkeypatch, cut_by):
    given = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    how = PruneParams(**CUTS[cut_by], keep=0.8, **ZEROS)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    PRUNE.run(how, given, whole, Notes())
    monkeypatch.setattr(compress, "SAVE_EVERY_S", 0.0)

    class Ended(Notes):
        def advanced(self, done, total):
            if done / total > CUT_AT.get(cut_by, 0.79):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PRUNE.run(how, given, cut, Ended())
    assert list((cut / PARTIAL).iterdir())
    notes = Notes()
    PRUNE.run(how, given, cut, notes)
    assert any("goes on after block" in text for text in notes.notes)
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("method", "best"), [("channels", r"0\.28"), ("heads", r"0\.87"), ("width", r"0\.12"), ("blocks", r"0\.16")]
)
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
    monkeypatch.setattr(loading, "save_model", lambda _model, *at, **how: real(untouched, *at, **how))
    with pytest.raises(StageError, match="lost less than was asked"):
        PRUNE.run(PruneParams(**PARAMS), given, tmp_path, Notes())


def test_prune_text_shorter_than_asked_is_told(shared_store, dense, topics, tmp_path):
    given = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    notes = Notes()
    PRUNE.run(PruneParams(keep=0.97, windows=9999, window_tokens=512), given, tmp_path, notes)
    assert any("of 9999 windows" in text for text in notes.notes)


def test_prune_zeros_only_in_the_layers_that_a_pattern_names(shared_store, dense, topics):
    how = ZEROS | {"method": "wanda", "pattern": "2:4", "layers": ("*.mlp.*",), "skip": ("*.5.*",)}
    folder = shared_store.checkout(sealer(shared_store)("prune", how, model=dense, text=topics).identity)
    weights, counted = load_file(folder / "model.safetensors"), json.loads((folder / "zeros.json").read_text())
    chosen = {name for name in weights if ".mlp." in name and ".5." not in name}
    assert set(counted) == chosen
    for name, w_OI in weights.items():
        assert (float((w_OI == 0).float().mean()) == 0.5) == (name in chosen)


def test_prune_pattern_that_matches_no_layer_is_refused(shared_store, dense, topics):
    with pytest.raises(StageError, match=r"'\*\.ffn' of `skip` matches no layer"):
        how = ZEROS | {"method": "magnitude", "pattern": "2:4", "skip": ("*.ffn",)}
        sealer(shared_store)("prune", how, model=dense, text=topics)


def test_prune_params_refuse_layers_of_channels():
    with pytest.raises(ValidationError, match="channels takes from all blocks alike"):
        PruneParams(method="channels", skip=("*.0.*",))


def test_prune_blocks_after_sharing_leaves_shared_weights_shared(shared_store, dense, topics):
    seal = sealer(shared_store)
    short = {"windows": 4, "window_tokens": 64}
    first = seal("share", {"method": "recursive", "keep": 0.8} | short, model=dense, text=topics)
    done = seal("prune", {"method": "blocks", "keep": 0.8} | short, model=first.identity, text=topics)
    gone = {row["block"] for row in rows(shared_store, done.identity) if not row["kept"]}
    left = [index for index in range(6) if index not in gone]

    def groups(identity, names):
        found = {}
        for index, layer in enumerate(load_model(shared_store.checkout(identity)).model.layers):
            for path, one in layer.named_parameters():
                found.setdefault(id(one), set()).add((names[index], path))
        return {frozenset(places) for places in found.values()}

    wanted = {frozenset(one for one in places if one[0] in left) for places in groups(first.identity, range(6))}
    shared = {places for places in wanted if len(places) > 1}
    assert any("o_proj" in path or "down_proj" in path for places in shared for _, path in places)
    assert shared == {places for places in groups(done.identity, left) if len(places) > 1}
