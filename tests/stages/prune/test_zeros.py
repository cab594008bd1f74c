import pytest
import torch
from safetensors.torch import load_file

from stages.models.checkpoint.loading import load_model, save_model
from stages.prune import zeros
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.stages.models.families import VOCABULARY, answers, family, library


def asked(method, model):
    return zeros.How(method, "2:4", 0.5, tuple(zeros.linears(model)))


IDS = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "neox", "opt", "bert_masked"])
def test_sparsegpt_halves_every_map_of_a_family_and_the_library_answers_the_same(root, tmp_path, name):
    dense = family(name, root)
    model = load_model(dense)
    how = asked("sparsegpt", model)
    rows = zeros.sparsified(model, IDS, how, tmp_path / "state", Silent())
    save_model(model, tmp_path, like=dense)
    zeros.save_masks(model, how.names, tmp_path)
    found = zeros.proven(load_model(tmp_path), how, tmp_path)
    assert found.zeros == found.weights // 2 == sum(one.weight.numel() for one in zeros.linears(model).values()) // 2
    assert {row["layer"] for row in rows} == set(zeros.linears(model))
    assert len(load_file(tmp_path / zeros.MASKS)) == len(rows)
    torch.testing.assert_close(answers(library(name, tmp_path)), answers(load_model(tmp_path)))
    masked = load_model(dense)
    zeros.sparsified(masked, IDS, asked("magnitude", masked), tmp_path / "none", Silent())
    whole, ours, naive = (logits(one) for one in (load_model(dense), model, masked))
    assert (ours - whole).square().mean() < 0.7 * (naive - whole).square().mean()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_magnitude_halves_both_stacks_and_their_gradients_are_refused(root, tmp_path):
    model = load_model(family("t5", root))
    zeros.sparsified(model, IDS, asked("magnitude", model), tmp_path, Silent())
    assert all((one.weight == 0).float().mean() == 0.5 for one in zeros.linears(model).values())
    with pytest.raises(StageError, match="has two stacks"):
        zeros.sparsified(model, IDS, asked("gradient", model), tmp_path, Silent())


def test_a_zero_that_stands_by_chance_gets_no_mask_and_masks_that_came_are_kept(root, tmp_path):
    model = load_model(family("llama", root))
    paths = list(zeros.linears(model))
    with torch.no_grad():
        model.get_submodule(paths[1]).weight[0, 0] = 0.0
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    zeros.save_masks(model, paths[:1], folders[0])
    zeros.save_masks(model, paths[2:3], folders[1], folders[0])
    assert [sorted(load_file(folder / zeros.MASKS)) for folder in folders] == [
        [f"{paths[0]}.weight"],
        sorted(f"{path}.weight" for path in (paths[0], paths[2])),
    ]
