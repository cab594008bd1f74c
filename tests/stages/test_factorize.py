import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.factorize import FACTORIZE, FactorizeParams
from stages.models.anatomy.blocks import block_parameters, blocks, projections
from stages.models.checkpoint import loading
from stages.models.checkpoint.loading import load_model, save_model
from stages.models.layers.low_rank_linear import ResidualLinear, SharedLinear
from stages.recover.params import RecoverParams
from stages.recover.stage import recover
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.conftest import sealer
from tests.stages.test_share import Notes, ids, perplexity

PARAMS = {"keep": 0.7, "windows": 32, "window_tokens": 64}


@pytest.fixture(scope="module")
def factorized(shared_store, dense, topics):
    """The tiny model in thin factors, sealed once."""
    return sealer(shared_store)("factorize", PARAMS, model=dense, text=topics)


def test_factorize_leaves_what_was_asked_and_loads_to_the_same_function(shared_store, dense, factorized):
    folder = shared_store.checkout(factorized.identity)
    model = load_model(folder)
    before = block_parameters(load_model(shared_store.checkout(dense)))
    assert 0.69 * before < block_parameters(model) <= 0.7 * before
    rows = {row["layer"]: row for row in json.loads((folder / "layers.json").read_text())["layers"]}
    for path, row in rows.items():
        one = model.get_submodule(path)
        assert isinstance(one, SharedLinear)
        assert one.basis.out_features == row["rank"] < min(one.in_features, one.out_features)
        assert row["shares_with"] == []
        assert 0 < row["output_error_ratio"] < 1
    assert len({row["rank"] for row in rows.values()}) > 2
    x = torch.arange(20)[None]
    with torch.no_grad():
        logits = model(input_ids=x).logits
        assert torch.equal(load_model(folder)(input_ids=x).logits, logits)
        dense_again = load_model(shared_store.checkout(dense))
        for path in rows:
            one = model.get_submodule(path)
            dense_again.get_submodule(path).weight.copy_(one.coefficient.weight @ one.basis.weight)
        for mine, theirs in zip(blocks(model), blocks(dense_again), strict=True):
            for role, one in projections(mine).items():
                if not isinstance(one, SharedLinear):
                    projections(theirs)[role].weight.copy_(one.weight)
        torch.testing.assert_close(dense_again(input_ids=x).logits, logits, rtol=1e-3, atol=1e-3)


def test_factorize_loses_far_less_than_plain_svd_at_one_rank_a_shape(shared_store, dense, topics, factorized):
    test = ids(shared_store, topics, dense, "test")
    base, naive = (load_model(shared_store.checkout(dense)) for _ in range(2))
    with torch.no_grad():
        for block in blocks(naive):
            for one in projections(block).values():
                u, s, vt = torch.linalg.svd(one.weight)
                rank = int(0.7 * one.weight.numel() / sum(one.weight.shape))
                one.weight.copy_(u[:, :rank] * s[:rank] @ vt[:rank])
    ours = perplexity(load_model(shared_store.checkout(factorized.identity)), test) / perplexity(base, test)
    plain = perplexity(naive, test) / perplexity(base, test)
    assert ours - 1 < 0.2 * (plain - 1)
    assert ours < 1.05


def test_factorize_is_deterministic_and_idempotent(shared_store, dense, topics, factorized, tmp_path):
    assert sealer(shared_store)("factorize", PARAMS, model=dense, text=topics).cached
    given = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    notes = Notes()
    FACTORIZE.run(FactorizeParams(**PARAMS), given, tmp_path, notes)
    assert notes.told == sorted(notes.told)
    assert notes.told[-1] == 1
    for name in ("model.safetensors", "structure.json", "config.json"):
        assert (tmp_path / name).read_bytes() == (shared_store.checkout(factorized.identity) / name).read_bytes()


def test_factorize_again_takes_only_maps_that_are_still_dense(shared_store, topics, factorized):
    again = sealer(shared_store)("factorize", PARAMS | {"keep": 0.95}, model=factorized.identity, text=topics)
    first, both = (
        json.loads((shared_store.checkout(one.identity) / "structure.json").read_text())["shared"]
        for one in (factorized, again)
    )
    assert len(both) > len(first)


@pytest.fixture(scope="module")
def beside(shared_store, dense, topics):
    """The tiny model in thin factors and single weights, sealed once."""
    return sealer(shared_store)("factorize", PARAMS | {"sparse": 0.5}, model=dense, text=topics)


def decoded(stored, path, form):
    """The sparse part of a map from the file's tensors, by numpy and the words of structure.json."""
    own = {k.removeprefix(f"{path}.dense."): one.numpy() for k, one in stored.items() if k.startswith(f"{path}.dense.")}
    outputs, inputs = len(stored[f"{path}.low.coefficient.weight"]), stored[f"{path}.low.basis.weight"].shape[1]
    made = np.zeros((outputs, inputs), dtype=np.float32)
    if form == "mask":
        made[np.unpackbits(own["mask"], axis=1, bitorder="little")[:, :inputs] == 1] = own["values"]
    else:
        made[np.repeat(np.arange(outputs), own["counts"]), own["columns"]] = own["values"]
    return made


def test_factorize_with_single_weights_stores_the_same_bytes_and_loses_less(
    shared_store, dense, topics, factorized, beside
):
    folder, base = shared_store.checkout(beside.identity), shared_store.checkout(dense)
    stored = load_file(folder / "model.safetensors")
    blocks_bytes = sum(one.numpy().nbytes for name, one in stored.items() if ".layers." in name)
    before = sum(
        one.numpy().nbytes for name, one in load_file(base / "model.safetensors").items() if ".layers." in name
    )
    assert 0.67 * before < blocks_bytes <= 0.7 * before
    rows = {row["layer"]: row for row in json.loads((folder / "layers.json").read_text())["layers"]}
    maps = json.loads((folder / "structure.json").read_text())["sparse"]["maps"]
    assert {path for path, row in rows.items() if row["sparse_weights"]} == {p.removesuffix(".dense") for p in maps}
    assert sum(row["sparse_weights"] for row in rows.values()) == beside.manifest.metrics["sparse_weights"] > 1000
    for row in rows.values():
        assert row["error_against_product_alone"] <= 1
    assert any(row["error_against_product_alone"] < 0.5 for row in rows.values())
    model, by_hand, x = load_model(folder), load_model(base), torch.arange(20)[None]
    for path in rows:
        name = f"{path}.low" if f"{path}.dense" in maps else path
        w = (stored[f"{name}.coefficient.weight"] @ stored[f"{name}.basis.weight"]).numpy()
        if f"{path}.dense" in maps:
            w = w + decoded(stored, path, maps[f"{path}.dense"]["positions"])
        by_hand.get_submodule(path).weight.data = torch.from_numpy(w)
    for name, one in stored.items():
        if name.removesuffix(".weight") + ".weight" in dict(by_hand.named_parameters()):
            by_hand.get_parameter(name).data = one
    with torch.no_grad():
        torch.testing.assert_close(by_hand(input_ids=x).logits, model(input_ids=x).logits, rtol=1e-3, atol=1e-3)
    test = ids(shared_store, topics, dense, "test")
    ours, product = (perplexity(load_model(shared_store.checkout(one.identity)), test) for one in (beside, factorized))
    assert ours < product


def test_single_weights_learn_where_they_stand_and_nowhere_else(shared_store, dense, topics, beside, tmp_path):
    folder = shared_store.checkout(beside.identity)
    model = load_model(folder)
    with torch.no_grad():
        for one in model.modules():
            if isinstance(one, ResidualLinear):
                one.low.coefficient.weight *= 0.5
    save_model(model, tmp_path / "cut", like=folder)
    inputs = {"model": tmp_path / "cut", "teacher": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    params = {"tokens": 2048, "window_tokens": 64, "learning_rate": 1e-3, "warmup_steps": 2, "check_every_steps": 4}
    metrics = recover(RecoverParams(**params), inputs, tmp_path / "out", Silent())
    assert metrics["kl_after"] < metrics["kl_before"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "out"))
    assert before.keys() == after.keys()
    values = [name for name in before if name.endswith(".dense.values")]
    assert values and not any(torch.equal(before[name], after[name]) for name in values)
    places = [name for name in before if name.endswith((".mask", ".columns", ".counts"))]
    assert places and all(torch.equal(before[name], after[name]) for name in places)


def test_factorize_of_some_layers_leaves_the_others_as_they_came(shared_store, dense, topics):
    params = PARAMS | {"keep": 0.9, "layers": ["*.mlp.*", "*.q_proj"], "skip": ["*.down_proj", "model.layers.0.*"]}
    some = sealer(shared_store)("factorize", params, model=dense, text=topics)
    before, after = (load_file(shared_store.checkout(one) / "model.safetensors") for one in (dense, some.identity))
    gone = {name.removesuffix(".weight") for name in before.keys() - after.keys()}
    assert gone
    assert all(name.endswith(("gate_proj", "up_proj", "q_proj")) and ".layers.0." not in name for name in gone)
    others = [name for name in before if "down_proj" in name or ".layers.0." in name or "v_proj" in name]
    # What writes to the residual stream is fitted only where it is factorized.
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert some.manifest.metrics["block_parameters"] <= 0.9 * some.manifest.metrics["block_parameters_before"]


@pytest.mark.parametrize("field", ["layers", "skip"])
def test_factorize_pattern_that_matches_nothing_is_refused(shared_store, dense, topics, field):
    with pytest.raises(StageError, match=rf"pattern '\*\.fc9' of `{field}` matches no layer"):
        sealer(shared_store)("factorize", PARAMS | {field: ["*.q_proj", "*.fc9"]}, model=dense, text=topics)


def test_factorize_that_cannot_save_so_much_names_the_best_and_seals_nothing(shared_store, dense, topics):
    before = len(list(shared_store.manifests()))
    with pytest.raises(StageError, match=r"cannot save so much; measured keep 0\.\d+ at best; limit keep 0\.01"):
        sealer(shared_store)("factorize", PARAMS | {"keep": 0.01}, model=dense, text=topics)
    assert len(list(shared_store.manifests())) == before


def test_factorize_of_a_quantized_checkpoint_is_refused(shared_store, dense, topics):
    made = sealer(shared_store)("quantize", {"scheme": "int8_weight_only"}, model=dense)
    with pytest.raises(StageError, match="Factorize first, quantize afterwards"):
        sealer(shared_store)("factorize", PARAMS, model=made.identity, text=topics)


def test_factorize_that_wrote_its_input_is_caught(shared_store, dense, topics, tmp_path, monkeypatch):
    given = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    untouched = load_model(given["model"])
    real = loading.save_model
    monkeypatch.setattr(loading, "save_model", lambda _model, *at, **how: real(untouched, *at, **how))
    how = FactorizeParams(keep=0.9, windows=9999, window_tokens=512)
    notes = Notes()
    with pytest.raises(StageError, match="lost less than was asked"):
        FACTORIZE.run(how, given, tmp_path, notes)
    assert any("of 9999 windows" in text for text in notes.notes)
