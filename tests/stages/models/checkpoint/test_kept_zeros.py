import json

import pytest
import torch

from stages.models.checkpoint import kept_zeros
from stages.models.checkpoint.layout import choose
from stages.models.checkpoint.loading import load_model, save_model
from stages.quantize.params import QuantizeParams
from stages.quantize.stage import quantize
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.stages.models.families import family

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def cut(tmp_path):
    """A Llama whose weights stand on a grid of few values, and half of those of one map at zero anywhere."""
    source = family("llama", tmp_path)
    model, folder = load_model(source), tmp_path / "cut"
    weight = model.get_parameter(NAME)
    with torch.no_grad():
        step = weight.abs().max() / 3
        weight.copy_((weight / step).round().clamp(-3, 3) * step)
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    written = save_model(model, folder, like=source)
    kept_zeros.save(written, [NAME], folder)
    return folder


def changed(folder, index, value):
    """The model of a folder with another number in one place of the pruned map."""
    model = load_model(folder)
    with torch.no_grad():
        model.get_parameter(NAME).view(-1)[index] = value
    return model


def test_what_the_checkpoint_says_was_pruned_is_and_a_zero_by_chance_is_not(cut):
    model = load_model(cut)
    other = model.get_parameter(NAME.replace("layers.1", "layers.0"))
    with torch.no_grad():
        other[0, :2] = 0.0
    assert kept_zeros.is_pruned(model.get_parameter(NAME)) and not kept_zeros.is_pruned(other)
    assert "zeros.json" in choose_names(cut)
    (cut / "zeros.json").unlink()
    assert not kept_zeros.is_pruned(load_model(cut).get_parameter(NAME))  # of a grid zero is a value like others


def choose_names(folder):
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return choose(folder).files


@torch.no_grad()
def test_zeros_are_counted_and_one_that_was_filled_is_refused(cut, tmp_path):
    zeros, weight = json.loads((cut / "zeros.json").read_text()), load_model(cut).get_parameter(NAME)
    count, out = int((weight == 0).sum()), tmp_path / "out"
    out.mkdir()
    assert zeros == {NAME: count}
    assert kept_zeros.carried(cut, load_model(cut), out) == {"zeros_before": count, "zeros": count}
    assert (out / "zeros.json").read_bytes() == (cut / "zeros.json").read_bytes()
    # One more zero stands where a weight came, and a weight where a zero did: the numbers alone would not tell.
    gone, stood = (int(one.flatten().int().argmax()) for one in (weight == 0, weight != 0))
    filled = changed(cut, gone, 1.0)
    filled.get_parameter(NAME).view(-1)[stood] = 0.0
    assert kept_zeros.counted(cut, filled) == {"zeros_before": count, "zeros": count}
    with pytest.raises(StageError, match=f"{NAME} lost zeros that were put there.*1 weights too many"):
        kept_zeros.carried(cut, filled, out)


def test_a_checkpoint_that_lost_its_zeros_on_the_way_is_named(cut, tmp_path):
    gone = int((load_model(cut).get_parameter(NAME) == 0).flatten().int().argmax())
    trained = tmp_path / "trained"
    save_model(changed(cut, gone, 1.0), trained, like=cut)
    (trained / "zeros.json").write_bytes((cut / "zeros.json").read_bytes())
    params = QuantizeParams(scheme="int8_weight_only")
    with pytest.raises(
        StageError, match=rf"{NAME} of .*trained has not the zeros that zeros.json says.*delete .*"
    ) as e:
        quantize(params, {"model": trained}, tmp_path / "out", Silent())
    assert str(trained / "zeros.json") in str(e.value)
    (trained / "zeros.json").unlink()  # as it was told
    assert "zeros" not in quantize(params, {"model": trained}, tmp_path / "again", Silent())


def test_counts_of_another_model_are_refused_by_name(cut):
    (cut / "zeros.json").write_text(json.dumps({"model.layers.9.mlp.down_proj.weight": 3}))
    with pytest.raises(StageError, match=r"zeros.json is damaged, or of another model.*layers\.9.*delete it"):
        load_model(cut)


def test_a_count_that_is_no_number_is_refused_by_name(cut):
    put = json.loads((cut / "zeros.json").read_text())
    (cut / "zeros.json").write_text(json.dumps(dict.fromkeys(put, "many")))
    with pytest.raises(StageError, match=r"zeros.json is damaged.*has no whole number.*delete it"):
        load_model(cut)
