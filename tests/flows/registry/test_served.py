"""The registered model answers where neither the project nor its store can be seen."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from flows.registry.journal import Candidate, Executable
from flows.registry.package import travelling_code
from flows.registry.projection import Registry, reconcile, release
from flows.tracking.connect import quiet
from stages.runtime.fingerprint import ROOT
from stages.runtime.stores import LocalObjects
from tests.flows.recorded import tracking_in

WORDS = ("<end>", "the", "capital", "of", "france", "is", "paris", "and", "rome", "italy")
FOLLOWS = {"is": "paris", "paris": "and", "and": "rome", "rome": "is", "italy": "<end>", "the": "italy"}
"""What the engine of these tests says after each word; its answers can be read off."""

TEMPLATE = "{{ eos_token }} {% for message in messages %}{{ message.content }} {% endfor %}and"


def chain(folder: Path) -> Path:
    """An engine whose next word depends on the last one only."""
    folder.mkdir(parents=True)
    table_VV = np.zeros((len(WORDS), len(WORDS)), np.float32)
    for word, after in FOLLOWS.items():
        table_VV[WORDS.index(word), WORDS.index(after)] = 9
    shape = ["batch", "sequence"]
    ids, mask = (
        helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ("input_ids", "attention_mask")
    )
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape, len(WORDS)])
    gather = helper.make_node("Gather", ["table", "input_ids"], ["logits"])
    graph = helper.make_graph([gather], "chain", [ids, mask], [logits], [numpy_helper.from_array(table_VV, "table")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {
        "target": "onnxruntime:cpu",
        "backend": "onnxruntime",
        "architectures": [],
        "executable": "model.onnx",
        "vocabulary": len(WORDS),
        "maximum_tokens": 64,
    }
    (folder / "engine.json").write_text(json.dumps(facts))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 0, "bos_token_id": None}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """MLflow's URI and the logged model's folder of a registered engine whose own folder is gone."""
    root = tmp_path_factory.mktemp("served")
    registry = Registry(LocalObjects(root / "store"), tracking_in(root / "mlflow"))
    run = registry.client.create_run(registry.tracking.experiment_id).info.run_id
    candidate = Candidate(
        model="chain",
        serves="cpu",
        executables={"cpu": Executable(fingerprint="a" * 64, target="onnxruntime:cpu", judged=True)},
        verdict={"passed": True},
        run=run,
    )
    engine = chain(root / "engine")
    made = release(registry, candidate, engine, "champion", against=0)
    reconcile(registry, candidate.model)
    engine.rename(root / "elsewhere")
    location = registry.client.get_logged_model(made.logged_model).artifact_location
    return registry.tracking.uri, Path(location.removeprefix("file://"))


def asked(uri, where, script):
    """Run a script in another process that sees the installed libraries and nothing of the project."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV", "ENGINERY"))}
    ran = subprocess.run(
        [sys.executable, "-I", "-W", "error:.*(enginery|stages).*", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        cwd=where,
        env={**env, "MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1]), ran.stderr


SCRIPT = """
import importlib.util, json, sys
sys.path[:] = [path for path in sys.path if path != "PROJECT"]
assert importlib.util.find_spec("flows") is None and importlib.util.find_spec("stages") is None
import mlflow, pandas
model = mlflow.pyfunc.load_model("models:/chain@champion")
import stages, sys
def refused(**params):
    try:
        return model.predict(["is"], params=params)
    except mlflow.exceptions.MlflowException as error:
        return f"{error.error_code} {error}"
print(json.dumps({
    "list": model.predict(["The capital of France is".lower()], params={"max_new_tokens": 3}),
    "table": model.predict(pandas.DataFrame({"prompt": ["italy and", "the"]}), params={"max_new_tokens": 2}),
    "one": len(model.predict(["france is"])),
    "pieces": list(model.predict_stream(["france is"], params={"max_new_tokens": 3})),
    "talk": model.predict({"messages": [{"role": "user", "content": "france"}]})["choices"][0]["message"]["content"],
    "unknown": refused(temperatur=1),
    "too many": refused(max_new_tokens=100_000),
    "code": stages.__file__,
    "heavy": [name for name in ("torch", "transformers", "boto3") if name in sys.modules],
    "loader": model.metadata.flavors["python_function"]["loader_module"],
}))
"""


def test_registered_model_answers_where_the_project_cannot_be_seen(registered, tmp_path):
    uri, folder = registered
    said, stderr = asked(uri, tmp_path, SCRIPT.replace("PROJECT", str(ROOT)))
    assert said["list"] == [answer(["is"], 3)]
    assert said["table"] == [answer(["and"], 2), answer(["the"], 2)] and said["one"] == 1
    assert "".join(said["pieces"]) == answer(["is"], 3) and len(said["pieces"]) == 3
    assert said["talk"] == answer(["and"], 32)
    assert said["unknown"].startswith("BAD_REQUEST there is no parameter 'temperatur'; limit max_new_tokens")
    assert "measured 100000; limit 64 tokens" in said["too many"]
    assert Path(said["code"]).is_relative_to(folder) and said["heavy"] == []
    assert said["loader"] == "mlflow.pyfunc.loaders.code_model" and "Warning" not in stderr
    assert list(tmp_path.iterdir()) == []


def answer(words, most):
    """What follows the last word, by the table."""
    found = []
    while len(found) < most and (after := FOLLOWS[(words + found)[-1]]) != "<end>":
        found.append(after)
    return " ".join(found)


def test_registered_model_pins_what_it_needs_and_takes_texts(registered):
    _, folder = registered
    pinned = (folder / "requirements.txt").read_text().split()
    assert all("==" in line for line in pinned)
    assert {line.split("==")[0] for line in pinned} == {
        *("jinja2", "mlflow", "numpy", "onnxruntime", "pydantic", "tokenizers")
    }
    described = (folder / "MLmodel").read_text()
    assert '"type": "string"' in described and "max_new_tokens" in described
    from mlflow.models import Model

    model = Model.load(str(folder))
    assert model.signature.inputs.input_names() == ["prompt"]
    params = {one.name: one.default for one in model.signature.params}
    assert params == {"max_new_tokens": 32, "temperature": 0, "top_k": 0, "top_p": 1, "repetition_penalty": None,
                      "stop": [], "seed": None, "beams": None}  # fmt: skip
    assert [[*one] for one in model.load_input_example(str(folder))] == [["prompt"]]
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pickle")]


def carried(folder):
    """What MLflow hands to the model: where its artifacts lie."""
    return SimpleNamespace(
        artifacts={
            "engine": str(folder / "artifacts" / "engine"),
            "digests": str(folder / "artifacts" / "digests.json"),
        }
    )


@pytest.fixture
def served(registered):
    quiet()
    from flows.registry.served import Served

    return Served()


def test_served_takes_lists_and_tables_alike(registered, served):
    import pandas as pd

    served.load_context(carried(registered[1]))
    texts = ["italy and", "the"]
    assert served.predict(None, texts, {"max_new_tokens": 2}) == [answer(["and"], 2), answer(["the"], 2)]
    assert served.predict(None, pd.DataFrame({"any": texts}), {"max_new_tokens": 1}) == ["rome", "italy"]
    assert served.predict(None, ["is"]) == [answer(["is"], 32)]


def test_served_talks_and_streams_in_the_forms_of_openai(registered, served):
    import pandas as pd

    served.load_context(carried(registered[1]))
    talk, few = [{"role": "user", "content": "france"}], {"max_new_tokens": 2}
    said = served.predict(None, {"messages": talk}, few)
    (choice,) = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": answer(["and"], 2)}
    assert (said["object"], choice["finish_reason"]) == ("chat.completion", "length")
    assert said["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    for several in ([talk, talk], {"messages": [talk, talk]}, pd.DataFrame({"messages": [talk, talk]})):
        assert [one["choices"] for one in served.predict(None, several, few)] == [[choice], [choice]]
    ended = served.predict(None, {"prompt": ["italy", "the"]}, few)
    assert ended == ["", "italy"]

    assert "".join(served.predict_stream(None, "is", few)) == served.predict(None, "is", few)[0]
    chunks = [one["choices"][0] for one in served.predict_stream(None, {"messages": talk}, few)]
    assert chunks[0]["delta"]["role"] == "assistant" and chunks[-1]["finish_reason"] == "length"
    assert "".join(one["delta"].get("content", "") for one in chunks) == answer(["and"], 2)
    assert all(one["finish_reason"] is None and one["delta"]["content"] for one in chunks[:-1])


REFUSED = [
    (["is"], {"max_new_tokens": 100_000}, "max_new_tokens is more than the model reads; measured 100000; limit 64 to"),
    (["is"], {"max_new_tokens": 0}, "max_new_tokens is out of range; measured 0; limit at least 1"),
    (["is"], {"temperatur": 1}, "there is no parameter 'temperatur'; limit .* Perhaps temperature is meant"),
    (["is"], {"top_p": 2}, "top_p is out of range; measured 2.0; limit a number above 0, at most 1"),
    ([""], {}, "a prompt is empty. Give each"),
    ("is " * 65, {}, "the sequence is longer than the model reads; measured 65 tokens; limit 64 tokens"),
    ([3], {}, "no text and no conversation; measured 3"),
    (None, {}, "no text and no conversation; measured None"),
    ({"messages": []}, {}, "a conversation is empty"),
    ({"messages": [{"role": "user"}]}, {}, "content of a message of 'user' is no text"),
    ({"messages": "is"}, {}, "no text and no conversation"),
    ({"prompt": "is", "messages": []}, {}, "neither a prompt nor messages are given, or both"),
    ({"input": "is"}, {}, "neither a prompt nor messages are given"),
    ({"prompt": "is", "max_tokens": 3}, {}, "there is no parameter 'max_tokens'"),
    ([{"prompt": "is", "seed": 1}, {"prompt": "is", "seed": 2}], {}, "parameters differ"),
    ([{"prompt": "is"}, {"messages": [{"role": "user", "content": "is"}]}], {}, "prompts and messages are asked at on"),
]


@pytest.mark.parametrize(("data", "params", "said"), REFUSED)
def test_served_refuses_as_a_bad_request(registered, served, data, params, said):
    from mlflow.exceptions import MlflowException

    served.load_context(carried(registered[1]))
    for ask in (served.predict, lambda *given: list(served.predict_stream(*given))):
        with pytest.raises(MlflowException, match=said) as told:
            ask(None, data, params)
        assert told.value.error_code == "BAD_REQUEST"
        if isinstance(data, list) and len(data) > 1:
            break


def test_parameter_in_a_table_and_stream_of_many_are_refused(registered, served):
    import pandas as pd
    from mlflow.exceptions import MlflowException

    served.load_context(carried(registered[1]))
    with pytest.raises(MlflowException, match="seed is a parameter, and no column"):
        served.predict(None, pd.DataFrame({"prompt": ["is"], "seed": [1]}))
    with pytest.raises(MlflowException, match="a stream is one answer; measured 2 prompts; limit 1"):
        list(served.predict_stream(None, ["is", "the"]))
    for named in (pd.DataFrame({"prompt": ["is"], "max_tokens": [3]}), pd.DataFrame({"messages": [[]], "n": [2]})):
        with pytest.raises(MlflowException, match=r"there is no column '(max_tokens|n)'; limit prompt or messages"):
            served.predict(None, named)
    for name in ("prompt", "self"):
        with pytest.raises(MlflowException, match=f"there is no parameter '{name}'"):
            list(served.predict_stream(None, "is", {name: "x"}))


def test_served_engine_of_changed_bytes_is_refused(registered, served, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(registered[1], folder)
    weights = next(folder.rglob("model.onnx"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ValueError, match=r"model.onnx of the registered engine is not what was judged"):
        served.load_context(carried(folder))
    weights.unlink()
    with pytest.raises(ValueError, match=r"model.onnx of the registered engine is missing"):
        served.load_context(carried(folder))


def test_travelling_code_brings_its_backend_alone_no_training_and_no_flows(tmp_path):
    package = travelling_code(tmp_path, "onnxruntime")
    names = {path.relative_to(tmp_path).as_posix() for path in package.rglob("*.py")}
    assert "stages/serving/engine.py" in names and "stages/__init__.py" in names
    assert {name for name in names if "onnxruntime" in name or "tensorrt" in name} == {
        "stages/adapters/onnxruntime.py",
        "stages/adapters/onnxruntime_backend.py",
        "stages/adapters/onnxruntime_slots.py",
    }
    assert not [name for name in names if name.startswith("flows") or "recover" in name or "tests" in name]
