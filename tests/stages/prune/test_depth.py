import pytest
import torch

from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.loading import load_model, save_model
from stages.prune.depth import drop_blocks
from stages.runtime.contract import StageError
from tests.stages.models.families import BLOCKS, FAMILIES, answers, family, library


@pytest.mark.parametrize("name", FAMILIES)
def test_drop_blocks_of_every_family_loads_again_here_and_in_transformers(name, tmp_path):
    folder = family(name, tmp_path)
    model, whole = load_model(folder), load_model(folder)
    stacks = list(anatomy.stacks(model))
    last = len(anatomy.blocks(model)) - 1
    drop_blocks(model, {1, last} if len(stacks) > 1 else {1})
    layers = anatomy.stacks(model)
    assert next(len(one) for one in layers.values()) == BLOCKS - 1
    assert sum(len(one) for one in layers.values()) == last + 1 - len(stacks)
    expected = [f"{stacks[0]}.0", f"{stacks[0]}.2"]
    for old, block in zip(expected, anatomy.blocks(model), strict=False):
        for a, b in zip(whole.get_submodule(old).parameters(), block.module.parameters(), strict=True):
            assert torch.equal(a, b)
    save_model(model, tmp_path / "a", like=folder)
    assert not (tmp_path / "a" / "structure.json").exists()
    assert torch.equal(answers(load_model(tmp_path / "a")), answers(model))
    assert torch.allclose(answers(library(name, tmp_path / "a")), answers(model), atol=1e-5)
    assert not torch.allclose(answers(model), answers(whole))


def test_drop_blocks_that_cannot_go_are_refused(tmp_path):
    with pytest.raises(StageError, match=r"encoder\.block\.0 holds the positions that all its blocks read"):
        drop_blocks(load_model(family("t5", tmp_path)), [0])
    with pytest.raises(StageError, match=r"model\.layers would have no block left"):
        drop_blocks(load_model(family("llama", tmp_path)), range(BLOCKS))
