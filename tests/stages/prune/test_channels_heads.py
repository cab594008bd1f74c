import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from stages.algorithms.channels import reconstructed
from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise import site_moments
from stages.models.checkpoint.loading import load_model, save_model
from stages.prune import units as surgery
from stages.prune.channels_heads import narrow, plan, said
from stages.prune.target import Asked
from stages.prune.units import CHANNELS, HEADS
from stages.runtime.progress import Silent
from tests.stages.models.families import answers, family, library


def streams(model, ids, index):
    """What block `index` adds down's output to, what down reads, and what comes out."""
    seen = {}
    layer = model.model.layers[index]
    hooks = [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: seen.update(residual=args[0])),
        layer.mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.update(read=args[0])),
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen["residual"].flatten(0, 1), seen["read"].flatten(0, 1)


def test_channels_fit_each_down_to_the_dense_stream_on_what_the_narrowed_blocks_before_give(
    tiny, tmp_path, monkeypatch
):
    # Tokens at random leave nothing that both halves agree on: here the fit itself is looked at.
    monkeypatch.setattr(site_moments, "agreement", lambda *args: 0.5)
    ids = torch.randint(0, 768, (8, 64), generator=torch.Generator().manual_seed(1))
    dense, narrowed = load_model(tiny), load_model(tiny)
    asked = Asked(int(0.9 * anatomy.block_parameters(dense)), 8, "loss", tmp_path)
    narrow(narrowed, ids, CHANNELS, asked, Silent())
    residual, read = streams(dense, ids, 4)
    residual_now, read_now = streams(narrowed, ids, 4)
    old, new = (anatomy.projections(anatomy.blocks(m)[4]) for m in (dense, narrowed))
    with torch.no_grad():
        target = residual + read @ old["down"].weight.T - residual_now
        rows = {tuple(row.tolist()): j for j, row in enumerate(old["up"].weight)}
        kept = [rows[tuple(row.tolist())] for row in new["up"].weight]
        assert kept == sorted(set(kept))
        assert read_now.shape[1] == len(kept) == narrowed.config.intermediate_size
        best = torch.linalg.lstsq(read_now, target).solution.T
        full = streams(as_before(dense, narrowed, 4), ids, 4)[1]
        plain = reconstructed(old["down"].weight, full.T @ full / len(full), torch.tensor(kept)).float()
        errors = [
            float((target - read_now @ w.T).square().mean())
            for w in (best, new["down"].weight, plain, old["down"].weight[:, kept])
        ]
    assert errors == sorted(errors)
    assert errors[1] < 0.9 * errors[2]


def as_before(dense, narrowed, index):
    """The dense model on what the narrowed blocks before `index` give."""
    mixed = copy.deepcopy(dense)
    for before in range(index):
        mixed.model.layers[before] = narrowed.model.layers[before]
    mixed.model.layers[index].self_attn = narrowed.model.layers[index].self_attn
    return mixed


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("narrowed")


EXPRESSED = {  # what plain transformers has a field for
    ("gpt2", CHANNELS): ["n_inner"],
    ("phi3", CHANNELS): ["intermediate_size"],
    ("phi3", HEADS): ["head_dim", "num_attention_heads", "num_key_value_heads"],
    ("bart", CHANNELS): ["decoder_ffn_dim", "encoder_ffn_dim"],
    ("t5", CHANNELS): ["d_ff"],
    ("gemma2", HEADS): ["head_dim", "num_attention_heads", "num_key_value_heads"],
    ("falcon", CHANNELS): ["ffn_hidden_size"],
    ("bloom", CHANNELS): [],
    ("gpt2", HEADS): [],
    ("neox", HEADS): [],
    ("falcon", HEADS): [],
    ("bart", HEADS): [],
    ("albert", HEADS): [],
    ("distilbert", HEADS): [],
}


@torch.no_grad()
@pytest.mark.parametrize(("name", "what"), EXPRESSED)
def test_units_of_a_family_that_are_cut_out_leave_what_transformers_answers_where_nothing_reads_them(
    name, what, root, tmp_path
):
    folder = family(name, root)
    model, theirs = load_model(folder), library(name, folder)
    limit = int(0.9 * anatomy.block_parameters(model))
    made = plan(model, what, Asked(limit, 1, "loss", tmp_path))
    assert sorted(made.fields) == EXPRESSED[name, what]
    for block in anatomy.blocks(model):
        for units, count in zip(surgery.of(block, what), made.kept[block.index], strict=True):
            assert count < units.count
            stays = torch.randperm(units.count, generator=torch.Generator().manual_seed(block.index))[:count]
            stay_P = stays.sort().values
            columns = units.columns_GS[stay_P].flatten()
            reader = theirs.get_submodule(f"{block.name}.{units.reader}")
            weight_OI = reader.weight if isinstance(reader, nn.Linear) else reader.weight.T  # a Conv1D of GPT-2
            gone = torch.ones(weight_OI.shape[1], dtype=torch.bool).index_fill(0, columns, False)
            kept_OK = weight_OI[:, columns].clone()
            weight_OI[:, gone] = 0
            surgery.cut(block, units, stay_P, kept_OK, made.fields)
    said(model, made)
    assert anatomy.block_parameters(model) <= limit
    save_model(model, tmp_path / "out", like=folder)
    assert torch.allclose(answers(load_model(tmp_path / "out")), answers(theirs), atol=2e-5)
    if made.fields:
        assert not (tmp_path / "out" / "structure.json").exists()
        assert torch.allclose(answers(library(name, tmp_path / "out")), answers(theirs), atol=2e-5)


READER = {CHANNELS: "down", HEADS: "o"}


def lost(model, dense, ids):
    """KL from the dense model, nats a token."""
    with torch.no_grad():
        p, q = (torch.log_softmax(one(input_ids=ids).logits.double(), -1) for one in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("what", "keep"), [(CHANNELS, 0.85), (HEADS, 0.96)])
def test_uneven_widths_lose_less_than_even_ones_at_as_many_parameters(what, keep, tiny, reference, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = torch.tensor(tokenizer(reference)["input_ids"][: 40 * 64]).view(40, 64)
    dense = load_model(tiny)
    total, made = anatomy.block_parameters(dense), {}
    for widths in ("even", "uneven"):
        made[widths] = load_model(tiny)
        asked = Asked(int(keep * total), 8, "loss", tmp_path / widths, uneven=widths == "uneven")
        narrow(made[widths], ids[:24], what, asked, Silent())
        assert anatomy.block_parameters(made[widths]) <= asked.limit
    inputs = [int(anatomy.projections(one)[READER[what]].in_features) for one in anatomy.blocks(made["uneven"])]
    assert len(set(inputs)) > 1 and all(one % 8 == 0 for one in inputs)
    even, uneven = (anatomy.block_parameters(one) / total for one in made.values())
    assert uneven >= even - 0.02
    assert lost(made["uneven"], dense, ids[24:]) < lost(made["even"], dense, ids[24:])
    (tmp_path / "out").mkdir()
    written = save_model(made["uneven"], tmp_path / "out", like=tiny, progress=Silent())
    assert torch.equal(written(input_ids=ids[:2]).logits, made["uneven"](input_ids=ids[:2]).logits)
    sizes = json.loads((tmp_path / "out" / "structure.json").read_text())["sizes"]
    assert sizes and all(path.startswith("model.layers.") for path in sizes)


@pytest.mark.parametrize("name", ["gpt2", "bert_masked", "t5", "falcon", "phi3", "bloom", "gemma2", "opt"])
def test_uneven_channels_of_every_family_are_written_and_read(name, root, tmp_path):
    folder = family(name, root)
    model = load_model(folder)
    ids = torch.randint(5, 60, (6, 24), generator=torch.Generator().manual_seed(2))
    asked = Asked(int(0.9 * anatomy.block_parameters(model)), 2, "loss", tmp_path, uneven=True)
    narrow(model, ids, CHANNELS, asked, Silent())
    assert anatomy.block_parameters(model) <= asked.limit
    (tmp_path / "out").mkdir()
    save_model(model, tmp_path / "out", like=folder, progress=Silent())  # it compares both models' answers
    assert anatomy.block_parameters(load_model(tmp_path / "out")) == anatomy.block_parameters(model)
