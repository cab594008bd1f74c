import json
import shutil

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.models.blockwise import compress
from stages.models.checkpoint import loading
from stages.models.checkpoint.loading import load_model, load_tokenizer, save_model
from stages.models.text.windows import windows
from stages.runtime.contract import StageError
from stages.share import SHARE, ShareParams
from tests.conftest import sealer
from tests.stages.models import families

PARAMS = {"keep": 0.93, "windows": 6, "window_tokens": 64}


@pytest.fixture(scope="module")
def shared(shared_store, dense, topics):
    """The tiny model with bases, sealed once."""
    return sealer(shared_store)("share", PARAMS, model=dense, text=topics)


class Notes:
    def __init__(self):
        self.told, self.notes = [], []

    def advanced(self, done, total):
        self.told.append(done / total)

    def metric(self, name, value, step):
        assert name == "block_seconds"

    def note(self, text):
        self.notes.append(text)


@torch.no_grad()
def log_probabilities(model, ids_NT):
    return model(input_ids=ids_NT).logits[:, :-1].log_softmax(-1)


def perplexity(model, ids_NT):
    log_p = log_probabilities(model, ids_NT)
    return float(log_p.gather(2, ids_NT[:, 1:, None]).mean().neg().exp())


def ids(store, topics, dense, split, most=24):
    return windows(store.checkout(topics), split, load_tokenizer(store.checkout(dense)), 64, most=most)


def test_share_basis_saves_what_was_asked_in_the_written_bytes(shared_store, dense, shared):
    before, after = (
        sum(t.numel() for n, t in load_file(shared_store.checkout(i) / "model.safetensors").items() if ".layers." in n)
        for i in (dense, shared.identity)
    )
    assert 0.88 * before < after <= 0.93 * before
    assert shared.manifest.metrics["block_parameters"] == after
    assert shared.manifest.metrics["block_parameters_before"] == before
    assert shared.manifest.metrics["parameters_before"] - shared.manifest.metrics["parameters"] == before - after


def test_share_basis_maps_that_share_hold_one_basis(shared_store, shared):
    folder = shared_store.checkout(shared.identity)
    model = load_model(folder)
    groups = json.loads((folder / "structure.json").read_text())["shared"]
    rows = json.loads((folder / "layers.json").read_text())["layers"]
    assert any(len(group["modules"]) > 1 for group in groups)
    saved = 0
    for group in groups:
        assert len({id(model.get_submodule(path).basis) for path in group["modules"]}) == 1
        touched = {int(path.split(".")[2]) for path in group["modules"]}
        assert max(touched) - min(touched) <= 1
        inputs = {model.get_submodule(path).in_features for path in group["modules"]}.pop()
        outputs = sum(model.get_submodule(path).out_features for path in group["modules"])
        saved += inputs * outputs - group["rank"] * (inputs + outputs)
    assert saved == (shared.manifest.metrics["block_parameters_before"] - shared.manifest.metrics["block_parameters"])
    assert sorted(row["layer"] for row in rows) == sorted(path for group in groups for path in group["modules"])
    for row in rows:
        assert 0 < row["output_error_ratio"] < 0.5
        (group,) = [group for group in groups if row["layer"] in group["modules"]]
        assert row["rank"] == group["rank"]
        assert {row["layer"], *row["shares_with"]} == set(group["modules"])


def test_share_basis_loses_little_and_about_what_it_predicted(shared_store, dense, topics, shared):
    before, after = (load_model(shared_store.checkout(i)) for i in (dense, shared.identity))
    test = ids(shared_store, topics, dense, "test")
    assert 1 - 1e-3 < perplexity(after, test) / perplexity(before, test) < 1.06
    p, q = (log_probabilities(m, ids(shared_store, topics, dense, "calibrate", 6)) for m in (before, after))
    measured = float((p.exp() * (p - q)).sum(-1).mean())
    assert 0.3 < shared.manifest.metrics["predicted_loss_nats"] / measured < 3


def test_share_basis_chooses_better_than_sharing_everywhere(shared_store, dense, topics, shared):
    base = load_model(shared_store.checkout(dense))
    test = ids(shared_store, topics, dense, "test")
    ratios = {}
    for projections in (["down"], ["v"], ["gate+up"]):
        try:
            made = sealer(shared_store)("share", PARAMS | {"projections": projections}, model=dense, text=topics)
        except StageError:
            continue
        ratios[projections[0]] = perplexity(load_model(shared_store.checkout(made.identity)), test)
    assert ratios
    ours = perplexity(load_model(shared_store.checkout(shared.identity)), test)
    assert ours / perplexity(base, test) < min(ratios.values()) / perplexity(base, test) + 0.005


def test_share_is_deterministic_and_idempotent(shared_store, dense, topics, shared):
    again = sealer(shared_store)("share", PARAMS, model=dense, text=topics)
    assert again.cached
    assert again.identity == shared.identity


def test_share_basis_forced_again_gives_the_same_bytes(shared_store, dense, topics, shared, tmp_path):
    given = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    notes = Notes()
    SHARE.run(ShareParams(**PARAMS), given, tmp_path, notes)
    assert notes.told == sorted(notes.told)
    assert notes.told[-1] == 1
    for name in ("model.safetensors", "structure.json", "config.json"):
        assert (tmp_path / name).read_bytes() == (shared_store.checkout(shared.identity) / name).read_bytes()


def test_share_basis_again_takes_only_maps_that_are_still_dense(shared_store, topics, shared):
    again = sealer(shared_store)("share", PARAMS | {"keep": 0.97}, model=shared.identity, text=topics)
    first, both = (
        json.loads((shared_store.checkout(one.identity) / "structure.json").read_text())["shared"]
        for one in (shared, again)
    )
    assert len(both) > len(first)
    paths = [path for group in both for path in group["modules"]]
    assert len(paths) == len(set(paths))


def test_share_basis_that_cannot_save_so_much_names_the_best(shared_store, dense, topics):
    with pytest.raises(StageError, match=r"cannot save so much; measured keep 0\.\d+ at best; limit keep 0\.02"):
        sealer(shared_store)("share", PARAMS | {"keep": 0.02}, model=dense, text=topics)


def test_share_basis_without_text_is_refused(shared_store, dense):
    with pytest.raises(StageError, match="needs an input 'text'"):
        sealer(shared_store)("share", {"method": "basis"}, model=dense)


def test_share_of_a_quantized_checkpoint_is_refused(shared_store, dense, topics):
    made = sealer(shared_store)("quantize", {"scheme": "int8_weight_only"}, model=dense)
    with pytest.raises(StageError, match="Share first, quantize afterwards"):
        sealer(shared_store)("share", PARAMS, model=made.identity, text=topics)


def test_share_that_wrote_its_input_is_caught(shared_store, dense, topics, tmp_path, monkeypatch):
    given = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    untouched = load_model(given["model"])
    real = loading.save_model
    monkeypatch.setattr(loading, "save_model", lambda _model, *at, **how: real(untouched, *at, **how))
    with pytest.raises(StageError, match="lost less than was asked"):
        SHARE.run(ShareParams(**PARAMS), given, tmp_path, Notes())


@pytest.fixture(scope="module")
def recursive(shared_store, dense, topics):
    """The tiny model with looped blocks, sealed once."""
    how = {"method": "recursive", "keep": 0.8, "windows": 32, "window_tokens": 64}
    return sealer(shared_store)("share", how, model=dense, text=topics)


def test_share_recursive_stores_each_common_weight_once(shared_store, dense, topics, recursive):
    folder = shared_store.checkout(recursive.identity)
    model, stored = load_model(folder), load_file(folder / "model.safetensors")
    before = recursive.manifest.metrics["block_parameters_before"]
    assert sum(t.numel() for n, t in stored.items() if ".layers." in n) <= 0.8 * before
    rows = json.loads((folder / "layers.json").read_text())["layers"]
    assert rows
    for row in rows:
        (other,) = row["shares_with"]
        one, two = (model.get_submodule(path) for path in (row["layer"], other))
        assert one.dense.weight is two.dense.weight
        assert one.low.basis.weight is not two.low.basis.weight
        assert one.low.basis.out_features == row["rank"]
        assert f"{max(row['layer'], other)}.dense.weight" not in stored
        assert 0 < row["output_error_ratio"] < row["output_error_ratio_shared"]
    test = ids(shared_store, topics, dense, "test")
    assert perplexity(model, test) / perplexity(load_model(shared_store.checkout(dense)), test) < 1.03


def test_share_recursive_gradients_of_a_common_weight_are_summed(shared_store, recursive):
    model = load_model(shared_store.checkout(recursive.identity))
    row = json.loads((shared_store.checkout(recursive.identity) / "layers.json").read_text())["layers"][0]
    one, two = (model.get_submodule(path) for path in (row["layer"], *row["shares_with"]))
    text = torch.arange(20)[None]

    def gradient():
        model.zero_grad()
        model(input_ids=text, labels=text).loss.backward()
        return one.dense.weight.grad

    both = gradient().clone()
    weight = one.dense.weight
    two.dense.weight = torch.nn.Parameter(weight.detach().clone())
    torch.testing.assert_close(both, gradient() + two.dense.weight.grad, rtol=1e-4, atol=1e-7)


def test_share_recursive_that_cannot_save_so_much_names_the_best(shared_store, dense, topics):
    how = {"method": "recursive", "keep": 0.3, "windows": 2, "window_tokens": 64}
    with pytest.raises(StageError, match=r"the same weights in groups of 2 .* measured keep 0\.6\d+ at best"):
        sealer(shared_store)("share", how, model=dense, text=topics)


@pytest.mark.parametrize("method", ["basis", "recursive"])
def test_share_cut_off_goes_on_and_ends_in_the_same_bytes(shared_store, dense, topics, tmp_path, monkeypatch, method):
    given = {"model": shared_store.checkout(dense), "text": shared_store.checkout(topics)}
    how = ShareParams(method=method, keep=0.8, windows=6, window_tokens=64)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    SHARE.run(how, given, whole, Notes())
    monkeypatch.setattr(compress, "SAVE_EVERY_S", 0.0)

    class Ended(Notes):
        def advanced(self, done, total):
            if done / total > 0.79:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SHARE.run(how, given, cut, Ended())
    notes = Notes()
    SHARE.run(how, given, cut, notes)
    assert any("goes on after block" in text for text in notes.notes)
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.fixture
def twins(tiny, tmp_path):
    """A copy whose head is stored apart and whose blocks 1 and 4 hold the same down_proj."""
    folder = shutil.copytree(tiny, tmp_path / "twins")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.4.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder


def test_share_tie_stores_equal_tensors_once_and_keeps_the_function(seal, store, twins):
    before = seal("fetch", {"source": twins.as_uri()}).identity
    made = seal("share", {"method": "tie"}, model=before)
    folder = store.checkout(made.identity)
    saved = made.manifest.metrics["parameters_before"] - made.manifest.metrics["parameters"]
    assert saved == 768 * 64 + 64 * 192
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    names = [["model.layers.1.mlp.down_proj.weight", "model.layers.4.mlp.down_proj.weight"]]
    assert json.loads((folder / "structure.json").read_text()) == {"tied": names}
    x = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(twins).eval()
    with torch.no_grad():
        assert torch.equal(load_model(folder)(input_ids=x).logits, theirs(input_ids=x).logits)


def test_share_tie_that_wrote_its_input_is_caught(twins, tmp_path, monkeypatch):
    untouched = load_model(twins)
    real = loading.save_model
    monkeypatch.setattr(loading, "save_model", lambda _model, *at, **how: real(untouched, *at, **how))
    with pytest.raises(StageError, match="lost less than was asked"):
        SHARE.run(ShareParams(method="tie"), {"model": twins}, tmp_path, Notes())


def test_share_tie_of_nothing_equal_is_refused_and_nothing_is_sealed(shared_store, dense):
    before = len(list(shared_store.manifests()))
    with pytest.raises(StageError, match="no two tensors of the checkpoint are equal"):
        sealer(shared_store)("share", {"method": "tie"}, model=dense)
    assert len(list(shared_store.manifests())) == before


TABLES = {
    "bart": ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"),
    "marian": ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"),
    "marian_apart": ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"),
}


def apart(name, folder, differ=()):
    """A checkpoint whose tables and head are stored apart: all equal but those that `differ`."""
    made, config, settings = families.FAMILIES[name.partition("_")[0]]
    settings = settings | {"tie_word_embeddings": False}
    if name == "marian_apart":
        settings["share_encoder_decoder_embeddings"] = False
    torch.manual_seed(0)
    model = getattr(transformers, made)(getattr(transformers, config)(vocab_size=families.VOCABULARY, **settings))
    with torch.no_grad():
        for path in TABLES[name]:
            own = model.get_parameter(f"{path}.weight")
            own.copy_(torch.randn_like(own) if path in differ else model.lm_head.weight)
        model.final_logits_bias.normal_()
    model.save_pretrained(folder)
    return folder


def tables(model, name):
    return [model.get_parameter(f"{path}.weight") for path in TABLES[name]]


def tie(folder, output, **params):
    output.mkdir()
    return SHARE.run(ShareParams(method="tie", **params), {"model": folder}, output, Notes())


@pytest.mark.parametrize("name", TABLES)
def test_share_tie_stores_the_tables_of_an_encoder_and_a_decoder_once(tmp_path, name):
    folder = apart(name, tmp_path / "apart")
    metrics = tie(folder, tmp_path / "tied")
    table = families.VOCABULARY * families.WIDTH
    assert metrics["parameters_before"] - metrics["parameters"] == (len(TABLES[name]) - 1) * table
    assert not (tmp_path / "tied" / "structure.json").exists()
    theirs = families.library(name.partition("_")[0], tmp_path / "tied")
    assert len({id(one) for one in tables(theirs, name)}) == 1
    answer = families.answers(families.library(name.partition("_")[0], folder))
    assert torch.equal(families.answers(theirs), answer)
    assert torch.equal(families.answers(load_model(tmp_path / "tied")), answer)
    rows = json.loads((tmp_path / "tied" / "layers.json").read_text())["layers"]
    assert {row["layer"] for row in rows} == {f"{path}.weight" for path in TABLES[name]}
    assert {row["relative_change"] for row in rows} == {0.0}


@pytest.mark.parametrize("name", TABLES)
def test_share_tied_tables_stay_one_through_training_and_saving(tmp_path, name):
    tie(apart(name, tmp_path / "apart"), tmp_path / "tied")
    model = load_model(tmp_path / "tied")
    before = model.lm_head.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(3, 13)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    save_model(model, tmp_path / "trained", like=tmp_path / "tied")
    again = load_model(tmp_path / "trained")
    (one,) = {id(table): table for table in tables(again, name)}.values()
    assert not torch.equal(one, before)
    assert torch.equal(families.answers(again), families.answers(model.eval()))
    stored = load_file(tmp_path / "trained" / "model.safetensors")
    assert [tuple(t.shape) for t in stored.values()].count((families.VOCABULARY, families.WIDTH)) == 1


def test_share_tie_of_some_tables_does_not_tie_the_one_that_differs(tmp_path):
    folder = apart("bart", tmp_path / "apart", differ=("model.decoder.embed_tokens",))
    tie(folder, tmp_path / "tied")
    config = json.loads((tmp_path / "tied" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    model = load_model(tmp_path / "tied")
    encoder, decoder = model.model.encoder.embed_tokens.weight, model.model.decoder.embed_tokens.weight
    assert encoder is model.lm_head.weight is model.model.shared.weight is not decoder
    assert torch.equal(families.answers(model), families.answers(families.library("bart", folder)))


def test_share_tie_of_a_decoder_and_its_head_is_told_to_transformers(tmp_path):
    folder = apart("marian_apart", tmp_path / "apart", differ=("model.encoder.embed_tokens",))
    tie(folder, tmp_path / "tied")
    theirs = families.library("marian", tmp_path / "tied")
    assert theirs.lm_head.weight is theirs.model.decoder.embed_tokens.weight
    assert torch.equal(families.answers(theirs), families.answers(families.library("marian", folder)))


@pytest.mark.parametrize("name", TABLES)
def test_share_tie_by_request_stores_the_mean_of_tables_that_differ(tmp_path, name):
    folder = apart(name, tmp_path / "apart", differ=TABLES[name])
    with pytest.raises(StageError, match="no two tensors of the checkpoint are equal"):
        tie(folder, tmp_path / "refused")
    tie(folder, tmp_path / "tied", tables="mean")
    read = [table.detach() for table in tables(load_model(folder), name)][-3:]  # what is shared only lends its weight
    theirs = families.library(name.partition("_")[0], tmp_path / "tied")
    (one,) = {id(table): table for table in tables(theirs, name)}.values()
    one = one.detach()
    assert torch.allclose(one, sum(read) / 3, atol=1e-6)
    rows = {row["layer"]: row for row in json.loads((tmp_path / "tied" / "layers.json").read_text())["layers"]}
    for path, old in zip(TABLES[name][-3:], read, strict=True):
        change = float((one - old).norm() / old.norm())
        assert rows[f"{path}.weight"]["relative_change"] == pytest.approx(change, rel=1e-4)


def test_share_tie_by_request_of_tables_of_two_vocabularies_is_refused(tmp_path):
    made, config, settings = families.FAMILIES["marian"]
    settings = settings | {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 80}
    getattr(transformers, made)(
        getattr(transformers, config)(vocab_size=families.VOCABULARY, **settings)
    ).save_pretrained(tmp_path / "two")
    with pytest.raises(StageError, match=r"cannot be one tensor; measured \(96, 32\); limit \(80, 32\)"):
        tie(tmp_path / "two", tmp_path / "tied", tables="mean")


def test_share_params_refuse_a_projection_that_stands_twice():
    with pytest.raises(ValidationError, match="q stands in two projections"):
        ShareParams(projections=("q+k", "q+k+v"))
    with pytest.raises(ValidationError, match="basis leaves the tables alone"):
        ShareParams(tables="mean")
    with pytest.raises(ValidationError, match="recursive takes whole blocks; `projections` goes with basis"):
        ShareParams(method="recursive", projections=("q",))
    with pytest.raises(ValidationError, match="leave `keep` and `group` out"):
        ShareParams(method="tie", keep=0.5)
    assert ShareParams.model_validate(ShareParams(method="tie").model_dump()).method == "tie"
    with pytest.raises(ValidationError):
        ShareParams(group=1)
    with pytest.raises(ValidationError):
        ShareParams(projections=("q+o",))
