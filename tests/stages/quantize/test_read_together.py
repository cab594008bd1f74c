"""Sites of models of any type, found by running: what reads one tensor has one range."""

import pytest
import torch

from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.loading import load_model
from stages.quantize.input_ranges import How, decided
from stages.quantize.movable_scales import read_together
from stages.quantize.rounding import names
from stages.runtime.contract import StageError
from tests.stages.models.families import family

IDS = 3 + torch.arange(4 * 20).view(4, 20) * 7 % 50


@pytest.mark.parametrize(
    "name", ["gpt2", "neox", "bloom", "phi3", "gemma3", "opt", "bert_masked", "electra", "deberta"]
)
def test_every_map_has_a_range_that_holds_what_it_reads(name, tmp_path):
    model, read = load_model(family(name, tmp_path)), {}
    every = read_together(model, IDS[:1, :8])
    decisions = decided(model, names(model), IDS, How("int8", "minmax", (0.0,), 0.0), every)

    def hear(path, x):
        read[path] = max(read.get(path, 0.0), float(x.detach().abs().max()))

    for path, one in model.named_modules():
        if path in names(model):
            one.register_forward_pre_hook(lambda _m, args, path=path: hear(path, args[0]))
    with torch.no_grad():
        model(input_ids=IDS)
    scales = {path: one.input_scale for one in decisions for path in one.site.readers}
    assert scales.keys() == set(names(model))
    for path, scale in scales.items():
        assert scale == pytest.approx(read[path] / 127, rel=0.02), path  # seen in a short float
    assert all(bool((one.factor_F == 1).all()) for one in decisions)
    spared = decided(model, names(model), IDS, How("int8", "search", (0.0,), 0.3), every)
    weights = {one.site.name: sum(r.weight.numel() for r in one.site.readers.values()) for one in spared}
    left = sum(weights[one.site.name] for one in spared if one.input_scale is None)
    assert 0 < left <= 0.3 * sum(weights.values())


def test_sites_are_those_that_are_known_of_the_llama_type(tmp_path):
    from stages.quantize.movable_scales import sites

    model = load_model(family("llama", tmp_path))
    known, found = (
        {frozenset(site.readers) for site in one} for one in (sites(model), read_together(model, IDS[:1, :8]))
    )
    assert known == found and len(found) == 4 * len(anatomy.blocks(model))


def test_two_stacks_and_blocks_that_run_several_times_are_refused(tmp_path):
    for name in ("t5", "albert"):
        with pytest.raises(StageError):
            read_together(load_model(family(name, tmp_path)), IDS[:1, :8])
