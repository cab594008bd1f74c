"""What CONTRIBUTING adds, in its real use: run by `test_contributing` in a copy of the project that has it."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy as scipys_entropy

from flows.judging.gates import judge
from flows.recipe.expand import expanded
from flows.recipe.read import load_recipe
from flows.registry.package import travelling_code
from stages.adapters.connect import connect
from stages.runtime.contract import StageError
from stages.runtime.sweep import sweep
from stages.serving.engine import open_engine
from tests.architecture import breaches, files
from tests.conftest import sealer
from tests.engines import literal, one_block, token_windows
from tests.flows.judging.test_gates import Gate

SHORT = {"window_tokens": 16, "windows": 3}


@pytest.fixture(scope="module")
def block(shared_store, tiny, tmp_path_factory):
    """Fingerprint of one block of the tiny Llama."""
    folder = one_block(tiny, tmp_path_factory.mktemp("block") / "checkpoint")
    return sealer(shared_store)("fetch", {"source": folder.as_uri()}).identity


@pytest.fixture(scope="module")
def graph(shared_store, block):
    """Fingerprint of its graph."""
    return sealer(shared_store)("export", {}, model=block).identity


def report_of(store, outcome):
    return json.loads((store.checkout(outcome.identity) / "report.json").read_text())


def test_measure_is_sealed_as_scipy_has_it_and_gated(shared_store, block, topics, tmp_path):
    sealed = sealer(shared_store)("validate", SHORT, model=block, text=topics)
    report = report_of(shared_store, sealed)
    assert set(report["documents"][0]) == {"id", "tokens", "nll", "entropy"}
    model = open_engine(shared_store.checkout(block))
    path = shared_store.checkout(topics)
    ids_NT = windows_of(path, shared_store.checkout(block))
    expected = [
        float(scipys_entropy(softmax(row, -1), axis=-1)[:-1].sum()) for row in model.logits(ids_NT).astype(float)
    ]
    assert [document["entropy"] for document in report["documents"]] == pytest.approx(expected, rel=1e-5)
    measured = sealed.manifest.metrics["entropy"]
    assert measured == pytest.approx(sum(expected) / 45, rel=1e-5) and 0 < measured < np.log(768)
    gates = [Gate(measure="entropy", against=None, at_most=limit) for limit in (measured * 2, measured / 2)]
    verdict = judge(gates, {("block", "text"): report}, {}, {"block": "torch:cpu"})
    assert [result.passed for result in verdict.results] == [True, False]
    assert verdict.results[0].measured == pytest.approx(measured)
    recipe = load_recipe(
        "tiny", ["judge.measures=[entropy]", "gates=[{measure: entropy, against: dense, at_most: 1.5}]"]
    )
    assert recipe.gates[0].measure == "entropy"


def windows_of(corpus: Path, model: Path) -> np.ndarray:
    from stages.models.checkpoint.loading import load_tokenizer
    from stages.models.text.windows import windows

    return windows(corpus, "test", load_tokenizer(model), 16, most=3).numpy()


def test_store_takes_an_artifact_and_gives_it_back(tiny, tmp_path):
    uri = f"sqlite://{tmp_path}/store"
    store = connect(uri)
    assert store.scratch == tmp_path / "store" / "state"
    made = sealer(store)("fetch", {"source": tiny.as_uri()})
    again = connect(uri, tmp_path / "elsewhere")
    assert again.manifest(made.identity) == made.manifest and sealer(again)("fetch", {"source": tiny.as_uri()}).cached
    brought = again.checkout(made.identity)
    assert (brought / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert [identity for identity, _ in again.manifests()] == [made.identity]
    assert (again.objects.put("key", b"first"), store.objects.put("key", b"second")) == (True, False)
    assert store.objects.read("key") == b"first"
    store.objects.put(f"blobs/{'e' * 2}/{'e' * 64}", b"of nobody")
    assert sweep(store, older_than_s=-60).counts["blobs"] == 1 and list(store.objects.list("aside/")) == []
    assert connect(uri, reading=True).manifest(made.identity) == made.manifest
    with pytest.raises(StageError, match="there is no store"):
        connect(f"sqlite://{tmp_path}/none", reading=True)
    with pytest.raises(StageError, match="no store speaks") as caught:
        connect("gopher://there")
    assert caught.value.limit == "a folder, file://, s3:// or sqlite://"


def test_backend_compiles_a_graph_answers_and_is_judged(shared_store, graph, topics, tmp_path):
    seal = sealer(shared_store)
    compiled = seal("compile", {"backend": "reference"}, graph=graph)
    assert compiled.manifest.metrics["parity_logit_difference"] < 1e-3
    opened, ids_NT = open_engine(shared_store.checkout(compiled.identity)), token_windows(2, 9)
    expected = literal(shared_store.checkout(graph) / "model.onnx", ids_NT)
    assert opened.target == "reference:cpu" and opened.logits(ids_NT) == pytest.approx(expected, abs=1e-3)
    params = {**SHORT, "target": "reference:cpu"}
    judged = seal("validate", params, model=compiled.identity, text=topics)
    assert judged.manifest.work.executor["runtime"].startswith("onnx ")
    assert report_of(shared_store, judged)["artifact_target"] == "reference:cpu"
    travelled = {path.name for path in travelling_code(tmp_path, "reference").rglob("*_backend.py")}
    assert travelled == {"reference_backend.py"}


def test_backend_is_known_to_recipes():
    cpu = next(index for index, step in enumerate(load_recipe("tiny").steps) if step.name == "cpu")
    recipe = load_recipe("tiny", [f"steps.{cpu}.params.backend=reference"])
    (planned,) = [step for step in expanded(recipe).steps if step.measures == "cpu" and step.corpus == "text"]
    assert planned.params["target"] == "reference:cpu"
    with pytest.raises(StageError, match="'tensorrt', 'reference' or 'onnxruntime'"):
        load_recipe("tiny", [f"steps.{cpu}.params.backend=abacus"])


def test_map_has_a_place_for_all_that_was_added():
    found = files()
    assert {"stages.halve", "stages.measures.entropy", "stages.adapters.sqlite_store"} < found.keys()
    assert breaches(found) == []
