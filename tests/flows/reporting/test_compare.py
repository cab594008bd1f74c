"""Two runs side by side: a speed stands beside one of the same device alone."""

from flows.reporting.compare import Run, compared
from flows.results import RunResult, StepResult
from stages.runtime.contract import Kind


def run(device, speed):
    told = {"kind": Kind.REPORT, "fingerprint": "f", "uri": "u", "cached": False, "seconds": 1.0, "peak_rss_bytes": 0}
    steps = [
        StepResult(
            name="bench-cpu",
            stage="bench",
            metrics={"decode_tokens_per_s": speed},
            measures="cpu",
            device=device,
            **told,
        ),
        StepResult(
            name="validate-cpu-text",
            stage="validate",
            metrics={"perplexity": 20.0},
            measures="cpu",
            corpus="text",
            **told,
        ),
    ]
    lists = {"gates": [], "model": None, "executed": [], "compiled": []}
    result = RunResult(
        run="r", passed=True, verdict="not judged", seconds=1, report="", store="s", steps=steps, **lists
    )
    return Run("passed", "{}", result)


def test_speeds_of_one_device_are_a_pair_and_of_two_never_are(store):
    here = "bench-cpu decode_tokens_per_s on a x2"
    found = compared(store, ("one", "two"), (run("a x2", 10.0), run("a x2", 20.0))).measures
    assert (found[here].a, found[here].b) == (10.0, 20.0)
    found = compared(store, ("one", "two"), (run("a x2", 10.0), run("b x8", 20.0))).measures
    there = "bench-cpu decode_tokens_per_s on b x8"
    assert (found[here].a, found[here].b, found[there].a, found[there].b) == (10.0, None, None, 20.0)
    assert found["validate-cpu-text perplexity"].a == found["validate-cpu-text perplexity"].b
