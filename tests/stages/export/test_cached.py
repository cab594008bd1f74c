"""Graphs with a cache: what a decoder writes token by token is what transformers reads at once."""

from collections import Counter

import numpy as np
import pytest
import torch
import transformers

from stages.adapters.onnxruntime import CachedSession, open_session
from stages.adapters.onnxruntime_slots import RowSlots, Stepping
from stages.export import cached, to_onnx
from stages.export.layer_caches import layer_caches
from stages.graphs import onnx_graph
from stages.graphs.ort_cache_lowering import CACHED_ATTENTION, lower_cache
from stages.graphs.ort_norms import fuse_norms
from stages.graphs.stepping import by_steps, in_two
from stages.graphs.uncached import without_cache
from stages.models.checkpoint.loading import load_model
from stages.runtime.contract import DoesNotFit
from tests.cases.day import fifth
from tests.engines import literal
from tests.stages.models.families import FAMILIES, WIDER, family, library

IDS = (torch.arange(40).view(2, 20) * 7 % 90).numpy()
PLACES = 64
KEEPING = ["gemma2", "gpt2"]
ALSO_KEEPING = [
    "opt", "phi3", "llama", "mistral", "qwen2", "qwen3", "neox", "bert_decoder", "gemma", "gemma3", "biogpt",
    "granite", "smollm3", "mixtral",
]  # fmt: skip

TURNED = ("neox", "gemma3", "mixtral")
"""They norm heads, or cut them out of one product, after they were turned, or turn the router's shares."""


def exported(name, root):
    """A family's graph with its cache, and what each layer keeps."""
    model = load_model(family(name, root))
    layers = layer_caches(model, PLACES)
    graph = to_onnx.with_cache(model, layers)
    onnx_graph.save(graph, root / f"{name}.onnx")
    return root / f"{name}.onnx", layers


def answered(name, root):
    with torch.no_grad():
        return library(name, root / name)(input_ids=torch.from_numpy(IDS)).logits.numpy()


def reads_as(session, wanted):
    """Prompts at once, of unequal length with tokens one by one, and in two parts."""
    limit = 1e-4 * wanted.std()
    assert isinstance(session, CachedSession)
    np.testing.assert_allclose(session.logits(IDS), wanted, atol=limit)
    np.testing.assert_allclose(by_steps(session, IDS), wanted, atol=limit)
    np.testing.assert_allclose(in_two(session, IDS[:1]), wanted[:1], atol=limit)


@pytest.mark.parametrize(
    "name", [*KEEPING, *(pytest.param(name, marks=pytest.mark.engine) for name in fifth(ALSO_KEEPING))]
)
def test_family_writes_token_by_token_what_it_reads_at_once(tmp_path, name):
    path, layers = exported(name, tmp_path)
    wanted = answered(name, tmp_path)
    reads_as(open_session(path, literal=True), wanted)
    graph = onnx_graph.load(path)
    assert lower_cache(graph, [layer.described() for layer in layers]) == len(layers)
    fuse_norms(graph)
    kinds = Counter(node.op_type for node in graph.graph)
    assert kinds[CACHED_ATTENTION] == len(layers)
    assert not kinds["Attention"] + kinds["TensorScatter"]
    if name not in TURNED:  # heads stay side by side, as products give and take them
        assert not kinds["Transpose"]
    onnx_graph.save(graph, tmp_path / "lowered.onnx")
    reads_as(open_session(tmp_path / "lowered.onnx"), wanted)


def test_windows_are_read_off_the_masks(tmp_path):
    config = (FAMILIES | WIDER)["gemma2"][2]
    layers = layer_caches(load_model(family("gemma2", tmp_path)), PLACES)
    assert [layer.window for layer in layers] == [config["sliding_window"], 0, config["sliding_window"]]
    assert {(layer.heads, layer.key_size, layer.value_size) for layer in layers} == {
        (config["num_key_value_heads"], config["head_dim"], config["head_dim"])
    }


@pytest.mark.parametrize(
    "name", ["falcon", *(pytest.param(name, marks=pytest.mark.engine) for name in ("bloom", "xglm"))]
)
def test_attention_of_a_models_own_reads_all_places(tmp_path, name):
    path, layers = exported(name, tmp_path)
    assert [layer.window for layer in layers] == [None] * 3
    reads_as(open_session(path), answered(name, tmp_path))
    assert lower_cache(onnx_graph.load(path), [layer.described() for layer in layers]) == 0


def test_model_without_keys_and_values_keeps_nothing_and_says_so(tmp_path):
    with pytest.raises(cached.NotCached, match="MambaForCausalLM takes no cache of keys and values"):
        layer_caches(load_model(family("mamba", tmp_path)), PLACES)


def test_layer_of_an_unknown_pattern_attends_as_it_was_exported(tmp_path):
    path, layers = exported("gpt2", tmp_path)
    graph, described = onnx_graph.load(path), [layer.described() for layer in layers]
    described[1]["window"] = None
    assert lower_cache(graph, described) == len(layers) - 1
    onnx_graph.save(graph, tmp_path / "lowered.onnx")
    reads_as(open_session(tmp_path / "lowered.onnx"), answered("gpt2", tmp_path))


def test_heads_of_a_size_that_the_operator_has_not_attend_as_they_were_exported(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 40, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=96, num_hidden_layers=2, head_dim=20, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(IDS)).logits.numpy()
    layers = layer_caches(model, PLACES)
    graph = to_onnx.with_cache(model, layers)
    assert lower_cache(graph, [layer.described() for layer in layers]) == 0
    onnx_graph.save(graph, tmp_path / "model.onnx")
    reads_as(open_session(tmp_path / "model.onnx"), wanted)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpt2")
    path, _ = exported("gpt2", root)
    return root, path, open_session(path)


def test_cache_holds_what_was_read_in_its_own_place_and_grows(gpt2):
    _, _, session = gpt2
    kept = session.begin(2, 12)
    places = kept.places["past_key_values.1.value"]
    kept.read(IDS[:, :10], np.array([10, 7]))
    assert kept.places["past_key_values.1.value"] is places  # written where it is, not copied
    assert (np.abs(places[:, :, :7]).sum((1, 3)) > 0).all() and not places[:, :, 10:].any()
    assert kept.lengths_N.tolist() == [10, 7]
    before = places[0, :, :10].copy()
    kept.read(IDS[:, 10:14])
    grown = kept.places["past_key_values.1.value"]
    assert grown.shape[2] == 24
    np.testing.assert_array_equal(grown[0, :, :10], before)
    assert kept.lengths_N.tolist() == [14, 11]


def test_cache_that_does_not_fit_is_told_and_what_was_read_stays(gpt2):
    _, _, session = gpt2
    with pytest.raises(DoesNotFit, match=r"ran out for what was read; measured \d+ texts of 64 tokens"):
        session.begin(1 << 40, 64)
    slots = RowSlots(session, 64)
    slots.admit(IDS[0, :5])
    with pytest.raises(DoesNotFit, match="memory ran out"):
        slots._make_room(1 << 40, 10)
    assert slots.next(np.array([3])).shape == (1, 96) and slots.kept.lengths_N.tolist() == [6]


def test_rows_of_the_vocabulary_that_nobody_asks_for_are_not_made(gpt2):
    root, _, session = gpt2
    kept = session.begin(2, 20)
    found = kept.read(IDS, None, np.array([[19], [4]]))
    assert found.shape == (2, 1, 96)
    wanted = answered("gpt2", root)
    np.testing.assert_allclose(found[:, 0], [wanted[0, 19], wanted[1, 4]], atol=1e-4 * wanted.std())


def test_prompts_padded_on_either_side_are_written_on(gpt2):
    root, _, session = gpt2
    wanted = answered("gpt2", root)
    for side in ("left", "right"):
        ids, mask = np.full((2, 10), 5), np.ones((2, 10), np.int64)
        at = slice(4, 10) if side == "left" else slice(0, 6)
        ids[0], ids[1, at] = IDS[0, :10], IDS[1, :6]
        mask[1] = 0
        mask[1, at] = 1
        steps = Stepping(session, 64)
        begun = steps.begin(ids, mask)
        np.testing.assert_allclose(begun, [wanted[0, 9], wanted[1, 5]], atol=1e-4 * wanted.std())
        then = steps.next(np.array([IDS[0, 10], IDS[1, 6]]))
        np.testing.assert_allclose(then, [wanted[0, 10], wanted[1, 6]], atol=1e-4 * wanted.std())
        whole = session.logits(ids, mask)
        np.testing.assert_allclose(whole[1, at], wanted[1, :6], atol=1e-4 * wanted.std())
        assert not whole[1][mask[1] == 0].any()


def test_row_that_has_ended_at_the_longest_sequence_hurts_no_other(gpt2):
    """gpt2 has a table of 64 places: the 65th would be read beyond its end."""
    root, _, session = gpt2
    ids = (np.arange(128).reshape(2, 64) * 5) % 90
    mask = np.ones_like(ids)
    mask[1, 40:] = 0
    steps = Stepping(session, 64)
    steps.begin(ids, mask)
    with torch.no_grad():
        wanted = library("gpt2", root / "gpt2")(input_ids=torch.from_numpy(ids[1:, :44])).logits[0].numpy()
    for place in range(40, 44):
        found = steps.next(np.array([3, ids[1, place]]))
        np.testing.assert_allclose(found[1], wanted[place], atol=1e-4 * wanted.std())


def test_capped_attention_is_spelt_out_for_backends_that_have_no_cap(tmp_path):
    path, _ = exported("gemma2", tmp_path)
    graph = onnx_graph.load(path)
    without_cache(graph)
    kinds = Counter(node.op_type for node in graph.graph)
    assert not kinds["Attention"]
    assert (kinds["Softmax"], kinds["Tanh"]) == (3, 4)  # the logits are capped, too
    onnx_graph.save(graph, tmp_path / "whole.onnx")
    wanted = answered("gemma2", tmp_path)
    np.testing.assert_allclose(literal(tmp_path / "whole.onnx", IDS), wanted, atol=1e-4 * wanted.std())


def test_graph_without_its_cache_reads_whole_sequences(gpt2):
    root, path, _ = gpt2
    graph = onnx_graph.load(path)
    without_cache(graph)
    assert [one.name for one in graph.graph.inputs] == ["input_ids", "attention_mask"]
    assert [one.name for one in graph.graph.outputs] == ["logits"] and graph.opset_imports[""] == 23
    onnx_graph.save(graph, root / "whole.onnx")
    mask = np.ones_like(IDS)
    mask[1, 13:] = 0
    found, wanted = literal(root / "whole.onnx", IDS, mask), answered("gpt2", root)
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-4 * wanted.std())
    np.testing.assert_allclose(found[1, :13], wanted[1, :13], atol=1e-4 * wanted.std())


def test_sequences_come_and_go_and_each_is_written_as_if_alone(gpt2):
    root, _, session = gpt2
    draw, model = np.random.default_rng(5), library("gpt2", root / "gpt2")
    slots, rows, said = RowSlots(session, 64), list[list[int]](), 0

    def check(found, row):
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([row])).logits[0, -1].numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-3 * wanted.std())

    for turn in range(40):
        if len(rows) < 5 and (not rows or draw.random() < 0.4):
            rows.append(draw.integers(0, 96, draw.integers(1, 20)).tolist())
            check(slots.admit(np.array(rows[-1])), rows[-1])
        tokens = draw.integers(0, 96, len(rows))
        rows = [[*row, int(token)] for row, token in zip(rows, tokens, strict=True)]
        for found, row in zip(slots.next(tokens), rows, strict=True):
            check(found, row)
            said += 1
        if turn % 3 == 2:
            gone = int(draw.integers(len(rows)))
            slots.leave(gone)
            rows[gone] = rows[-1]
            rows.pop()
    assert said > 60
    while rows:
        slots.leave(len(rows) - 1)
        rows.pop()
    check(slots.admit(np.array([3, 4])), [3, 4])
