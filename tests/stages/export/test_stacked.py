"""An encoder and a decoder as two graphs: what they answer is what transformers answers, however it is asked."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from flows.registry.package import travelling_code
from flows.tracking.connect import quiet
from stages import stage
from stages.adapters.backends import backend
from stages.adapters.onnxruntime_slots import open_stacks
from stages.compile.stage import CompileParams, compile_engine
from stages.export.cache_checks import require_answered_numbers
from stages.export.checks import expected
from stages.export.stage import ExportParams, export
from stages.graphs import components, onnx_graph
from stages.models.checkpoint.loading import load_model
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import digest_file
from stages.runtime.progress import Silent
from stages.serving.answering import manner
from stages.serving.batching import Batching
from stages.serving.beams import beams_of, searched
from stages.serving.engine import open_engine
from stages.serving.generate import greedy, padded
from stages.serving.generation import Generation
from stages.validate.params import ValidateParams
from tests.cases.day import fifth
from tests.stages.validate.test_questions import asked
from tests.stages.validate.test_written import REFERENCES, SOURCES, item
from tests.stages.validate.words import WORDS, lively, model

ROWS = [[5, 6, 7], [9, 8, 12, 13, 30], [11, 12, 13, 14, 15, 16, 17]]
SLOW = [pytest.param(name, marks=pytest.mark.fault) for name in ("bart", "mbart", "marian", "t5_plain")]
QUANTIZED = [(name, how) for name in ("bart", "t5") for how in ("int8_weight_only", "int4_weight_only", "int8_w8a8")]
FORCED = 40
MOST = [12, 1, 5, 9, 2, 7, 12, 3, 12, 4, 1, 8, 6, 12, 10]
"""New tokens of three times as many texts as there are."""


def made(folder, root, params=None):
    """The graph of a checkpoint and its engine."""
    for name in ("graph", "engine"):
        (root / name).mkdir()
    export(ExportParams(**(params or {"parity_tokens": 24})), {"model": folder}, root / "graph", Silent())
    compile_engine(CompileParams(backend="onnxruntime"), {"graph": root / "graph"}, root / "engine", Silent())
    return root / "graph", root / "engine"


def forcing(folder, root):
    """The same checkpoint whose settings force the first token and leave some out."""
    shutil.copytree(folder, root / "forced")
    padding = {"pad_token_id": 0}  # the tokenizer's own
    settings = padding | {"forced_bos_token_id": FORCED, "bad_words_ids": [[3]], "suppress_tokens": [7]}
    for name, more in (("config.json", padding), ("generation_config.json", settings)):
        path = root / "forced" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return root / "forced"


@pytest.fixture(scope="module", params=["t5", *SLOW])
def engines(request, tmp_path_factory):
    """A checkpoint that forces a token, its graph and its engine."""
    root = tmp_path_factory.mktemp(request.param)
    folder = forcing(lively(request.param, root) if request.param != "marian" else model("marian", root), root)
    return folder, *made(folder, root)


def test_engine_says_what_transformers_says_to_texts_of_unequal_length(engines):
    folder, *both = engines
    library = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    ends = frozenset({library.generation_config.eos_token_id})
    wanted = []
    for row in ROWS:
        given = {"input_ids": torch.tensor([row]), "do_sample": False, "num_beams": 1, "max_new_tokens": 12}
        wanted.append(library.generate(**given)[0, 1:].tolist())
    for one in both:
        found = greedy(open_engine(one).steps(), ROWS, ends=ends, max_new_tokens=12, maximum_tokens=60)
        assert found == wanted
    assert {row[0] for row in wanted} == {FORCED}
    # The random Marian says one thing to all texts: of it the logits of the next test tell them apart.
    assert len({tuple(row) for row in wanted}) > 1 or library.config.model_type == "marian"


def test_engine_answers_by_beams_as_transformers_does(engines):
    folder, *both = engines
    library, ends = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval(), (2, 14, 27, 51)
    how, wanted = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True}, []
    for row in ROWS:
        given = how | {"input_ids": torch.tensor([row]), "max_new_tokens": 12, "eos_token_id": list(ends)}
        said = library.generate(**given, do_sample=False)[0, 1:].tolist()
        wanted.append(said[: next((at + 1 for at, token in enumerate(said) if token in ends), len(said))])
    for one in both:
        found = searched(
            open_engine(one).scores, ROWS, beams_of(how, "translate"), ends=frozenset(ends), most=[12] * len(ROWS)
        )
        assert found == wanted


def test_engine_asked_for_texts_themselves_has_transformers_logits(engines):
    folder, *both = engines
    library = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    for one in both:
        logits_NTV = open_engine(one).forward(*padded(ROWS))
        for row, found_TV in zip(ROWS, logits_NTV, strict=True):
            with torch.no_grad():
                wanted_TV = library(input_ids=torch.tensor([row]), labels=torch.tensor([row])).logits[0].numpy()
            np.testing.assert_allclose(found_TV[: len(row)], wanted_TV, atol=1e-3 * wanted_TV.std())
            assert not found_TV[len(row) :].any()


def test_each_weight_lies_once_in_the_file_that_both_graphs_read(engines):
    folder, *both = engines
    shared = load_model(folder).get_input_embeddings().weight.detach().numpy()
    for one in both:
        weights = [
            (path.name, name, value.const_value)
            for path in components.files(one / "model.onnx")
            for name, value in ir.load(path).graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        ]
        tables = {
            (tensor.location, tensor.offset)
            for _, _, tensor in weights
            if tensor.shape == shared.shape and np.array_equal(tensor.numpy(), shared)
        }
        assert len(tables) == 1 and {at[0] for at in tables} == {"model.onnx.data"}
        assert {name for name, _, _ in weights} == {"model.onnx", "encoder.onnx"}
        assert not any(path.stat().st_size > 64_000 for path in components.files(one / "model.onnx"))


def test_description_names_what_each_graph_takes_and_gives(engines):
    _, *both = engines
    for one, name in zip(both, ("graph.json", "engine.json"), strict=True):
        described = json.loads((one / name).read_text())
        assert set(described["components"]) == {"encoder", "decoder"}
        for part in described["components"].values():
            graph = ir.load(one / part["file"]).graph
            assert [value.name for value in graph.inputs] == part["inputs"]
            assert [value.name for value in graph.outputs] == part["outputs"]
            assert set(part["state"]) <= set(part["inputs"]) and set(part["state"].values()) <= set(part["outputs"])
        assert described["answers"]["forced"] == FORCED and described["task"] == "translate"


def test_rows_on_steps_of_their_own_are_answered_as_if_alone(engines):
    folder, *both = engines
    asked = [(text, Generation(max_new_tokens=most, beams=1)) for text, most in zip(SOURCES * 3, MOST, strict=True)]
    asked += [(SOURCES[4], Generation(max_new_tokens=9, temperature=1.0, seed=5, repetition_penalty=1.3))]
    alone = [open_engine(folder).answers([text], how)[0] for text, how in asked]
    for one in (folder, *both):
        opened = open_engine(one)
        assert (opened.slots is None) == (one is folder)
        batching, heard = Batching(opened, rows=3), queue.Queue()
        for at, (text, how) in enumerate(asked):
            batching.ask([text], how, lambda _, said, at=at, heard=heard: heard.put((at, said)))
        found = dict(heard.get(timeout=60) for _ in asked)
        assert [found[at] for at in range(len(asked))] == alone
        batching.close(60)
        assert batching.join(60)


def test_row_is_read_again_with_what_was_said_to_it(engines):
    folder, _, engine = engines
    opened, ids = open_engine(engine), np.array(ROWS[1])
    rows, logits = opened.slots(), []
    logits.append(rows.admit(np.array(ROWS[2]), np.array([FORCED, 9, 10, 11])))
    logits.append(rows.admit(ids))
    for token in (FORCED, 8, 9):
        logits.append(rows.next(np.array([12, token]))[1])
    rows.leave(0)
    np.testing.assert_allclose(
        rows.next(np.array([7]))[0], opened.slots().admit(ids, np.array([FORCED, 8, 9, 7])), atol=1e-4
    )
    again = opened.slots().admit(ids, np.array([FORCED, 8, 9]))
    np.testing.assert_allclose(logits[-1], again, atol=1e-4 * again[again > -100].std())
    library = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    said = torch.tensor([[library.generation_config.decoder_start_token_id, FORCED, 8, 9]])
    with torch.no_grad():
        wanted = library(input_ids=torch.tensor([ROWS[1]]), decoder_input_ids=said).logits[0, -1].numpy()
    kept = again > -100
    assert (~kept).sum() == 2  # those that are left out
    np.testing.assert_allclose(again[kept], wanted[kept], atol=1e-3 * wanted.std())


def test_graph_whose_rows_are_on_one_step_has_none_that_come_and_go(engines, tmp_path):
    _, _, engine = engines
    shutil.copytree(engine, tmp_path / "older")
    path = tmp_path / "older" / "engine.json"
    told = json.loads(path.read_text())
    assert told["cache"].pop("rows_apart") is True
    path.write_text(json.dumps(told))
    assert open_engine(tmp_path / "older").slots is None


def test_text_that_an_engine_writes_is_the_checkpoints(engines):
    folder, *both = engines
    prompts, most = list(SOURCES), {"max_new_tokens": 12}
    wanted = open_engine(folder).generate(prompts, **most)
    library, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompts[0], return_tensors="pt")["input_ids"]
    first = library.generate(input_ids=ids, do_sample=False, num_beams=1, **most)
    assert wanted[0] == tokenizer.decode(first[0], skip_special_tokens=True)
    for one in both:
        assert open_engine(one).generate(prompts, **most) == wanted
        assert "".join(open_engine(one).stream(prompts[1], **most)) == wanted[1]
        with pytest.raises(StageError, match="longer than the model reads"):
            open_engine(one).generate([[5] * 5000], **most)


def test_registered_model_answers_by_both_stacks_where_there_is_no_torch(engines, tmp_path):
    _, _, engine = engines
    wanted = open_engine(engine).generate(list(SOURCES), max_new_tokens=8)
    code = travelling_code(tmp_path, "onnxruntime").parent
    script = (
        "import json, sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'safetensors', 'onnx'));"
        "sys.path.insert(0, sys.argv[1]);"
        "from pathlib import Path; from stages.serving.engine import open_engine;"
        "made = open_engine(Path(sys.argv[2]), verified=True).generate(sys.argv[3:], max_new_tokens=8);"
        "ours = [one.__file__ for name, one in sys.modules.items() if name.partition('.')[0] == 'stages'];"
        "assert all(one.startswith(sys.argv[1]) for one in ours), ours; print(json.dumps(made))"
    )
    words = [sys.executable, "-P", "-c", script, str(code), str(engine), *SOURCES]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout) == wanted
    (tmp_path / "digests.json").write_text(json.dumps({"encoder.onnx": digest_file(engine / "encoder.onnx")}))
    quiet()
    from flows.registry.served import Served

    served, artifacts = Served(), {"engine": str(engine), "digests": str(tmp_path / "digests.json")}
    served.load_context(SimpleNamespace(artifacts=artifacts))
    assert served.predict(None, list(SOURCES), {"max_new_tokens": 8}) == wanted
    assert "".join(served.predict_stream(None, SOURCES[1], {"max_new_tokens": 8})) == wanted[1]


def test_verdict_on_an_engine_is_the_one_on_its_checkpoint(engines, tmp_path):
    folder, _, engine = engines
    items = [item(n, *pair[:1], pair[1:]) for n, pair in enumerate(zip(SOURCES, REFERENCES, strict=True))]
    ours = asked(tmp_path, engine, items, ValidateParams(target="onnxruntime:cpu"), baseline=folder)
    theirs = asked(tmp_path, folder, items, baseline=folder)
    assert [one["answer"] for one in ours["documents"]] == [one["answer"] for one in theirs["documents"]]
    for name in ("bleu", "chrf"):
        assert ours["measures"][name] == theirs["measures"][name]
    assert abs(ours["measures"]["kl_divergence"]) < 1e-6


@pytest.mark.fault
def test_graphs_that_hand_over_something_else_are_not_sealed(tmp_path):
    folder = model("bart", tmp_path)
    (tmp_path / "graph").mkdir()
    export(ExportParams(parity_tokens=24), {"model": folder}, tmp_path / "graph", Silent())
    path = tmp_path / "graph" / "model.onnx"
    ids_NT = np.arange(40).reshape(2, 20) * 7 % 60
    how = manner(json.loads((tmp_path / "graph" / "graph.json").read_text())["answers"])
    wanted = expected(load_model(folder), ids_NT, "translate")
    assert require_answered_numbers(path, ids_NT, wanted, how) < 1e-4
    encoder = onnx_graph.load(path.with_name("encoder.onnx"))
    outputs = encoder.graph.outputs
    outputs[0], outputs[2] = outputs[2], outputs[0]
    outputs[0].name, outputs[2].name = "cross.0.key", "cross.1.key"
    onnx_graph.save(encoder, path.with_name("encoder.onnx"))
    with pytest.raises(StageError, match="texts in the two graphs and the torch model differ"):
        require_answered_numbers(path, ids_NT, wanted, how)


def test_padding_of_a_text_is_hidden_by_the_mask_alone(engines):
    _, graph, _ = engines
    stacks, (ids_NT, mask_NT) = open_stacks(graph / "model.onnx"), padded(ROWS)
    other_NT = np.where(mask_NT > 0, ids_NT, 21)
    said_NT = np.array([[2, 5, 6]] * len(ROWS))
    hidden, same, seen = (
        stacks.begin(ids, mask, 3).read(said_NT)
        for ids, mask in ((ids_NT, mask_NT), (other_NT, mask_NT), (other_NT, np.ones_like(mask_NT)))
    )
    np.testing.assert_allclose(hidden, same, atol=1e-5 * hidden.std())
    assert np.abs(hidden[0] - seen[0]).max() > 1e-3 * hidden.std()


@pytest.mark.engine
@pytest.mark.parametrize(("name", "scheme"), fifth(QUANTIZED))
def test_engine_of_a_quantized_checkpoint_is_that_checkpoint(name, scheme, tmp_path, text_of_words):
    (tmp_path / "small").mkdir()
    quantize = stage("quantize")
    params = {"scheme": scheme} | ({"block": 8} if "int4" in scheme else {})
    params |= {} if scheme == "int8_weight_only" else {"windows": 4, "window_tokens": 16}
    inputs = {"model": lively(name, tmp_path), "text": text_of_words}
    quantize.run(quantize.params.model_validate(params), inputs, tmp_path / "small", Silent())
    _, engine = made(tmp_path / "small", tmp_path)
    kept = onnx_graph.held(*components.load(engine / "model.onnx"))
    assert ("int4" if "int4" in scheme else "int8") in kept.precisions
    ours, theirs = open_engine(engine), open_engine(tmp_path / "small")
    found, wanted = ours.forward(*padded(ROWS)), theirs.forward(*padded(ROWS))
    for row, one, other in zip(ROWS, found, wanted, strict=True):
        # Where activations are rounded, one that lies between two steps may fall to either.
        far = np.abs(one[: len(row)] - other[: len(row)])
        assert (far.mean() if scheme == "int8_w8a8" else far.max()) < 2e-2 * wanted.std()


@pytest.fixture(scope="module")
def text_of_words(tmp_path_factory):
    """A corpus of the words that these models know."""
    root = tmp_path_factory.mktemp("words")
    draw = np.random.default_rng(0)
    (root / "a.txt").write_text("\n\n".join(" ".join(draw.choice(WORDS, 300)) for _ in range(40)))
    corpus = stage("corpus")
    (root / "text").mkdir()
    params = {"source": (root / "a.txt").as_uri(), "splits": {"calibrate": 0.6, "test": 0.4}}
    corpus.run(corpus.params.model_validate(params), {}, root / "text", Silent())
    return root / "text"


@pytest.mark.parametrize(
    ("params", "why"), [({"opset": 21}, "measured opset 21; limit opset 23"), ({"cache": False}, "with a cache alone")]
)
def test_what_two_stacks_are_not_written_by_is_refused(tmp_path, params, why):
    with pytest.raises(StageError, match=why):
        export(ExportParams(**params), {"model": model("t5", tmp_path)}, tmp_path, Silent())


def test_backend_that_keeps_nothing_is_refused_by_name_before_any_work(tmp_path, monkeypatch):
    described = {"task": "translate", "precisions": ["float32"], "maximum_tokens": 64, "vocabulary": 96}
    (tmp_path / "graph.json").write_text(json.dumps(described))
    (tmp_path / "out").mkdir()
    forgets = replace(backend("onnxruntime"), keeps=False)
    monkeypatch.setattr("stages.compile.stage.backend", lambda _name: forgets)
    with pytest.raises(StageError, match=r"onnxruntime builds no engine of.*keeps nothing.*Choose backend"):
        compile_engine(CompileParams(backend="onnxruntime"), {"graph": tmp_path}, tmp_path / "out", Silent())
    assert not list((tmp_path / "out").iterdir())
