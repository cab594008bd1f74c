import itertools

import pytest
import torch

from stages.algorithms.allocation import Option
from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.loading import load_model, load_tokenizer
from stages.models.text.windows import windows
from stages.quantize import mixed_precision
from stages.quantize.rounding import Precision
from stages.runtime.contract import StageError
from tests.stages.models.families import family

FORMS = [Precision("int8"), Precision("int4", block=64)]


@pytest.fixture(scope="module")
def measured(tiny, shared_store, topics, tmp_path_factory):
    model = load_model(tiny)
    ids_NT = windows(shared_store.checkout(topics), "calibrate", load_tokenizer(tiny), 128, most=4)
    return model, mixed_precision.measured(
        model, ids_NT, FORMS, tmp_path_factory.mktemp("shelf"), lambda done, total: None
    )


def test_every_map_is_measured_and_four_bits_lose_more_than_eight(measured):
    _, parts = measured
    assert len(parts) == 42
    assert all(option.damage > 0 for options in parts.values() for option in options)
    assert parts["model.layers.0.mlp.up_proj"][0].saved == 192 * (64 * 8 + 32) - 192 * (64 * 4 + 16)


def test_bits_are_those_of_the_stored_tensors(tiny):
    from stages.quantize.stored_forms import rounded

    w_OI = torch.randn(32, 64)
    for form, block in (("int8", None), ("int4", 16), ("nvfp4", 16), ("mxfp4", 32), ("fp8_e4m3", None)):
        stored = rounded(w_OI, form, block, None)
        assert mixed_precision.bits(Precision(form, block), 64, 32) == sum(
            8 * t.numel() * t.element_size() for t in stored.values()
        )


def test_under_bits_keeps_the_limit_and_the_sensitive_maps(measured):
    model, parts = measured
    chosen = mixed_precision.under_bits(parts, model, FORMS, 5.0)
    shapes = {name: model.get_submodule(name).weight.shape for name in parts}
    stored = sum(mixed_precision.bits(chosen[name], i, o) for name, (o, i) in shapes.items())
    weights = sum(o * i for o, i in shapes.values())
    assert 4.8 < stored / weights <= 5.0
    price = {name: options[0].damage / options[0].saved for name, options in parts.items()}
    kept = [price[name] for name, one in chosen.items() if one.form == "int8"]
    small = [price[name] for name, one in chosen.items() if one.form == "int4"]
    assert sorted(kept)[0] >= sorted(small)[-2]  # the one that crosses the limit may be out of order


def test_under_bits_that_cannot_be_met_says_the_best(measured):
    model, parts = measured
    with pytest.raises(StageError, match=r"measured 4\.250 bits a weight at best; limit 4"):
        mixed_precision.under_bits(parts, model, FORMS, 4.0)


def test_under_loss_is_the_smallest_of_all_choices_on_small_problems():
    made = torch.Generator().manual_seed(0)
    for _ in range(20):
        loss = torch.rand(5, generator=made).tolist()
        parts = {str(i): [Option(10, one, 1)] for i, one in enumerate(loss)}
        chosen = mixed_precision.under_loss(parts, FORMS, 1.0)
        saved = sum(10 for one in chosen.values() if one.form == "int4")
        every = itertools.product((0, 1), repeat=5)
        best = max(10 * sum(pick) for pick in every if sum(p * c for p, c in zip(pick, loss, strict=True)) <= 1.0)
        assert saved == best
        assert sum(loss[int(name)] for name, one in chosen.items() if one.form == "int4") <= 1.0


def test_under_no_loss_leaves_all_as_they_are(measured):
    _, parts = measured
    assert {one.form for one in mixed_precision.under_loss(parts, FORMS, 0.0).values()} == {"int8"}


@pytest.mark.parametrize(
    "name", ["gpt2", "neox", "bloom", "phi3", "opt", "bert_masked", "albert", "t5", "marian", "qwen3"]
)
def test_every_map_of_any_family_is_measured(name, tmp_path):
    model = load_model(family(name, tmp_path / "made"))
    ids_NT = 3 + torch.arange(4 * 20).view(4, 20) * 7 % 50
    parts = mixed_precision.measured(model, ids_NT, [Precision("int8"), Precision("int4", block=8)], tmp_path, print)
    wanted = {f"{block.name}.{path}" for block in anatomy.blocks(model) for path in anatomy.maps(block)}
    assert parts.keys() == wanted and all(option.damage > 0 for options in parts.values() for option in options)
