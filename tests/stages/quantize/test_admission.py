"""What admission says of maps on bases that are yet to be made is what the work says of those that were made."""

import re

import pytest
import torch

from stages.factorize import FactorizeParams
from stages.factorize import admit as factorized
from stages.models.checkpoint.loading import load_model, outlined, save_model
from stages.models.checkpoint.subject import Subject
from stages.models.low_rank.products import Asked, compressed
from stages.prune import zeros
from stages.prune.admission import admitted as pruned
from stages.prune.params import PruneParams
from stages.quantize.admission import admitted
from stages.quantize.params import QuantizeParams
from stages.quantize.stage import quantize
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.stages.models.families import family

IDS = 3 + torch.arange(24).view(2, 12) * 7 % 90


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


def known(name, root):
    folder = family(name, root)
    return {"model": Subject(folder, outlined(folder, [folder / "model.safetensors"])[0], "generate")}


@pytest.fixture(scope="module")
def thin(root):
    """What admission knows of a model whose maps stand on bases, and one that was made."""
    folder = root / "thin"
    model = load_model(family("llama", root))
    compressed(model, IDS.clone(), Asked(0.6), root / "state", Silent())
    save_model(model, folder, like=family("llama", root))
    return {"model": factorized(FactorizeParams(keep=0.6), known("llama", root))}, {"model": folder}


def plainly(**params):
    return QuantizeParams(scheme="int4_weight_only", search="off", **params)


@pytest.mark.parametrize(
    "params",
    [
        {"block": 7},
        {"block": 7, "layers": ("*.coefficient",)},
        {"layout": "compressed-tensors", "embedding": "keep", "block": 8},
        {"layers": ("*.no_such",), "block": 8},
    ],
)
def test_maps_on_bases_are_refused_as_by_the_work(params, thin, tmp_path):
    with pytest.raises(StageError) as work:
        quantize(plainly(**params), thin[1], tmp_path / "out", Silent())
    with pytest.raises(StageError) as ahead:
        admitted(plainly(**params), thin[0])
    assert ahead.value.what == work.value.what


def test_the_remedy_for_blocks_beside_bases_works_word_for_word(thin, tmp_path):
    with pytest.raises(StageError) as ahead:
        admitted(plainly(block=7), thin[0])
    block = re.search(r"`block` to (\d+),", ahead.value.remedy)
    assert block
    mended = plainly(block=int(block[1]))
    assert admitted(mended, thin[0]).scheme == "int4_weight_only"
    assert quantize(mended, thin[1], tmp_path / "out", Silent())["quantized_maps"] > 21


def test_parts_of_maps_on_bases_can_be_named_before_they_are_made(thin):
    assert admitted(plainly(block=16, skip=("*.coefficient",)), thin[0]).scheme


def test_a_width_that_is_cut_beside_bases_is_known_by_what_it_is_a_multiple_of(thin):
    cut = {"model": pruned(PruneParams(keep=0.9, multiple=6), thin[0])}
    with pytest.raises(StageError, match="blocks of 8 do not divide"):
        admitted(plainly(block=8), cut)
    assert admitted(plainly(block=2), cut).loose == 2


@pytest.mark.parametrize("params", [{"method": "magnitude", "pattern": "2:4"}, {"method": "width"}])
def test_what_needs_dense_maps_is_refused_after_bases_as_by_the_work(params, thin):
    from stages.prune import width

    made = load_model(thin[1]["model"])
    with pytest.raises(StageError) as work:
        width._check_free(made) if params["method"] == "width" else zeros.linears(made)
    with pytest.raises(StageError) as ahead:
        pruned(PruneParams(**params), thin[0])
    assert ahead.value.remedy == work.value.remedy


def test_the_shapes_of_bases_that_lie_there_are_known(thin, tmp_path):
    folder = thin[1]["model"]
    from stages.models.checkpoint import layout
    from stages.models.checkpoint.subject import subject

    model, _ = outlined(folder, [folder / "model.safetensors"])
    given = subject(
        folder, model, layout.check_headers(folder, {"model.safetensors": folder / "model.safetensors"}), []
    )
    assert not given.loose and given.structured
    narrow = pruned(PruneParams(keep=0.8, multiple=4), {"model": given}).model
    inner = narrow.config.intermediate_size
    for name, one in narrow.named_modules():
        if name.endswith("down_proj"):
            assert one.in_features == inner
        if name.endswith(("gate_proj", "up_proj")):
            assert one.out_features == inner


def test_a_rotation_is_refused_where_it_is_not_known_as_by_the_work(root, tmp_path):
    params = QuantizeParams(scheme="int8_weight_only", search="off", rotation="heads")
    with pytest.raises(StageError) as work:
        quantize(params, {"model": family("gpt2", root)}, tmp_path / "out", Silent())
    with pytest.raises(StageError) as ahead:
        admitted(params, known("gpt2", root))
    assert str(ahead.value) == str(work.value)


def test_blocks_that_do_not_divide_the_map_whose_type_t5_asks_for_are_refused(root):
    with pytest.raises(StageError, match="blocks of 64 do not divide every layer's inputs; measured 24, 32, 48 inputs"):
        admitted(QuantizeParams(scheme="int4_weight_only", block=64, search="off"), known("t5", root))
