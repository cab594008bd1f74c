"""Moments by source: each is that of its own windows, as if there were no others."""

import pytest
import torch

from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise.block_sites import AT_ONCE
from stages.models.blockwise.compress import compress
from stages.models.blockwise.map_statistics import BySource, statistics_of
from stages.models.blockwise.technique import OnWeights
from stages.models.checkpoint.loading import load_model
from tests.stages.models.families import VOCABULARY, family

NAMES = ("a", "a", "b", "a", "b", "a", "a")
"""Of calls of two windows, one holds both sources."""
WRITES = {
    "llama": ("o_proj", "down_proj"),
    "gpt2": ("c_proj",),
    "bert_masked": ("attention.output.dense", "output.dense"),
}
"""Maps whose output goes into the residual stream."""


class Watching:
    """Changes nothing, and keeps what a pass saw."""

    def __init__(self):
        self.seen = {}

    def compress(self, block, maps, seen):
        for path in maps:
            self.seen[f"{block.name}.{path}"] = (seen.moment_II.clone(), dict(seen.sources))
        return {}

    def apply(self, model, path, tensors):
        raise AssertionError("nothing was changed")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


def windows():
    return torch.randint(3, VOCABULARY, (len(NAMES), 16), generator=torch.Generator().manual_seed(5))


def of(ids_NT, name):
    return ids_NT[[one == name for one in NAMES]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_masked"])
def test_a_pass_sees_each_source_as_a_pass_over_its_windows_alone_does(root, tmp_path, name):
    assert AT_ONCE == 2
    ids_NT, folder = windows(), family(name, root)
    mixed = Watching()
    compress(load_model(folder), ids_NT, OnWeights(mixed, sources=lambda _block, _site: NAMES), tmp_path / "mixed")
    for source in "ab":
        alone = Watching()
        compress(load_model(folder), of(ids_NT, source), OnWeights(alone), tmp_path / source)
        assert alone.seen.keys() == mixed.seen.keys()
        for path, (whole_II, none) in alone.seen.items():
            assert none == {}
            assert list(mixed.seen[path][1]) == ["a", "b"]
            torch.testing.assert_close(mixed.seen[path][1][source], whole_II, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_of_two_stacks_the_whole_is_made_of_the_sources(root, tmp_path, name):
    """What a decoder reads of an encoder counts every position, what it reads of itself only those before its end."""
    mixed = Watching()
    how = OnWeights(mixed, sources=lambda _block, _site: NAMES)
    compress(load_model(family(name, root)), windows(), how, tmp_path / "mixed")
    for whole_II, each in mixed.seen.values():
        parts = torch.stack([each[source].flatten() for source in "ab"], dim=1).double()
        shares = torch.linalg.lstsq(parts, whole_II.flatten()[:, None].double()).solution[:, 0]
        assert float(shares.sum()) == pytest.approx(1, abs=1e-3)
        torch.testing.assert_close((parts @ shares).float(), whole_II.flatten(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_masked"])
def test_statistics_have_each_source_as_those_of_its_windows_alone(root, tmp_path, name):
    ids_NT, folder = windows(), family(name, root)
    model = load_model(folder)
    down = {block.index: anatomy.roles(block)["down"] for block in anatomy.blocks(model)}

    def statistics(ids, place, *more):
        found = statistics_of(model, ids, tmp_path / place, lambda *_: None, *more)
        return {block.index: seen for block, seen in found}

    mixed = statistics(ids_NT, "mixed", BySource(NAMES, lambda block: [down[block.index]]))
    plain = statistics(ids_NT, "plain")
    for source in "ab":
        for index, alone in statistics(of(ids_NT, source), source).items():
            seen, site = mixed[index], alone.first[down[index]]
            assert list(seen.sources) == [site]
            torch.testing.assert_close(seen.sources[site][source], alone.moments[site], rtol=1e-3, atol=1e-5)
    for index, seen in plain.items():
        assert seen.sources == {}
        assert all(torch.equal(seen.moments[site], mixed[index].moments[site]) for site in seen.moments)
        assert all(torch.equal(seen.gradients[path], mixed[index].gradients[path]) for path in seen.gradients)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_masked"])
def test_a_pass_takes_no_moments_of_sites_that_are_not_read(root, tmp_path, name):
    """What the others see is as if all had been read."""

    def watched(place, **how):
        change = Watching()
        compress(load_model(family(name, root)), windows(), OnWeights(change, **how), tmp_path / place)
        return change.seen

    asked = []

    def only_adding(block, site, adding):
        asked.append((block.index, tuple(site)))
        return bool(adding)

    every, some = watched("every"), watched("some", reads=only_adding)
    assert some.keys() == {path for path in every if path.endswith(tuple(WRITES[name]))}
    assert all(torch.equal(seen[0], every[path][0]) for path, seen in some.items())
    assert len(asked) == len(set(asked)) > len(some)
