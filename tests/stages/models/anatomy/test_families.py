import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.attention import attentions, feed_forward
from stages.models.checkpoint.loading import load_model, save_model
from stages.runtime.contract import StageError
from tests.stages.models.families import BLOCKS, FAMILIES, HEADS, INNER, WIDTH, answers, family, library


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


every = pytest.mark.parametrize("name", FAMILIES)


@every
def test_family_loads_saves_and_loads_again_here_and_in_transformers(name, root, tmp_path):
    folder = family(name, root)
    theirs = answers(library(name, folder))
    ours = load_model(folder)
    assert torch.allclose(answers(ours), theirs, atol=1e-5)
    save_model(ours, tmp_path / "a", like=folder)
    assert torch.equal(answers(load_model(tmp_path / "a")), answers(ours))
    assert torch.allclose(answers(library(name, tmp_path / "a")), theirs, atol=1e-5)
    assert not (tmp_path / "a" / "structure.json").exists()
    original = load_file(folder / "model.safetensors")
    for key, tensor in load_file(tmp_path / "a" / "model.safetensors").items():
        assert torch.equal(tensor, original[key])
    assert load_file(tmp_path / "a" / "model.safetensors").keys() == original.keys()
    save_model(load_model(tmp_path / "a"), tmp_path / "b", like=tmp_path / "a")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@every
def test_family_blocks_and_maps_are_found_by_structure(name, root):
    model = load_model(family(name, root))
    found = anatomy.blocks(model)
    assert [block.index for block in found] == list(range(len(found)))
    two = model.config.is_encoder_decoder
    assert len(found) == (BLOCKS + (2 if name.startswith("t5") else BLOCKS) if two else BLOCKS)
    expected = ["encoder"] * BLOCKS + ["decoder"] * (len(found) - BLOCKS) if two else None
    encoders = (
        "bert_masked",
        "bert_classes",
        "bert_tokens",
        "bert_answers",
        "bert_choices",
        "bert_bare",
        "bert_untied",
        "roberta",
        "distilbert",
    )
    expected = expected or [("encoder" if name in encoders else "decoder")] * BLOCKS
    assert [block.stack for block in found] == expected
    for block in found:
        assert model.get_submodule(block.name) is block.module
        maps = anatomy.maps(block)
        assert all(isinstance(one, nn.Linear) for one in maps.values())
        matrices = [p for n, p in block.module.named_parameters() if p.dim() == 2 and "relative_attention" not in n]
        assert {id(one.weight) for one in maps.values()} == {id(p) for p in matrices}
        named = anatomy.roles(block)
        assert sorted(named.values()) == sorted(maps)
        for role, one in anatomy.projections(block).items():
            assert block.module.get_submodule(anatomy.path(role, block)) is one


@every
def test_family_heads_in_another_order_give_the_same_answers(name, root):
    model = load_model(family(name, root))
    before = answers(model)
    changed = 0
    with torch.no_grad():
        for block in anatomy.blocks(model):
            for one in attentions(block).values():
                assert (one.heads, one.head_dim) == (HEADS, 6 if name.startswith("t5") else WIDTH // HEADS)
                if any("relative_attention_bias" in n for n, _ in block.module.named_modules()) or name.startswith(
                    "t5"
                ):
                    continue  # T5's heads differ by their positions
                order = torch.arange(one.kv_heads).flip(0)
                groups = torch.arange(one.heads).view(one.kv_heads, -1)[order].flatten()
                for role in "qkv":
                    rows = one.rows(role)
                    fused = one.maps.get("qkv") or one.maps[role]
                    new = rows[groups if role == "q" else order].flatten()
                    for tensor in fused.parameters():
                        tensor[rows.flatten()] = tensor[new].clone()
                columns = one.rows("o")
                o = one.maps["o"].weight
                o[:, columns.flatten()] = o[:, columns[groups].flatten()].clone()
                changed += 1
    assert changed or name.startswith("t5")
    assert torch.allclose(answers(model), before, atol=2e-5)


@every
def test_family_channels_in_another_order_give_the_same_answers(name, root):
    model = load_model(family(name, root))
    before = answers(model)
    with torch.no_grad():
        for block in anatomy.blocks(model):
            one = feed_forward(block)
            order = torch.randperm(INNER, generator=torch.Generator().manual_seed(block.index))
            for inner in (one.gate, one.up):
                for tensor in inner.parameters() if inner is not None else ():
                    tensor.copy_(tensor[order])
            one.down.weight.copy_(one.down.weight[:, order])
    assert torch.allclose(answers(model), before, atol=2e-5)


PRE_NORM = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "neox", "opt")


@every
def test_family_norms_are_those_that_the_maps_read_or_are_refused(name, root):
    model = load_model(family(name, root))
    block = anatomy.blocks(model)[1]
    if name not in PRE_NORM and not name.startswith("t5"):
        with pytest.raises(StageError, match=r"the norms of .*\.1 are not understood"):
            anatomy.norms(block)
        return
    seen = {}
    for role, one in anatomy.projections(block).items():
        one.register_forward_hook(lambda _m, args, _o, role=role: seen.__setitem__(role, args[0]))
    for role, norm in anatomy.norms(block).items():
        norm.register_forward_hook(lambda _m, _a, out, role=role: seen.__setitem__(role, out))
    answers(model)
    for norm, readers in (("attention", ("q", "k", "v", "qkv")), ("mlp", ("gate", "up"))):
        for role in readers:
            if role in seen:
                assert torch.equal(seen[role].view_as(seen[norm]), seen[norm])


def test_family_whose_blocks_differ_in_size_loads_through_structure_json(root, tmp_path):
    for name in ("llama", "gpt2", "bert_masked", "bart", "t5"):
        folder = family(name, root)
        model = load_model(folder)
        block = anatomy.blocks(model)[-1]
        one = feed_forward(block)
        for role, linear in (("gate", one.gate), ("up", one.up)):
            if linear is not None:
                new = nn.Linear(WIDTH, INNER - 9, bias=linear.bias is not None)
                model.set_submodule(f"{block.name}.{anatomy.path(role, block)}", new)
        new = nn.Linear(INNER - 9, WIDTH, bias=True)
        model.set_submodule(f"{block.name}.{anatomy.path('down', block)}", new)
        save_model(model, tmp_path / name, like=folder)
        again = load_model(tmp_path / name)
        assert torch.equal(answers(again), answers(model))
        sizes = json.loads((tmp_path / name / "structure.json").read_text())["sizes"]
        up = sizes[f"{block.name}.{anatomy.path('up', block)}"]
        assert up == {"out_features": INNER - 9}
        down = sizes[f"{block.name}.{anatomy.path('down', block)}"]
        assert down == {"in_features": INNER - 9} | ({} if one.down.bias is not None else {"bias": True})
        save_model(again, tmp_path / f"{name}2", like=tmp_path / name)
        for path in (tmp_path / name).iterdir():
            assert path.read_bytes() == (tmp_path / f"{name}2" / path.name).read_bytes()
