"""Two runs side by side: a speed stands beside one of the same device alone."""

import itertools

from flows.reporting.compare import Run, compared
from flows.results import GateResult, RunResult, StepResult
from stages.runtime.contract import FileEntry, Kind, Manifest, Provenance, Work
from stages.runtime.fingerprint import digest_bytes, fingerprint


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


def test_each_bound_of_a_gate_is_a_row_and_a_failed_one_stays_failed(store):
    size = {"measure": "size_bytes", "artifact": "cpu", "target": "", "corpus": "", "measured": 202_416.0, "text": ""}
    gates = [
        GateResult(bound="at_most", limit=1e3, passed=False, **size),
        GateResult(bound="at_least", limit=1.0, passed=True, **size),
        GateResult(bound="at_least", limit=2.0, passed=True, **size),
        GateResult(bound="at_most", held="value", limit=1e6, passed=True, **size),
    ]
    one = run("a x2", 10.0)
    gated = Run("gate failed", "{}", one.result.model_copy(update={"gates": gates}))
    found = compared(store, ("one", "two"), (gated, one)).gates
    assert {name: pair.a for name, pair in found.items()} == {
        "state": "gate failed",
        "size_bytes of cpu, at most": "failed: 202,416, limit 1000",
        "size_bytes of cpu, at least": "passed: 202,416, limit 1",
        "size_bytes of cpu, at least (2)": "passed: 202,416, limit 2",
        "size_bytes of cpu, value at most": "passed: 202,416, limit 1,000,000",
    }


NUMBERS = itertools.count()


def sealed(store, kind=Kind.CHECKPOINT, metrics=None, stage="share", inputs=(), created="2026-01-01", **params):
    number = next(NUMBERS)
    data = str(number).encode()
    folder = store.scratch / "made" / str(number)
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(data)
    executor = {"device": f"{params.get('target', '')} x2"}
    work = Work(stage=stage, code=f"{number:064}", params=params, inputs=dict(inputs), requires={}, executor=executor)
    told = {"host": "h", "device": "d", "created": created, "seconds": 1.0, "peak_rss_bytes": 1}
    files = {"a": FileEntry(sha256=digest_bytes(data), size=len(data))}
    made = Manifest(work=work, kind=kind, files=files, metrics=metrics or {}, provenance=Provenance(step="s", **told))
    store.publish(folder, made)
    return fingerprint(work)


def test_reports_of_other_windows_are_rows_of_their_own(store):
    dense, cpu = sealed(store, keep=1), sealed(store, Kind.ENGINE, keep=2)
    usual = {"split": "test", "window_tokens": 512, "windows": None, "variants": []}

    def measured(model, perplexity, target, created="2026-01-01", **params):
        words = {"stage": "validate", "inputs": {"model": model, "text": "c" * 64}, "created": created}
        sealed(store, Kind.REPORT, {"perplexity": perplexity}, target=target, **words, **{**usual, **params})

    for perplexity, params in (
        (1455.0, {"windows": 8}),
        (1509.0, {"windows": 4}),
        (7.0, {}),
        (3.0, {"split": "train"}),
    ):
        measured(dense, perplexity, "torch:cpu", **params)
        if "split" not in params:
            measured(cpu, perplexity + 1, "onnxruntime:cpu", **params)
    found = compared(store, (dense, cpu), (None, None)).measures
    rows = {name: (pair.a, pair.b) for name, pair in found.items() if name.startswith("perplexity")}
    assert rows == {
        "perplexity on cccccccc": (7.0, 8.0),
        "perplexity on cccccccc, windows 8": (1455.0, 1456.0),
        "perplexity on cccccccc, windows 4": (1509.0, 1510.0),
        "perplexity on cccccccc, split train": (3.0, None),
    }
    measured(dense, 9.0, "torch:cpu", created="2026-01-03")
    measured(dense, 8.0, "torch:cpu", created="2026-01-02")
    assert compared(store, (dense, cpu), (None, None)).measures["perplexity on cccccccc"].a == 9.0  # the latest


def test_measurements_of_two_runs_on_other_windows_or_text_are_rows_of_their_own(store):
    usual = {"split": "test", "window_tokens": 512, "windows": None, "variants": []}

    def measured(perplexity, text="c", **params):
        words = {"stage": "validate", "inputs": {"model": "d" * 64, "text": text * 64}, "created": "2026-01-01"}
        identity = sealed(store, Kind.REPORT, {"perplexity": perplexity}, target="x", **words, **{**usual, **params})
        one = run("a x2", perplexity)
        steps = [step.model_copy(update={"fingerprint": identity}) for step in one.result.steps[1:]]
        return Run("passed", "{}", one.result.model_copy(update={"steps": steps}))

    def rows(a, b):
        found = compared(store, ("one", "two"), (a, b)).measures
        return {name.removeprefix("validate-cpu-text perplexity") for name in found if "perplexity" in name}

    first = measured(7.0, windows=8)
    assert rows(first, measured(8.0, windows=8)) == {""}
    assert rows(first, measured(8.0)) == {", windows 8", ""}
    assert rows(first, measured(8.0, "e", windows=8)) == {", text cccccccc", ", text eeeeeeee"}


def test_speeds_at_other_prompts_are_rows_of_their_own(store):
    cpu, other = sealed(store, Kind.ENGINE, keep=3), sealed(store, Kind.ENGINE, keep=4)
    for engine, new_tokens in ((cpu, 20), (other, 20), (other, 40)):
        words = {"stage": "bench", "inputs": {"artifact": engine}, "target": "onnxruntime:cpu", "batches": [1, 4]}
        sealed(store, Kind.REPORT, {"items_per_s": float(new_tokens)}, new_tokens=new_tokens, **words)
    found = compared(store, (cpu, other), (None, None)).measures
    rows = {name: (pair.a, pair.b) for name, pair in found.items() if name.startswith("items")}
    assert rows == {
        "items_per_s on onnxruntime:cpu x2": (20.0, 20.0),
        "items_per_s on onnxruntime:cpu x2, new_tokens 40": (None, 40.0),
    }
