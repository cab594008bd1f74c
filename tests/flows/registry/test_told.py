"""Registered models of other tasks, loaded by MLflow: named columns, plain values, refusals that are bad requests."""

import numpy as np
import pandas as pd
import pytest
from mlflow import pyfunc
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from flows.registry.ask_registered import asked as asked_far
from flows.registry.package import _save, travelling_code
from flows.tracking.connect import quiet
from stages.runtime.contract import StageError
from stages.serving.engine import open_engine
from stages.serving.reading import answer, choose, classify, embed, tag
from stages.serving.told import asked_by, numbers, told
from tests.stages.export.test_pooled import modules
from tests.stages.serving.test_reading import TEXTS, checkpoint, compiled


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("told")


def registered(folder, root):
    """The engine of a checkpoint, its registered model's folder, and that model as MLflow loads it."""
    quiet()
    engine = compiled(folder, root)
    code = travelling_code(root / "code", "onnxruntime")
    _save(root / "model", engine, code, "m-1", "r-1")
    return open_engine(engine), root / "model", pyfunc.load_model(str(root / "model"))


@pytest.fixture(scope="module")
def vectors(root):
    own = modules(checkpoint("bert_bare", root), root / "own", {"pooling_mode_mean_tokens": True}, most=16)
    return registered(own, root / "vectors")


@pytest.fixture(scope="module")
def classes(root):
    return registered(checkpoint("bert_classes", root), root / "classes")


def test_vectors_are_the_engines_in_each_shape_of_a_table(vectors):
    engine, folder, model = vectors
    wanted = embed(engine, TEXTS)
    for asked in (
        TEXTS,
        pd.DataFrame({"text": TEXTS}),
        {"text": TEXTS},
        [{"text": one} for one in TEXTS],
        np.array(TEXTS),
    ):
        np.testing.assert_allclose(model.predict(asked), wanted, rtol=1e-6)
    (cut,) = model.predict(["a b " * 20], params={"truncate": True})
    np.testing.assert_allclose(cut, embed(engine, ["a b " * 20], truncate=True)[0], rtol=1e-6)
    described = Model.load(str(folder))
    assert described.signature.inputs.input_names() == ["text"]
    assert {one.name: one.default for one in described.signature.params} == {"truncate": False, "unanswerable": False}
    assert [[*one] for one in described.load_input_example(str(folder))] == [["text"]]


def test_classes_of_texts_and_pairs_are_the_engines(classes):
    engine, folder, model = classes
    pairs = pd.DataFrame({"text": ["a b", "c"], "pair": ["d", None]})
    for said, wanted in zip(model.predict(pairs), classify(engine, [("a b", "d"), "c"]), strict=True):
        assert (said["label"], said["score"]) == (wanted[0].label, pytest.approx(wanted[0].score))
        assert said["scores"] == pytest.approx({one.label: one.score for one in wanted})
    columns = {one.name: one.required for one in Model.load(str(folder)).signature.inputs}
    assert columns == {"text": True, "pair": False}


@pytest.mark.parametrize(
    ("asked", "params", "said"),
    [
        ([""], {}, "a text is empty; measured ''"),
        (["a b " * 20], {}, "measured 42 tokens; limit 16 tokens"),
        ([3], {}, "a text is no text; measured 3"),
        (["a \udcff"], {}, "limit what UTF-8 can write"),
        (["a"], {"trunkate": True}, "there is no parameter 'trunkate'; measured its task is embed; limit truncate"),
        (["a"], {"unanswerable": True}, "there is no parameter 'unanswerable'"),
        (["a"], {"truncate": 1}, "truncate is neither true nor false; measured 1; limit true, false"),
        ({"txt": ["a"]}, {}, "the columns are not those that the model is asked by; measured txt; limit text"),
        ({"text": ["a"], "pair": ["b"]}, {}, "measured text, pair; limit text"),
        ([], {}, "nothing is asked"),
    ],
)
def test_what_cannot_be_told_is_a_bad_request(vectors, asked, params, said):
    with pytest.raises(MlflowException, match=said) as refused:
        vectors[2].predict(asked, params=params)
    assert refused.value.error_code == "BAD_REQUEST"


def test_entities_and_answers_are_told_as_plain_values(root):
    tagger, reader = (open_engine(checkpoint(name, root)) for name in ("bert_tokens", "bert_answers"))
    said = told(tagger, {"text": TEXTS}, {})
    assert [[one["start"] for one in found] for found in said] == [
        [one.start for one in found] for found in tag(tagger, TEXTS)
    ]
    (found,) = told(reader, {"question": ["a"], "context": ["b c d"]}, {"unanswerable": True})
    own = answer(reader, "a", "b c d", unanswerable=True)
    assert found == {"text": own.text, "score": own.score, "start": own.start, "end": own.end}
    chooser = open_engine(checkpoint("bert_choices", root))
    (found,) = told(chooser, {"question": ["a"], "choices": [["b", "c d"]]}, {})
    own = choose(chooser, "a", ["b", "c d"])
    assert found == vars(own[0]) | {"scores": [one.score for one in sorted(own, key=lambda one: one.choice)]}
    with pytest.raises(StageError, match="the choices of a question are no list; measured 'b'"):
        told(chooser, {"question": ["a"], "choices": ["b"]}, {})
    assert asked_by(chooser, [("a", "b"), ("c",)]) == {"question": ["a", "c"], "choices": [["b"], ["c"]]}
    with pytest.raises(StageError, match="measured text; limit question, context"):
        told(reader, {"text": ["a"]}, {})
    with pytest.raises(StageError, match="the model is not asked by texts; measured its task is fill"):
        told(open_engine(checkpoint("bert_masked", root)), {"text": ["a"]}, {})


def test_proof_asks_registered_models_by_their_columns_and_hears_the_engines_numbers(root, vectors, classes):
    """What does not fit is read from its beginning, and not asked by columns, which refuse it."""
    for engine, _, model in (vectors, classes):
        wanted = [engine.logits(np.array([engine.tokenizer.encode(one).ids])).ravel().tolist() for one in TEXTS]
        long = "a b " * engine.maximum_tokens
        said = asked_far(model, [[one] for one in [*TEXTS, long]], 8)
        assert said[: len(TEXTS)] == wanted
        cut = np.array([engine.tokenizer.encode(long).ids[: engine.maximum_tokens]])
        assert said[-1] == engine.logits(cut).ravel().tolist()
    reader = open_engine(checkpoint("bert_answers", root))
    pairs = [("a", "b c d"), ("a b",)]
    assert asked_by(reader, pairs) == {"question": ["a", "a b"], "context": ["b c d", "a b"]}
    pair = reader.tokenizer.encode("a", "b c d")
    told_apart = reader.logits(np.array([pair.ids]), np.array([pair.type_ids]))
    assert numbers(reader, pairs)[0] == told_apart.ravel().tolist()
    assert told_apart.ravel().tolist() != reader.logits(np.array([pair.ids])).ravel().tolist()
    assert asked_by(open_engine(checkpoint("bert_masked", root)), pairs) == {}


def test_model_that_does_not_answer_as_users_ask_it_has_not_answered(vectors, monkeypatch):
    monkeypatch.setattr(type(vectors[2].unwrap_python_model()), "predict", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asked_far(vectors[2], [["a"]], 8)
