import pytest
import torch

from stages.models.checkpoint.json_files import read_json
from stages.models.checkpoint.layout import ZEROS
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
    written = save_model(model, tmp_path, like=dense)
    zeros.save(written, how.names, tmp_path, dense)
    found = zeros.proven(model, written, how)
    assert found.zeros == found.weights // 2 == sum(one.weight.numel() for one in zeros.linears(model).values()) // 2
    assert {row["layer"] for row in rows} == set(zeros.linears(model))
    assert len(read_json(tmp_path / ZEROS)) == len(rows)
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


@torch.no_grad()
def test_a_zero_that_stands_by_chance_is_not_counted_and_those_that_came_are(root, tmp_path):
    model = load_model(family("llama", root))
    paths = list(zeros.linears(model))
    for place in range(3):
        model.get_submodule(paths[place]).weight[0, : place + 1] = 0.0
    folders = [tmp_path / "none", tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    zeros.save(model, [paths[0], paths[5]], folders[1], folders[0])
    zeros.save(model, paths[2:3], folders[2], folders[1])
    counted = [read_json(folder / ZEROS) for folder in folders[1:]]
    assert counted == [{f"{paths[0]}.weight": 1}, {f"{paths[0]}.weight": 1, f"{paths[2]}.weight": 3}]


@torch.no_grad()
def test_a_weight_that_is_written_where_there_was_a_zero_is_caught(root):
    model, written = (load_model(family("llama", root)) for _ in range(2))
    how = zeros.How("magnitude", None, 1.0, list(zeros.linears(model)))
    model.get_submodule(how.names[3]).weight[1, 2] = 0.0
    with pytest.raises(StageError, match=f"{how.names[3]} does not have the zeros.*1 weights too many"):
        zeros.proven(model, written, how)
    written.get_submodule(how.names[3]).weight[1, 2] = 0.0
    assert zeros.proven(model, written, how).zeros == 1


@pytest.mark.parametrize(
    "name", ["gpt2", "neox", "bloom", "phi3", "opt", "bert_masked", "albert", "t5", "marian", "qwen3"]
)
def test_zeros_without_a_pattern_are_spent_over_the_maps_of_any_family(name, tmp_path):
    model = load_model(family(name, tmp_path / "made"))
    maps = zeros.linears(model)
    ids = 3 + torch.arange(4 * 20).view(4, 20) * 7 % 50
    zeros.sparsified(model, ids, zeros.How("wanda", None, 0.6, tuple(maps)), tmp_path, Silent())
    weights = sum(one.weight.numel() for one in zeros.linears(model).values())
    left = [float((one.weight != 0).float().mean()) for one in zeros.linears(model).values()]
    kept = sum(int((one.weight != 0).sum()) for one in zeros.linears(model).values())
    assert 0.5 < kept / weights <= 0.6 + 1e-6 and max(left) - min(left) > 0.05, "where they cost least"
