"""What a run came to, in words."""

from flows.reporting.verdict_text import broken, described, summary
from flows.results import GateResult
from tests.flows.made_up import made_up


def result(**changes):
    passed = changes.pop("passed", True)
    return made_up(passed=passed)[0].model_copy(update=changes)


def test_summary_of_a_passed_run_is_one_word():
    assert summary(result()) == "passed"


def test_summary_of_a_run_without_gates_says_that_nothing_was_judged():
    assert summary(result(gates=[], verdict="not judged")) == "not judged" and "no gate" in described(result(gates=[]))


def test_summary_names_each_failing_gate_with_measured_and_limit_and_no_other():
    text = "perplexity of cpu on onnxruntime:cpu on text: measured 1.31 (95% interval 1.28 to 1.34), limit at most 1.25"
    one = GateResult(measure="size_bytes", artifact="gpu", target="", corpus="", measured=3.0, limit=2.0, passed=False)
    other = one.model_copy(update={"text": f"{text}: FAILED"})
    held = one.model_copy(update={"passed": True, "text": "top1 held"})
    failed = result(passed=False, gates=[held, other, one])
    assert summary(failed) == f"gate failed: {text}; size_bytes of gpu: measured 3.0, limit at most 2.0"
    said = described(failed)
    assert said.startswith("**gate failed**") and "no alias moved" in said
    assert said.index("measured 1.31") < said.index("top1 held") and "size\\_bytes" in said


def test_description_names_what_was_promoted_and_stays_within_what_mlflow_takes():
    passed = result()
    assert "`smollm2-135m` version 3 as `champion` (onnxruntime:cpu)" in described(passed)
    many = result(gates=passed.gates * 40)
    assert len(described(many)) < 8000 and "135 more" in described(many)
    assert len(broken("x" * 9000, interrupted=False)) < 5000


def test_description_of_what_broke_holds_the_error_as_it_is():
    assert "a_b\n*c*" in broken("a_b\n*c*", interrupted=False)
    assert "interrupted" in broken("", interrupted=True)
