import ast
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.judging import gates, measured, pairing, speeds
from flows.judging.gates import judge
from stages.runtime.contract import StageError


@dataclass(frozen=True, kw_only=True)
class Gate:
    measure: str = "perplexity"
    against: str | None = "dense"
    artifact: str | None = None
    corpus: str | None = None
    at_most: float | None = None
    at_least: float | None = None
    slice: str | None = None
    worst: bool = False
    value_at_most: float | None = None
    value_at_least: float | None = None
    low_at_most: float | None = None
    high_at_least: float | None = None


def report(seed, *, worse=0.0, documents=20, baseline=True):
    """Scores of a model that is `worse` nats a token worse than the one that all seeds share, give or take noise."""
    hard, noise = np.random.default_rng(0), np.random.default_rng(seed + 100)
    rows = []
    for index in range(documents):
        tokens = int(hard.integers(50, 200))
        mean = 3.0 + hard.normal(0, 0.4) + worse + (noise.normal(0, 0.02) if worse else 0.0)
        row = {"id": f"test-{index:05d}", "tokens": tokens, "nll": tokens * mean}
        if baseline:
            row |= {"kl": tokens * worse * noise.uniform(0.5, 1.5), "agree": int(tokens * (1 - worse))}
        rows.append(row)
    return {"corpus": "c1", "documents": rows, "window_tokens": 512, "split": "test"}


REPORTS = {
    ("dense", "text"): report(0, baseline=False),
    ("dense", "other"): report(0, baseline=False),
    ("cpu", "text"): report(1, worse=0.1),
    ("cpu", "other"): report(2, worse=0.2),
}
SIZES = {"dense": 400, "cpu": 100, "gpu": 120}
TARGETS = {"cpu": "onnxruntime:cpu", "gpu": None}


def only(gate, reports=REPORTS, sizes=SIZES, targets=TARGETS):
    verdict = judge([gate], reports, sizes, targets)
    assert len(verdict.results) == 1
    assert verdict.passed == verdict.results[0].passed
    return verdict.results[0]


def with_documents(change, artifact="cpu", corpus="text"):
    spoiled = json.loads(json.dumps(REPORTS[artifact, corpus]))
    change(spoiled)
    return {**REPORTS, (artifact, corpus): spoiled}


def test_perplexity_against_dense_is_the_exponential_of_the_difference_of_means():
    found = only(Gate(corpus="text", at_most=1.25))
    mean = {
        name: sum(d["nll"] for d in REPORTS[name, "text"]["documents"])
        / sum(d["tokens"] for d in REPORTS[name, "text"]["documents"])
        for name in ("cpu", "dense")
    }
    assert found.measured == pytest.approx(math.exp(mean["cpu"] - mean["dense"]))
    assert found.low < found.measured < found.high
    assert (found.artifact, found.target, found.corpus, found.limit) == ("cpu", "onnxruntime:cpu", "text", 1.25)
    assert found.passed


def test_absolute_measures_are_token_weighted_means():
    documents = REPORTS["cpu", "text"]["documents"]
    tokens = sum(d["tokens"] for d in documents)
    for measure, score in (("kl_divergence", "kl"), ("top1_agreement", "agree")):
        found = only(Gate(measure=measure, against=None, corpus="text", at_most=9.0))
        assert found.measured == pytest.approx(sum(d[score] for d in documents) / tokens)
    found = only(Gate(against=None, corpus="text", at_most=1e9))
    assert found.measured == pytest.approx(math.exp(sum(d["nll"] for d in documents) / tokens))


@pytest.mark.parametrize("corpus", ["text", "other"])
def test_gate_holds_only_if_the_bad_end_of_its_interval_holds(corpus):
    free = only(Gate(corpus=corpus, at_most=9.0))
    point, low, high = free.measured, free.low, free.high
    asked = {
        "at_most": [(high, True), (high - 1e-9, False), (point, False), (low, False), (low - 1e-9, False)],
        "at_least": [(low, True), (low + 1e-9, False), (point, False), (high, False), (high + 1e-9, False)],
    }
    for bound, cases in asked.items():
        for limit, expected in cases:
            found = only(Gate(corpus=corpus, **{bound: limit}))
            assert (found.passed, found.bound) == (expected, bound), limit


@settings(max_examples=25, deadline=None)
@given(st.floats(0.5, 2.0), st.floats(0.0, 0.5), st.booleans())
def test_any_passed_gate_passes_with_a_laxer_limit(limit, slack, most):
    first = only(Gate(corpus="text", **{"at_most" if most else "at_least": limit}))
    laxer = limit + slack if most else limit - slack
    second = only(Gate(corpus="text", **{"at_most" if most else "at_least": laxer}))
    assert second.passed or not first.passed


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_order_of_documents_changes_nothing(seed):
    def shuffled(one):
        documents = list(one["documents"])
        random.Random(seed).shuffle(documents)
        return {**one, "documents": documents}

    mixed = {key: shuffled(one) if key[0] == "cpu" else one for key, one in REPORTS.items()}
    every = [Gate(at_most=1.2), Gate(measure="kl_divergence", against=None, at_most=0.1)]
    assert judge(every, mixed, SIZES, TARGETS) == judge(every, REPORTS, SIZES, TARGETS)


def test_documents_are_paired_by_id_whatever_their_scores():
    def worse(one):
        for document in one["documents"]:
            document["nll"] += 2.0 * document["tokens"]
        one["documents"].reverse()

    dense = json.loads(json.dumps(REPORTS["dense", "text"]))
    worse(dense)
    found = only(Gate(corpus="text", at_most=9.0), {**REPORTS, ("cpu", "text"): dense})
    assert found.low == pytest.approx(math.exp(2.0)) == found.high


def test_gate_that_names_neither_artifact_nor_corpus_applies_to_every_executed_one():
    reports = {**REPORTS, ("fp16", "text"): report(3, worse=0.05), ("fp16", "other"): report(4, worse=0.05)}
    verdict = judge([Gate(at_most=1.15)], reports, SIZES, {**TARGETS, "fp16": "onnxruntime:cpu"})
    assert [(r.artifact, r.corpus, r.passed) for r in verdict.results] == [
        ("cpu", "text", True),
        ("cpu", "other", False),
        ("fp16", "text", True),
        ("fp16", "other", True),
    ]
    assert not verdict.passed
    assert verdict.targets == {"cpu": "onnxruntime:cpu", "fp16": "onnxruntime:cpu"}


def test_size_gates_apply_to_plans_that_nothing_executed():
    verdict = judge([Gate(measure="size_bytes", at_most=0.28)], {}, SIZES, TARGETS)
    found = {r.artifact: r for r in verdict.results}
    assert (found["cpu"].measured, found["cpu"].passed) == (0.25, True)
    assert (found["gpu"].measured, found["gpu"].passed, found["gpu"].target) == (0.3, False, "")
    assert only(Gate(measure="size_bytes", against=None, artifact="cpu", at_most=100)).passed
    assert not only(Gate(measure="size_bytes", against=None, artifact="cpu", at_most=99)).passed
    assert not only(Gate(measure="size_bytes", against=None, artifact="cpu", at_least=101)).passed


def test_an_artifact_that_nothing_executed_has_no_perplexity():
    with pytest.raises(StageError, match="gpu, which was not executed"):
        judge([Gate(artifact="gpu", at_most=9.0)], REPORTS, SIZES, TARGETS)


def test_a_gate_that_applies_to_nothing_is_refused_and_not_passed():
    with pytest.raises(StageError, match="applies to nothing"):
        judge([Gate(at_most=9.0)], REPORTS, SIZES, {"gpu": None})
    with pytest.raises(StageError, match="applies to nothing"):
        judge([Gate(at_most=9.0)], {}, SIZES, TARGETS)


@pytest.mark.parametrize(
    ("gate", "text"),
    [
        (Gate(measure="beauty", at_most=1), "no gate can measure 'beauty'"),
        (Gate(corpus="third", at_most=1), "cpu was not measured on third"),
        (Gate(against="pruned", at_most=1), "pruned was not measured on text"),
        (Gate(), "has no limit"),
        (Gate(measure="kl_divergence", at_most=1), "the report of dense has no 'kl'"),
        (Gate(measure="size_bytes", artifact="lost", at_most=1), "the size of lost is not known"),
        (Gate(measure="size_bytes", against="lost", at_most=1), "the size of lost is not known"),
    ],
)
def test_a_gate_on_what_was_not_measured_is_refused(gate, text):
    with pytest.raises(StageError, match=text):
        judge([gate], REPORTS, SIZES, TARGETS)


def test_documents_that_cannot_be_paired_are_refused_by_name():
    def other_tokens(one):
        one["documents"][3]["tokens"] += 1

    def other_text(one):
        one["documents"][3]["id"] = "test-00003-other"

    for change, text in (
        (other_tokens, "test-00003 differs"),
        (other_text, "test-00003 differs"),
        (lambda one: one["documents"].pop(), "test-00019 differs"),
        (lambda one: one.update(corpus="c2"), "of different corpora"),
        (lambda one: one["documents"].append(one["documents"][0]), "stands twice"),
    ):
        with pytest.raises(StageError, match=text):
            judge([Gate(corpus="text", at_most=9.0)], with_documents(change), SIZES, TARGETS)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bound", ["at_most", "at_least"])
@pytest.mark.parametrize("measure", ["perplexity", "kl_divergence"])
def test_a_measure_that_is_no_finite_number_never_passes(bad, bound, measure):
    def spoil(one):
        one["documents"][0] |= {"nll": bad, "kl": bad}

    limit = 1e300 if bound == "at_most" else -1e300
    gate = Gate(measure=measure, against=None, corpus="text", **{bound: limit})
    found = only(gate, with_documents(spoil))
    assert not found.passed
    assert (found.measured, found.low, found.high) == (None, None, None)
    assert "no finite number" in found.text


def test_one_document_is_never_enough():
    reports = {key: {**one, "documents": one["documents"][:1]} for key, one in REPORTS.items()}
    found = only(Gate(corpus="text", at_most=1e9), reports)
    assert not found.passed
    assert found.measured is not None
    json.dumps(found.model_dump(), allow_nan=False)


def test_first_champion_has_nothing_to_beat_and_says_so():
    found = only(Gate(against="champion", corpus="text", at_most=1.0))
    assert found.passed
    assert found.measured is None
    assert (
        "not applicable: no champion" in found.text and found.state == "not applicable" and "passed" not in found.said
    )
    assert only(Gate(measure="size_bytes", against="champion", artifact="cpu", at_most=0.1)).passed


def test_challenger_is_paired_with_the_champion_that_stands():
    champion = {("champion", "text"): report(1, worse=0.1), ("champion", "other"): report(7, worse=0.1)}
    gate = Gate(against="champion", at_most=1.02)
    verdict = judge([gate], REPORTS | champion, {**SIZES, "champion": 90}, TARGETS)
    assert [(r.corpus, r.passed) for r in verdict.results] == [("text", True), ("other", False)]
    assert verdict.results[0].measured == 1.0
    found = only(Gate(measure="top1_agreement", against="champion", corpus="text", at_least=0.99), REPORTS | champion)
    assert found.measured == 1.0
    size = Gate(measure="size_bytes", against="champion", artifact="cpu", at_most=1.0)
    assert not only(size, sizes={**SIZES, "champion": 90}).passed


def test_champion_that_was_not_measured_on_this_corpus_is_an_error_and_no_pass():
    with pytest.raises(StageError, match="champion was not measured on other"):
        judge([Gate(against="champion", at_most=1.0)], {**REPORTS, ("champion", "text"): report(1)}, SIZES, TARGETS)


@pytest.mark.parametrize(
    ("gate", "text"),
    [
        (Gate(against="champion", corpus="text", at_most=1.0), "champion was not measured on text"),
        (Gate(measure="size_bytes", against="champion", artifact="cpu", at_most=1.0), "size of champion is not known"),
    ],
)
def test_champion_that_stands_and_of_which_nothing_is_known_is_an_error_and_not_no_champion(gate, text):
    with pytest.raises(StageError, match=f"{text}.*promote a version whose engine is there"):
        judge([gate], REPORTS, SIZES, TARGETS, champion="3")


def test_value_that_holds_with_a_wide_interval_fails_and_says_what_narrows_it():
    told = only(Gate(corpus="other", at_most=1.05))
    assert told.high and told.measured and "narrow" not in told.text
    near = only(Gate(corpus="other", at_most=(told.measured + told.high) / 2))
    assert not near.passed and near.text.endswith("more `windows`, narrow the interval): FAILED")
    assert "narrow" not in only(Gate(corpus="other", at_most=told.high)).text


def test_text_says_gate_measured_interval_limit_and_outcome():
    failed = only(Gate(corpus="other", at_most=1.05)).text
    assert failed.startswith("perplexity of cpu on onnxruntime:cpu against dense on other: measured 1.2")
    assert failed.endswith("limit at most 1.05: FAILED")
    assert "95% interval" in failed
    size = only(Gate(measure="size_bytes", against=None, artifact="gpu", at_most=200e6), sizes={"gpu": 123_456_789})
    assert size.text == "size_bytes of gpu: measured 123,456,789, limit at most 200,000,000: passed"


def test_a_recipes_own_gates_are_taken_and_none_pass_vacuously():
    recipe = pytest.importorskip("flows.recipe.model")
    gate = recipe.Gate(measure="perplexity", against="dense", corpus="text", at_most=1.25)
    assert judge([gate], REPORTS, SIZES, TARGETS).passed
    empty = judge([], REPORTS, SIZES, TARGETS)
    assert (empty.passed, empty.results) == (True, ())


@pytest.mark.parametrize("module", [gates, measured, pairing, speeds])
def test_module_reads_writes_and_asks_nothing(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    ours = {name for name in modules if name and name.startswith(("flows", "stages"))}
    assert ours <= {
        "flows.judging.measured",
        "flows.judging.pairing",
        "flows.judging.speeds",
        "flows.reporting.format",
        "flows.results",
        "stages.measures.interval",
        "stages.measures.paired",
        "stages.measures.table",
        "stages.runtime.contract",
    }
    assert not modules & {"pathlib", "os", "time", "random", "mlflow", "prefect", "torch"}
