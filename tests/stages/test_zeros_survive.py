"""Zeros that prune put into weights are zeros after every later verb, each of which counts them."""

import json

import pytest
import torch
from torch import nn

from stages.fuse import merging
from stages.fuse.stage import FuseParams, fuse
from stages.models.checkpoint.loading import load_model, save_model
from stages.models.layers.quantized_linear import QuantizedLinear
from stages.prune import zeros
from stages.quantize.params import QuantizeParams
from stages.quantize.stage import quantize
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.conftest import sealer
from tests.stages.models.families import FAMILIES, WIDER, family

SHORT = {"windows": 4, "window_tokens": 64}
ZEROS = "zeros.json"


class Told(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def maps(folder):
    """The maps of a checkpoint as they compute, by the names of their weights."""
    found = {}
    for path, one in load_model(folder).named_modules(remove_duplicate=False):
        if isinstance(one, nn.Linear | QuantizedLinear):
            found[f"{path}.weight"] = one.dequantized() if isinstance(one, QuantizedLinear) else one.weight.detach()
    return found


def standing(folder, *before):
    """Weights where all that it was made from have zeros, zeros of the pruned maps, and zeros that came."""
    came, made = [maps(one) for one in before], maps(folder)
    wrong = found = asked = 0
    for name in json.loads((folder / ZEROS).read_text()):
        zeros_OI = torch.stack([one[name] == 0 for one in came]).all(0)
        wrong += int((made[name][zeros_OI] != 0).sum())
        found, asked = found + int((made[name] == 0).sum()), asked + int(zeros_OI.sum())
    return wrong, found, asked


@pytest.fixture(scope="module", params=[{"pattern": "2:4"}, {"keep": 0.6}], ids=["2:4", "anywhere"])
def pruned(request, shared_store, dense, topics):
    params = {"method": "magnitude"} | request.param | SHORT
    return sealer(shared_store)("prune", params, model=dense, text=topics).identity


@pytest.fixture(scope="module")
def recovered(shared_store, pruned, dense, topics):
    how = {"tokens": 1024, "window_tokens": 64, "learning_rate": 1e-3, "check_every_steps": 2, "update": "sparse"}
    return sealer(shared_store)("recover", how, model=pruned, teacher=dense, text=topics)


@pytest.fixture(scope="module")
def fused(shared_store, pruned, recovered):
    inputs = {"models.0": recovered.identity, "models.1": pruned}
    return sealer(shared_store)("fuse", {"method": "soup"}, **inputs)


def test_zeros_stay_and_are_counted_where_weights_stay_float(pruned, recovered, fused, shared_store):
    first = shared_store.checkout(pruned)
    for outcome in (recovered, fused):
        wrong, found, asked = standing(shared_store.checkout(outcome.identity), first)
        assert wrong == 0 and found == asked > 0
        assert outcome.manifest.metrics["zeros"] == outcome.manifest.metrics["zeros_before"] == asked


@pytest.mark.parametrize(
    "params",
    [
        {"scheme": "int8_w8a8"},
        {"scheme": "int8_w8a8", "smoothing": 0.5, "search": "off"},
        {"scheme": "int4_weight_only", "block": 16},
        {"scheme": "nvfp4"},
        {"scheme": "fp8_e4m3"},
        {"scheme": "auto", "bits": 6.0, "block": 16},
        {"scheme": "bf16"},
    ],
    ids=lambda params: "-".join(map(str, params.values())),
)
def test_zeros_stay_through_quantize(params, fused, shared_store, topics, tmp_path):
    told, model = Told(), shared_store.checkout(fused.identity)
    (tmp_path / "out").mkdir()
    inputs = {"model": model, "text": shared_store.checkout(topics)}
    metrics = quantize(QuantizeParams(**params | SHORT), inputs, tmp_path / "out", told)
    wrong, found, asked = standing(tmp_path / "out", model)
    assert wrong == 0 and found >= asked > 0
    assert (metrics["zeros"], metrics["zeros_before"]) == (found, asked)
    assert (tmp_path / "out" / ZEROS).read_bytes() == (model / ZEROS).read_bytes()
    if params in ({"scheme": "int8_w8a8"}, {"scheme": "fp8_e4m3"}):
        assert any("zeros that a rotation would fill" in note for note in told.notes)


@pytest.mark.parametrize("rotation", ["heads", "stream"])
def test_a_rotation_that_was_asked_for_and_would_fill_zeros_is_refused(
    rotation, recovered, shared_store, topics, tmp_path
):
    inputs = {"model": shared_store.checkout(recovered.identity), "text": shared_store.checkout(topics)}
    params = QuantizeParams(scheme="int4_weight_only", block=16, rotation=rotation, **SHORT)
    with pytest.raises(StageError, match=r"has zeros that a rotation would fill.*Set `rotation: off`"):
        quantize(params, inputs, tmp_path, Silent())


def test_zeros_that_a_later_verb_fills_are_counted(pruned, topics, shared_store):
    made = sealer(shared_store)("factorize", {"keep": 0.8} | SHORT, model=pruned, text=topics)
    first = shared_store.checkout(pruned)
    _, found, asked = standing(first, first)
    assert made.manifest.metrics["zeros_before"] == found == asked > made.manifest.metrics["zeros"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@torch.no_grad()
@pytest.mark.parametrize("name", sorted((FAMILIES | WIDER).keys() - {"mamba"}))
def test_family_keeps_its_zeros_and_ties_through_fuse_and_quantize(name, root, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "_tokens", lambda folder: {})  # these have no tokenizer
    folder, ids_NT = family(name, root), torch.arange(40).view(2, 20) * 7 % 90
    model = load_model(folder)
    how = zeros.How("magnitude", "2:4", 0.5, list(zeros.linears(model)))
    zeros.sparsified(model, ids_NT, how, tmp_path / "state", Silent())
    for place in ("a", "b"):
        written = save_model(model, tmp_path / place, like=folder)
        zeros.save(written, how.names, tmp_path / place, folder)
        for weight in {id(one.weight): one.weight for one in zeros.linears(model).values()}.values():
            weight *= 1.5  # zeros stay
    (tmp_path / "fused").mkdir()
    fuse(FuseParams(), {"models.0": tmp_path / "a", "models.1": tmp_path / "b"}, tmp_path / "fused", Silent())
    quantize(QuantizeParams(scheme="int8_weight_only"), {"model": tmp_path / "fused"}, tmp_path / "int8", Silent())
    for place, came in (("fused", [tmp_path / "a", tmp_path / "b"]), ("int8", [tmp_path / "fused"])):
        wrong, found, asked = standing(tmp_path / place, *came)
        assert wrong == 0 and found >= asked > 0
    ties = [
        {name for name, one in load_model(at).named_parameters(remove_duplicate=False)}
        - {name for name, one in load_model(at).named_parameters()}
        for at in (folder, tmp_path / "fused")
    ]
    assert ties[0] == ties[1]
