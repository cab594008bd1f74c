"""A written checkpoint that does not answer as the model in memory is never sealed."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stages.models.anatomy.plainness import ask
from stages.models.checkpoint import same_answers
from stages.models.checkpoint.loading import load_model, save_model
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.stages.models.families import FAMILIES, WIDER, family


class Told(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("name", FAMILIES | WIDER)
def test_every_family_can_be_asked_and_what_is_written_answers_the_same(name, root, tmp_path):
    told = Told()
    save_model(load_model(family(name, root)), tmp_path, like=family(name, root), progress=told)
    assert not told.notes


def test_a_head_that_the_configuration_ties_but_memory_does_not_is_caught(root, tmp_path):
    model = load_model(family("llama", root))
    with torch.no_grad():  # untied without a word in the configuration
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.weight[5] += 1
    with pytest.raises(StageError, match=r"does not open.*tied by the configuration but differ.*report it"):
        save_model(model, tmp_path, like=family("llama", root))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "t5", "bert_classes"])
def test_a_map_that_no_file_describes_is_caught(name, root, tmp_path):
    model = load_model(family(name, root))
    path, one = next((path, one) for path, one in model.named_modules() if type(one) is nn.Linear)
    doubled = Doubled(one.in_features, one.out_features, bias=one.bias is not None)
    doubled.weight, doubled.bias = one.weight, one.bias
    model.set_submodule(path, doubled)
    with pytest.raises(StageError, match=r"does not answer as the model that was to be written.*report it"):
        save_model(model, tmp_path, like=family(name, root))


def test_a_field_that_the_configuration_lost_is_caught(root, tmp_path):
    model = load_model(family("qwen2", root))
    model.config.rms_norm_eps = 0.5  # the model's own modules were made with another
    with pytest.raises(StageError, match="its logits differ"):
        save_model(model, tmp_path, like=family("qwen2", root))


def test_a_file_changed_after_it_was_written_is_told_from_the_model_in_sixteen_bits(root, tmp_path):
    folder = shutil.copytree(family("mistral", root), tmp_path / "short")
    tensors = {key: one.bfloat16() for key, one in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = load_model(folder)
    kinds = {name: torch.bfloat16 for name, _ in model.named_parameters()}
    same_answers.check(model, load_model(folder, dtype=None), kinds, Silent())
    tensors["model.layers.2.self_attn.v_proj.weight"][0] *= 1.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageError, match="its logits differ"):
        same_answers.check(model, load_model(folder, dtype=None), kinds, Silent())
    assert {one.dtype for one in model.parameters()} == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bart", "bert_masked", "albert"])
def test_weights_are_their_own_again_after_a_model_was_asked(name, root):
    model = load_model(family(name, root))
    before = {key: one.clone() for key, one in model.state_dict().items()}
    exact = ask(model)
    kinds = dict.fromkeys(before, torch.bfloat16)
    rounded = same_answers._answers(model, kinds)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) and after[key].dtype == before[key].dtype for key in before)
    for key, one in model.named_parameters():
        one.copy_(before[key].bfloat16())
    for key, value in ask(model).items():
        assert torch.equal(value, rounded[key]) and not torch.equal(value, exact[key])


def test_a_model_that_wants_more_than_tokens_is_told_and_written(root, tmp_path):
    model = load_model(family("qwen2", root))

    def forward(self, *args, pixel_values=None, **more):
        raise ValueError("You have to specify pixel_values")

    model.__class__ = type("Qwen2ForCausalLM", (type(model),), {"forward": forward})
    told = Told()
    save_model(model, tmp_path, like=family("qwen2", root), progress=told)
    assert ["cannot be asked by tokens alone" in note for note in told.notes] == [True]


def test_an_error_that_is_not_the_architectures_own_is_no_excuse(root, tmp_path):
    model = load_model(family("qwen2", root))
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 31))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        same_answers.check(model, load_model(family("qwen2", root)), {}, Silent())


def test_what_is_no_number_fails_where_the_original_answered_one(root, tmp_path):
    model = load_model(family("qwen2", root))
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.weight[7] = 3e38  # finite, and its products are not
    with pytest.raises(StageError, match=r"logits of the checkpoint hold a NaN or an infinity where those of the one"):
        save_model(model, tmp_path / "out", like=family("qwen2", root))
    same_answers.check(model, model, {}, Silent(), original=lambda: model)  # no worse than it came


@pytest.mark.parametrize(
    ("mine", "theirs", "missed"),
    [
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0, float("nan")], [1.0, 0.0], float("inf")),
        ([1.0, 2.0], [1.0, float("nan")], float("inf")),
        ([1.0, float("inf")], [1.0, float("-inf")], float("inf")),
        ([1.0, float("-inf")], [1.5, float("-inf")], 0.5),
        ([4.0, 2.0], [4.0, 1.0], 0.25),
    ],
)
def test_a_difference_is_that_of_the_numbers_and_nothing_else_equals_one(mine, theirs, missed):
    assert same_answers._missed(torch.tensor(mine), torch.tensor(theirs)) == missed
