"""Bad engines and bad questions at every door: open_engine, `enginery generate`, `enginery serve` and the pyfunc.

A clear error or a right answer, never a crash. Plans on a GPU of their own kind are in tests/stages/adapters.
"""

import hashlib
import json
import re
import shutil
from types import SimpleNamespace

import httpx
import numpy as np
import onnx
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from onnx import TensorProto, helper

from flows.cli import main
from flows.tracking.connect import quiet
from stages.compile.stage import CompileParams, compile_engine
from stages.export.stage import ExportParams, export
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from stages.serving.engine import open_engine
from tests.engines import one_block
from tests.flows.endpoint.served import serving
from tests.flows.registry.test_served import answer, chain

TOKENS = 24
"""That the engine with a cache reads."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An engine whose answers can be read off; it keeps nothing."""
    return chain(tmp_path_factory.mktemp("good") / "chain")


@pytest.fixture(scope="module")
def keeping(tiny, tmp_path_factory):
    """An engine with a cache."""
    folders = [tmp_path_factory.mktemp(name) for name in ("block", "graph", "engine")]
    export(
        ExportParams(parity_windows=1, parity_tokens=16),
        {"model": one_block(tiny, folders[0], max_position_embeddings=64)},
        folders[1],
        Silent(),
    )
    compile_engine(
        CompileParams(backend="onnxruntime", maximum_tokens=TOKENS), {"graph": folders[1]}, folders[2], Silent()
    )
    return folders[2]


def graph(change):
    """Damage to the graph of an engine."""

    def damage(folder):
        model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
        change(model, folder)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return damage


def operator(domain):
    def change(model, _folder):
        model.graph.node[0].op_type, model.graph.node[0].domain = "Abacus", domain
        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 1))

    return graph(change)


def outside(where, kept=None):
    """The table lies in a file of this name, of which so many bytes are there: all of them unless told otherwise."""

    def change(model, folder):
        tensor = model.graph.initializer[0]
        raw = tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        location = where.format(folder=folder.parent)
        for key, value in (("location", location), ("offset", "0"), ("length", str(len(raw)))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        if kept != 0:
            (folder / location).write_bytes(raw[:kept])

    return graph(change)


def says(**changes):
    """engine.json says something else, or nothing where None."""

    def damage(folder):
        said = json.loads((folder / "engine.json").read_text()) | changes
        (folder / "engine.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))

    return damage


def ends(tokens):
    """generation_config.json says that these end a sequence."""
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens}))


def bytes_of(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def plan(folder):
    """What is no plan, for a GPU that this machine has not."""
    says(backend="tensorrt_rtx", architectures=["sm_89"], executable="model.plan")(folder)
    (folder / "model.plan").write_bytes(b"cut")


LOADS = "ONNX Runtime could not load the graph; measured "
DAMAGES = {
    "unknown operator": (operator(""), LOADS),
    "operator of a vendor": (operator("strange"), r"strange:Abacus.* is not a registered"),
    "external data missing": (outside("table.data", 0), "External data path does not exist"),
    "external data too short": (outside("table.data", 7), "given file_length: 7"),
    "external data above its folder": (outside("../table.data"), "External data path escapes model directory"),
    "external data by a whole path": (outside("{folder}/table.data"), "Absolute path not allowed"),
    "graph cut short": (bytes_of("model.onnx", lambda held: held[:-40]), "Protobuf parsing failed"),
    "graph empty": (bytes_of("model.onnx", lambda held: b""), LOADS),
    "graph gone": (lambda folder: (folder / "model.onnx").unlink(), LOADS),
    "no backend": (says(backend=None), r"engine.json of \S+ is damaged; measured backend: None; limit str"),
    "unknown backend": (says(backend="abacus"), "there is no backend 'abacus'; limit "),
    "no executable": (says(executable=None), "measured executable: None; limit str"),
    "executable elsewhere": (says(executable="../chain/model.onnx"), "limit the name of a file beside it"),
    "length in words": (says(maximum_tokens="many"), "measured maximum_tokens: 'many'; limit int"),
    "length of nothing": (says(maximum_tokens=0), "measured maximum_tokens: 0; limit at least 1"),
    "task no text": (says(task=[]), r"measured task: \[\]; limit str"),
    "end no number": (ends([[1]]), r"ends a sequence is no number; measured eos_token_id: \[1\]"),
    "template no text": (
        lambda folder: (folder / "chat_template.jinja").write_bytes(b"a\xff"),
        "measured byte 1; limit UTF",
    ),
    "description cut short": (bytes_of("engine.json", lambda held: held[:-9]), "engine.json is not JSON; measured"),
    "description a list": (bytes_of("engine.json", lambda held: b"[]"), "engine.json is no JSON object"),
    "tokenizer cut short": (bytes_of("tokenizer.json", lambda held: held[:-9]), r"tokenizer.json of \S+ is damaged"),
    "tokenizer no text": (bytes_of("tokenizer.json", lambda held: b"\xff\xfe"), r"tokenizer.json of \S+ is damaged"),
    "tokenizer gone": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "configuration no text": (bytes_of("config.json", lambda held: b"\xff\xfe"), "config.json is not JSON"),
    "plan for another GPU": (
        plan,
        "this engine is compiled, not executed|this engine is tensorrt_rtx for sm_89|code whose",
    ),
}


def one_line(capsys, *words):
    """What a command says that ends with an error."""
    capsys.readouterr()
    assert main([*map(str, words)]) in (1, 3)
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and "defect" not in told.err and not told.out
    return told.err


def registered(folder, tmp_path):
    """The registered model of a folder, as MLflow opens it."""
    quiet()
    from flows.registry.served import Served

    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (tmp_path / "digests.json").write_text(json.dumps(digests))
    made = Served()
    made.load_context(SimpleNamespace(artifacts={"engine": str(folder), "digests": str(tmp_path / "digests.json")}))
    return made


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_engine_is_refused_at_every_door(whole, name, tmp_path, capsys):
    damage, text = DAMAGES[name]
    folder = shutil.copytree(whole, tmp_path / "copy")
    damage(folder)
    with pytest.raises(StageError, match=text) as told:
        open_engine(folder)
    assert told.value.limit or told.value.remedy
    with pytest.raises(StageError, match=text):
        registered(folder, tmp_path)
    for words in (["generate", folder, "italy"], ["serve", folder, "--port", 0]):
        assert one_line(capsys, *words).startswith(f"error: {str(told.value).splitlines()[0][:40]}")


@pytest.mark.parametrize("device", ["whole", "keeping", "tiny"])
@pytest.mark.parametrize(
    "ids_NT",
    [np.zeros(3), np.zeros((1, 2, 2)), np.zeros((0, 3)), np.zeros((2, 0)), np.array([[-5, 1]]), np.array([[9999, 1]])],
    ids=["one axis", "three axes", "no sequence", "no token", "below 0", "beyond the vocabulary"],
)
def test_what_is_no_sequence_of_tokens_is_refused(request, device, ids_NT):
    opened = open_engine(request.getfixturevalue(device))
    with pytest.raises(StageError, match=r"no sequences of tokens|indices element out of data bounds|no such token"):
        opened.logits(ids_NT.astype(np.int64))
    assert opened.logits(np.ones((1, 2), np.int64)).shape[:2] == (1, 2)


def test_sequence_longer_than_the_cache_is_refused_and_one_that_fills_it_answered(keeping):
    opened = open_engine(keeping)
    with pytest.raises(StageError, match=f"measured {TOKENS + 1} tokens; limit {TOKENS} tokens"):
        opened.logits(np.ones((1, TOKENS + 1), np.int64))
    assert opened.logits(np.ones((1, TOKENS), np.int64)).shape[1] == TOKENS
    assert opened.generate([[1] * TOKENS], max_new_tokens=4) == [""]
    assert len(opened.tokenizer.encode(opened.generate([[1] * (TOKENS - 1)], max_new_tokens=4)[0]).ids) <= 1


PROMPTS = {
    "empty": ("", r"a prompt is empty\. Give each prompt at least one character\."),
    "too long": ("and " * 100, "the sequence is longer than the model reads; measured "),
    "invalid UTF-8": ("a\udcff", r"a prompt is no text; measured '\\udcff' at character 1; limit what UTF-8 can write"),
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("made", ["whole", "keeping"])
def test_prompt_that_cannot_be_answered_is_refused_at_every_door(request, made, name, tmp_path, capsys):
    folder, (prompt, text) = request.getfixturevalue(made), PROMPTS[name]
    opened = open_engine(folder)
    with pytest.raises(StageError, match=text):
        opened.generate(["italy", prompt], max_new_tokens=2)
    with pytest.raises(StageError, match=text):
        opened.stream(prompt)
    with pytest.raises(MlflowException, match=text) as told:
        registered(folder, tmp_path).predict(None, [prompt])  # no table holds the last
    assert told.value.error_code == "BAD_REQUEST"
    assert re.search(text, one_line(capsys, "generate", folder, prompt))


@pytest.mark.parametrize("prompt", [None, 3, b"bytes", {"role": "user"}, [1.5], [True], [10**9], [-1], [[1]]])
def test_prompt_that_is_no_prompt_is_refused(whole, prompt):
    with pytest.raises(
        StageError, match=r"a prompt is neither text|there is no such token|a message has no role|is no"
    ):
        open_engine(whole).generate([prompt])


def test_ten_thousand_prompts_at_once_are_answered_as_alone(whole, keeping, tmp_path):
    told = registered(whole, tmp_path).predict(
        None, pd.DataFrame({"prompt": ["italy and", "the"] * 5000}), {"max_new_tokens": 2}
    )
    assert told == [answer(["and"], 2), answer(["the"], 2)] * 5000
    opened, asked = open_engine(keeping), ["A class", "The for statement is", "b"]
    alone = [opened.generate([one], max_new_tokens=1)[0] for one in asked]
    assert opened.generate((asked * 3334)[:10_000], max_new_tokens=1) == (alone * 3334)[:10_000]


def test_server_refuses_what_cannot_be_answered_and_goes_on(keeping):
    with serving(keeping, "--name", "block", "--queue", 16) as (address, child):

        def ask(prompt, **how):
            body = json.dumps({"model": "block", "prompt": prompt, "max_tokens": 2})
            return httpx.post(f"{address}/v1/completions", content=body, timeout=60, **how)

        right = ask("A class").json()["choices"][0]["text"]
        assert right == open_engine(keeping).generate(["A class"], max_new_tokens=2)[0]
        for prompt, text in (
            ("", "a prompt is empty"),
            (["A class", ""], "a prompt is empty"),
            ("and " * 100, "the sequence is longer than the model reads"),
            ("a\udcff", "a prompt is no text"),
            ([10**9], "there is no such token"),
            ([-1], "there is no such token"),
            (None, "prompt is no text"),
        ):
            got = ask(prompt)
            assert got.status_code == 400 and text in got.json()["error"]["message"], prompt
        raw = httpx.post(f"{address}/v1/completions", content=b'{"model": "block", "prompt": "\xff"}')
        assert raw.status_code == 400 and "the body is no JSON" in raw.json()["error"]["message"]
        many = ask(["A class"] * 10_000)
        assert many.status_code == 400 and "10000" in many.json()["error"]["message"], many.text
        assert ask("A class").json()["choices"][0]["text"] == right and child.poll() is None
