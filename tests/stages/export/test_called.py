"""The model as engines call it answers what transformers' own model does, whichever side a row is padded on."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from stages.export import checks, to_onnx
from stages.export.called import PADDING, alone, answer, as_called, masks, padded, unpadded
from stages.export.stage import ExportParams, _parity_tokens, export
from stages.graphs import onnx_graph
from stages.models.anatomy import tasks
from stages.models.checkpoint.loading import load_config, load_model
from stages.runtime.contract import StageError
from tests.engines import Hears, one_block, token_windows
from tests.stages.models.families import FAMILIES, WIDER, family, library

ONE_STACK = [name for name in FAMILIES | WIDER if name not in ("t5", "t5_plain", "bart", "marian", "mbart")]
IDS = 3 + torch.arange(80).view(2, 40) * 7 % 90
WAYS = {
    "bert_masked": "counted", "bert_classes": "counted_rolled", "roberta": "own", "bloom": "own", "gpt2": "counted",
    "gemma3": "counted",
}  # fmt: skip


def beside_padding(model, task: str, side: str) -> tuple[np.ndarray, np.ndarray]:
    """What a model answers to the second row, six tokens shorter than the first, in one batch and alone."""
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    where = slice(0, 6) if side == "left" else slice(34, 40)
    ids[1], mask[1, where] = 5, 0
    ids[1, mask[1] > 0] = IDS[1, :34]
    with torch.no_grad(), masks():
        both = model(ids, mask).numpy()
    whole = task in ("classify", "score", "choose")
    kept = both[1:] if whole else np.compress(mask[1] > 0, both[1:], 2 if task == "answer" else 1)
    return both[:1], kept


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ONE_STACK)
def test_every_family_answers_as_transformers_beside_padding_on_either_side(tmp_path, name, fused):
    task = tasks.task(load_config(family(name, tmp_path)))
    called = as_called(load_model(tmp_path / name), task, IDS[:1].numpy(), fused=fused)
    assert called.way == WAYS.get(name, called.way)
    plain = library(name, tmp_path / name)
    given = partial(torch.unsqueeze, dim=1) if task == "choose" else torch.Tensor.clone  # the choices of a question
    wanted = [answer(task, plain(input_ids=given(ids))).detach().numpy() for ids in (IDS[:1], IDS[1:, :34])]
    for side in ("left", "right"):
        for found, right in zip(beside_padding(called, task, side), wanted, strict=True):
            np.testing.assert_allclose(found, right, atol=1e-4 * (right.std() or abs(right).max()))


def classifier(folder: Path, **changes: object) -> transformers.PreTrainedModel:
    settings = FAMILIES["llama"][2] | {"vocab_size": 96, "num_labels": 1, "initializer_range": 0.3} | changes
    torch.manual_seed(0)
    made = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**settings)).eval()
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("pad", [None, 2])
def test_decoder_that_classifies_reads_the_last_token_that_is_no_padding(tmp_path, pad):
    plain = classifier(tmp_path, pad_token_id=pad)
    called = as_called(load_model(tmp_path), "score", IDS[:1].numpy(), fused=True)
    wanted = [answer("score", plain(input_ids=ids)).detach().numpy() for ids in (IDS[:1], IDS[1:, :34])]
    for side in ("left", "right"):
        for found, right in zip(beside_padding(called, "score", side), wanted, strict=True):
            np.testing.assert_allclose(found, right, atol=1e-5)


@pytest.mark.parametrize("multi", [True, False])
def test_attention_of_a_models_own_is_the_one_that_it_was_loaded_with(tmp_path, multi):
    """Falcon's slopes are rounded in one of its two ways and not in the other."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, multi_query=multi
    )
    plain = transformers.FalconForCausalLM(config).eval()
    plain.save_pretrained(tmp_path)
    called = as_called(load_model(tmp_path), "generate", IDS[:1].numpy(), fused=True)
    for side in ("left", "right"):
        found, short = beside_padding(called, "generate", side)
        for one, ids in ((found, IDS[:1]), (short, IDS[1:, :34])):
            right = plain(input_ids=ids).logits.detach().numpy()
            np.testing.assert_allclose(one, right, atol=1e-4 * right.std())


def test_model_that_padding_changes_is_refused(tmp_path):
    model = load_model(family("gpt2", tmp_path))
    model.transformer.wte.register_forward_hook(
        lambda _module, args, out: out + args[0].float().mean() * torch.arange(32) / 96
    )
    with pytest.raises(StageError, match=r"GPT2LMHeadModel answers otherwise beside padding.*Take `export`"):
        as_called(model, "generate", IDS[:1].numpy(), fused=True)


def test_rows_beside_padding_are_found_again():
    ids_NT, mask_NT = padded(token_windows(1, 12))
    assert ids_NT.shape == mask_NT.shape == (2, 12) and mask_NT.sum() == 2 * (12 - PADDING)
    kept = unpadded("tag", ids_NT[..., None])[..., 0]
    assert (kept == token_windows(1, 12)[0, :-PADDING]).all()
    assert (unpadded("answer", np.repeat(ids_NT[:, None], 2, 1)) == kept[:, None]).all()
    assert (unpadded("score", ids_NT[:, :1]) == ids_NT[:, :1]).all()


@pytest.mark.parametrize("padded_left", [True, False])
def test_encoder_that_turns_positions_and_reads_its_first_token_becomes_a_graph(tiny, tmp_path, padded_left):
    """Its rows are rolled, and it is told the places of their tokens: without, all had one table of them."""
    from stages.adapters.onnxruntime import open_session

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    marks = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "cls_token_id": 2, "sep_token_id": 3}
    config = transformers.ModernBertConfig(
        vocab_size=768, num_labels=3, max_position_embeddings=256, local_attention=16, **sizes, **marks
    )
    library = transformers.ModernBertForSequenceClassification(config).eval()
    with torch.no_grad():
        for one in library.parameters():
            one.mul_(4 if one.ndim > 1 else 1)
    library.save_pretrained(tmp_path / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, tmp_path / "checkpoint" / name)
    (tmp_path / "graph").mkdir()
    params = ExportParams(parity_windows=1, parity_tokens=24)
    export(params, {"model": tmp_path / "checkpoint"}, tmp_path / "graph", Hears())
    ids = token_windows(2, 30)
    mask = np.ones_like(ids)
    kept = slice(10, None) if padded_left else slice(0, 20)
    mask[1] = 0
    mask[1, kept] = 1
    with torch.no_grad():
        wanted = [library(torch.from_numpy(one)).logits.numpy() for one in (ids[:1], ids[1:, kept])]
    found = open_session(tmp_path / "graph" / "model.onnx").logits(ids, mask)
    np.testing.assert_allclose(found, np.concatenate(wanted), atol=1e-3 * np.std(wanted))


@pytest.fixture(scope="module")
def sliding(tiny, tmp_path_factory):
    """One block that attends to 48 tokens, its graph, and the same weights attending to all."""
    root = tmp_path_factory.mktemp("sliding")
    named = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    checkpoint = one_block(tiny, root / "checkpoint", sliding_window=48, **named)
    (root / "graph").mkdir()
    export(ExportParams(parity_tokens=32), {"model": checkpoint}, root / "graph", Hears())
    return checkpoint, root / "graph", one_block(tiny, root / "whole", sliding_window=None, **named)


def test_graph_of_a_sliding_window_forgets_what_is_older_whole_and_behind_padding(sliding):
    from stages.adapters.onnxruntime import open_session

    checkpoint, graph, whole = sliding
    plain = transformers.MistralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = token_windows(2, 120)
    session = open_session(graph / "model.onnx")
    wanted = [plain(input_ids=torch.from_numpy(one)).logits.detach().numpy() for one in (ids[:1], ids[1:, :100])]
    short, mask = np.concatenate([ids[1:, :20], ids[1:, :100]], axis=1), np.ones_like(ids)
    mask[1, :20] = 0
    found = session.logits(np.concatenate([ids[:1], short]), mask)
    np.testing.assert_allclose(found[:1], wanted[0], atol=1e-4)
    np.testing.assert_allclose(found[1:, 20:], wanted[1], atol=1e-4)
    assert np.abs(alone(load_model(whole), "generate", ids[:1]) - wanted[0]).max() > 0.01


def test_graph_that_does_not_forget_is_refused(sliding):
    checkpoint, graph, whole = sliding
    tokens = _parity_tokens(ExportParams(parity_tokens=32), load_config(checkpoint), 512)
    assert tokens > 48
    wanted = checks.expected(load_model(whole), token_windows(2, tokens))
    with pytest.raises(StageError, match="the graph and the torch model differ"):
        checks.require_numbers(graph / "model.onnx", token_windows(2, tokens), wanted)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "opset"),
    [(name, 23) for name in ONE_STACK] + [(name, 21) for name in ("gpt2", "bert_classes", "gemma3", "bloom")],
)
def test_graph_of_every_family_answers_as_transformers(tmp_path, name, opset):
    task = tasks.task(load_config(family(name, tmp_path)))
    model, ids = load_model(tmp_path / name), IDS.numpy()
    if name == "mamba":
        with pytest.raises(StageError, match=r"the exporter could not turn MambaForCausalLM.*Take `export`"):
            to_onnx.to_onnx(model, opset, task, ids[:1])
        return
    wanted = checks.expected(library(name, tmp_path / name), ids, task)
    onnx_graph.save(to_onnx.to_onnx(model, opset, task, ids[:1]), tmp_path / "model.onnx")
    checks.require_effect(onnx_graph.held(onnx_graph.load(tmp_path / "model.onnx")), wanted)
    assert checks.require_numbers(tmp_path / "model.onnx", ids, wanted, task) < 1e-4


def test_classifiers_graph_says_what_it_is_for_and_how_long_its_texts_are(tiny, tmp_path):
    from stages.adapters.onnxruntime import open_session

    plain = classifier(tmp_path / "model", vocab_size=768, num_labels=3, num_hidden_layers=1, tie_word_embeddings=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((tiny / name).read_bytes())
    (tmp_path / "graph").mkdir()
    export(ExportParams(parity_tokens=32), {"model": tmp_path / "model"}, tmp_path / "graph", Hears())
    described = json.loads((tmp_path / "graph" / "graph.json").read_text())
    assert (described["task"], described["maximum_tokens"]) == ("classify", 64)
    ids, mask = token_windows(2, 20), np.ones((2, 20), np.int64)
    mask[1, 12:] = 0
    found = open_session(tmp_path / "graph" / "model.onnx").logits(ids, mask)
    for row, one in zip(found, (ids[:1], ids[1:, :12]), strict=True):
        np.testing.assert_allclose(row, plain(input_ids=torch.from_numpy(one)).logits[0].detach(), atol=1e-5)


def test_graph_may_leave_out_what_no_answer_depends_on_but_neither_blocks_nor_table(tmp_path):
    model = load_model(family("bert_bare", tmp_path))
    wanted = checks.expected(model, IDS.numpy(), "embed")
    sizes = {name: tensor.nbytes for name, tensor in model.named_parameters()}
    matrices = {name: size for name, size in sizes.items() if model.get_parameter(name).ndim == 2}
    kept = sum(size for name, size in matrices.items() if name.startswith("encoder.") or "word_embeddings" in name)
    assert (wanted.least_bytes, wanted.size_bytes) == (kept, sum(sizes.values()))
    assert sum(size for name, size in sizes.items() if "pooler" in name) < wanted.size_bytes - kept


@pytest.mark.parametrize(("said", "most"), [(300, 300), (10**30, 2048)])
def test_endless_model_reads_as_much_as_its_tokenizer_or_a_length_that_is_told(tiny, tmp_path, said, most):
    from transformers import PreTrainedTokenizerFast

    from stages.export.stage import _longest

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tiny / "tokenizer.json"), model_max_length=said)
    heard = Hears()
    assert _longest(load_config(family("bloom", tmp_path)), tokenizer, heard) == most
    assert f"engines read {most} tokens" in heard.notes[0]
    assert _longest(load_config(family("gpt2", tmp_path)), tokenizer, heard) == 64
    assert len(heard.notes) == 1


def test_model_of_two_stacks_that_writes_nothing_is_refused_before_its_weights_are_read(tiny, tmp_path):
    folder = family("t5", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["T5ForSequenceClassification"]}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    (folder / "model.safetensors").unlink()
    with pytest.raises(StageError, match=r"T5ForSequenceClassification has an encoder and a decoder.*Take `export`"):
        export(ExportParams(), {"model": folder}, tmp_path, Hears())
