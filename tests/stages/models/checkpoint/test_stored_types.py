"""What came in 16 bits goes in 16 bits, tensor by tensor, in every family."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.roles import is_map
from stages.models.checkpoint.files import read
from stages.models.checkpoint.loading import load_model, save_model
from stages.models.layers import low_rank_linear
from stages.models.memory.pages import release
from stages.runtime.contract import StageError
from tests.stages.models.families import FAMILIES, WIDER, answers, family, library

SHORT = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


def shortened(name, root, dtype):
    """A family's checkpoint in 16 bits but for its last vector, which stays in float32."""
    folder = root / f"{name}-{dtype}"
    if not folder.is_dir():
        dense = family(name, root)
        tensors = load_file(dense / "model.safetensors")
        wide = [key for key, one in tensors.items() if one.dim() == 1][-1]
        folder.mkdir()
        short = {key: one if key == wide or not one.is_floating_point() else one.to(dtype)
                 for key, one in tensors.items()}  # fmt: skip
        save_file(short, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((dense / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return folder


def types(folder):
    return {name: one.dtype for name, one in load_file(folder / "model.safetensors").items()}


def maps(model):
    return [one for block in anatomy.blocks(model) for one in block.module.modules() if is_map(one)]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES | WIDER)
def test_family_in_sixteen_bits_is_written_in_its_own_types_and_opens_in_the_library(name, root, tmp_path):
    folder = shortened(name, root, torch.bfloat16)
    model = load_model(folder)
    for one in maps(model):
        one.weight[:, ::2] = 0
    written = save_model(model, tmp_path, like=folder)
    assert types(tmp_path) == types(folder)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "model.safetensors").stat().st_size <= (folder / "model.safetensors").stat().st_size
    assert all(not one.weight[:, ::2].any() for one in maps(written))
    ours, theirs = answers(load_model(tmp_path)), answers(library(name, tmp_path))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_tensors_that_surgery_makes_get_the_type_of_the_checkpoint(root, tmp_path):
    folder = shortened("mistral", root, torch.float16)
    model = load_model(folder)
    path = "model.layers.0.mlp.up_proj"
    low_rank_linear.install(model, {"shared": [{"modules": [path], "rank": 4}]})
    with torch.no_grad():
        for one in model.get_submodule(path).parameters():
            one.normal_()
    save_model(model, tmp_path, like=folder)
    made = types(tmp_path)
    assert made[f"{path}.basis.weight"] == made[f"{path}.coefficient.weight"] == torch.float16


def test_what_is_beyond_sixteen_bits_is_refused_by_name(root, tmp_path):
    folder = shortened("mistral", root, torch.float16)
    model = load_model(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 7e4
    with pytest.raises(StageError, match=r"layers\.1\.mlp\.up_proj\.weight has grown.*measured 70000.*65504"):
        save_model(model, tmp_path, like=folder)


def test_a_float32_file_stays_float32_and_its_configuration_is_put_right(root, tmp_path):
    folder = family("qwen2", root)
    model = load_model(folder)
    model.config.dtype = torch.bfloat16
    save_model(model, tmp_path, like=folder)
    assert set(types(tmp_path).values()) == {torch.float32}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mamba"])
def test_weights_widened_on_disk_are_those_widened_in_memory_and_go_back(name, dtype, root, tmp_path):
    folder = shortened(name, root, dtype)
    one, other = load_model(folder), load_model(folder, scratch=tmp_path / "scratch")
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) and theirs[key].dtype == torch.float32 for key in mine)
    assert not any((tmp_path / "scratch").iterdir())
    assert release(other) > 0
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    maps(other)[0].weight.data.zero_()  # private: nothing of it reaches a file
    assert all(bool(tensor.isfinite().all()) for tensor in read(folder).values())


def test_as_stored_each_parameter_keeps_its_type(root):
    model = load_model(shortened("mistral", root, torch.bfloat16), dtype=None)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16, torch.float32}
