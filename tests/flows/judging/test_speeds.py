"""Gates on speed: the bad end of one report's own interval, named with its device."""

import pytest

from flows.judging.gates import judge
from stages.runtime.contract import StageError
from tests.flows.judging.test_gates import REPORTS, SIZES, TARGETS, Gate

RATIOS = {"decode_tokens_per_s": [2.5, 2.0, 3.5], "time_to_first_token_ms": [0.5, 0.4, 0.8]}


def speed(device="a processor x2", task="generate"):
    """What `bench` seals, as far as gates read it."""
    measures = {"decode_tokens_per_s": 50.0, "time_to_first_token_ms": 200.0, "peak_rss_bytes": 3e8}
    intervals = {"decode_tokens_per_s": [40.0, 55.0], "time_to_first_token_ms": [150.0, 260.0]}
    return {
        "task": task,
        "executor": {"target": "onnxruntime:cpu", "device": device, "runtime": "onnxruntime 1"},
        "speed": {"artifact": {"measures": measures, "intervals": intervals, "threads": 2}, "ratios": RATIOS},
    }


SPEEDS = {("cpu", "dense"): speed()}


def only(speeds=SPEEDS, targets=TARGETS, **fields):
    (found,) = judge([Gate(**fields)], REPORTS, SIZES, targets, speeds=speeds).results
    return found


@pytest.mark.parametrize(
    ("fields", "passed"),
    [
        ({"measure": "decode_tokens_per_s", "at_least": 2.0}, True),
        ({"measure": "decode_tokens_per_s", "at_least": 2.01}, False),
        ({"measure": "decode_tokens_per_s", "value_at_least": 2.5}, True),
        ({"measure": "time_to_first_token_ms", "at_most": 0.8}, True),
        ({"measure": "time_to_first_token_ms", "at_most": 0.79}, False),
        ({"measure": "time_to_first_token_ms", "against": None, "at_most": 260}, True),
        ({"measure": "time_to_first_token_ms", "against": None, "at_most": 259}, False),
        ({"measure": "decode_tokens_per_s", "against": None, "at_least": 40}, True),
        ({"measure": "decode_tokens_per_s", "against": None, "at_least": 41}, False),
        ({"measure": "peak_rss_bytes", "against": None, "at_most": 3e8}, True),
        ({"measure": "peak_rss_bytes", "against": None, "at_most": 2e8}, False),
    ],
)
def test_gate_on_a_speed_holds_only_if_the_bad_end_does(fields, passed):
    found = only(**fields)
    assert found.passed == passed
    assert (found.artifact, found.target, found.corpus) == ("cpu", "onnxruntime:cpu", "")


def test_gate_on_a_speed_says_the_device_that_it_holds_on():
    found = only(measure="decode_tokens_per_s", at_least=2)
    assert (found.measured, found.low, found.high) == (2.5, 2.0, 3.5)
    assert found.text == (
        "decode_tokens_per_s of cpu on onnxruntime:cpu against dense: measured 2.5 (95% interval 2 to 3.5), "
        "limit at least 2 (on a processor x2, 2 threads): passed"
    )


def test_gate_on_a_speed_reads_the_report_of_each_artifact_and_compares_none_with_another_device():
    speeds = {**SPEEDS, ("two", "dense"): speed("a faster processor x8")}
    targets = {"cpu": "onnxruntime:cpu", "two": "onnxruntime:cpu"}
    results = judge([Gate(measure="decode_tokens_per_s", at_least=2)], REPORTS, SIZES, targets, speeds=speeds).results
    assert [one.artifact for one in results] == ["cpu", "two"]
    assert "on a processor x2" in results[0].text and "on a faster processor x8" in results[1].text
    for other in ("cpu", "champion"):
        with pytest.raises(StageError, match=f"two was not measured in turn with {other}") as caught:
            only(speeds, targets, measure="decode_tokens_per_s", artifact="two", against=other, at_least=1)
        assert caught.value.limit == "dense"


def test_gate_on_a_speed_that_was_not_measured_is_an_error_with_a_remedy():
    with pytest.raises(StageError, match="whose speed was not measured") as caught:
        only({}, measure="decode_tokens_per_s", at_least=2)
    assert "speed: true" in caught.value.remedy
    with pytest.raises(StageError, match="items_per_s of cpu, which is not measured of a model of its task") as caught:
        only(measure="items_per_s", against=None, at_least=2)
    assert "decode_tokens_per_s" in caught.value.remedy
    with pytest.raises(StageError, match="which was not executed"):
        only(measure="decode_tokens_per_s", artifact="gpu", at_least=2)


def test_gate_on_a_speed_of_all_leaves_out_the_baseline_that_is_judged_itself():
    targets = {"cpu": "onnxruntime:cpu", "dense": "torch:cpu"}
    assert only(targets=targets, measure="decode_tokens_per_s", at_least=2).artifact == "cpu"
