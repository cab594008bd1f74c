"""A run as the main job's could be: made-up numbers for the report."""

import math

from flows.results import GateResult, ModelResult, RunResult, StepResult
from stages.runtime.contract import FileEntry, Kind, Manifest, Provenance, Work
from stages.runtime.fingerprint import fingerprint

STEPS = [
    ("dense", "fetch", Kind.CHECKPOINT, 21.4, 538e6, 134_515_008, {"text": 21.31, "other": 26.80}),
    ("text", "corpus", Kind.CORPUS, 1.9, 0.46e6, None, {}),
    ("other", "corpus", Kind.CORPUS, 1.2, 0.9e6, None, {}),
    ("shared", "share", Kind.CHECKPOINT, 48.0, 511e6, 127_800_100, {"text": 22.9, "other": 28.1}),
    ("pruned", "prune", Kind.CHECKPOINT, 31.0, 484e6, 121_002_112, {"text": 26.4, "other": 32.5}),
    ("healed", "recover", Kind.CHECKPOINT, 402.0, 484e6, 121_002_112, {"text": 22.6, "other": 29.6}),
    ("int8", "quantize", Kind.CHECKPOINT, 96.0, 143e6, 121_002_112, {"text": 23.3, "other": 30.4}),
    ("graph", "export", Kind.ONNX, 44.0, 146e6, None, {}),
    ("gpu", "compile", Kind.ENGINE, 12.0, 168e6, None, {}),
    ("cpu", "compile", Kind.ENGINE, 9.0, 146e6, None, {"text": 23.35, "other": 30.41}),
]


def made_up(*, passed=True, cached=False):
    """Result, manifests, reports, curves."""
    steps, manifests, reports = [], {}, {}
    rows = [*STEPS]
    for name, *_, scores in STEPS:
        for corpus, value in scores.items():
            reports[name, corpus] = {"measures": {"perplexity": value}}
            rows.append((f"{name}-on-{corpus}", "validate", Kind.REPORT, 14.2, 1e4, None, {"": value}))
    for name, stage, kind, seconds, size, parameters, scores in rows:
        metrics = {"size_bytes": size} if kind is not Kind.REPORT else {"perplexity": scores[""], "tokens": 40_960.0}
        if parameters:
            metrics["parameters"] = parameters
        work = Work(
            stage=stage,
            code="c0de" * 16,
            params={"seed": name},
            inputs={"model": "a" * 64},
            requires={"torch": "2.13.0", "transformers": "5.23.0"},
            executor={"target": "onnxruntime:cpu"} if kind is Kind.REPORT else {},
        )
        made = Provenance(
            step=name,
            commit="719c1af" + "0" * 33,
            host="laptop",
            device="A processor x2",
            created="2026-11-21T23:00:00+00:00",
            seconds=seconds,
            peak_rss_bytes=3_400_000_000,
        )
        files = {"model.safetensors": FileEntry(sha256="b" * 64, size=int(size))}
        manifests[name] = Manifest(work=work, kind=kind, files=files, metrics=metrics, provenance=made)
        steps.append(
            StepResult(
                name=name,
                stage=stage,
                kind=kind,
                fingerprint=fingerprint(work),
                uri="file:///home/someone/.enginery/store",
                cached=cached,
                seconds=0.0 if cached else seconds,
                peak_rss_bytes=made.peak_rss_bytes,
                metrics=metrics,
                why="" if cached else "params.seed: absent -> x",
            )
        )
    result = RunResult(
        run="20261121-230000-ab12",
        passed=passed,
        verdict="passed" if passed else "gate failed",
        seconds=702.4,
        report="report.html",
        store="file:///home/someone/.enginery/store",
        steps=steps,
        gates=gates(passed),
        model=ModelResult(name="smollm2-135m", version="3", alias="champion", targets=["onnxruntime:cpu"])
        if passed
        else None,
        executed=["cpu on onnxruntime:cpu"],
        compiled=["gpu for tensorrt_rtx:sm_89+sm_120"],
        outputs={
            "report": "/home/someone/.enginery/store/state/runs/20261121-230000-ab12/report.html",
            "cpu": "/x/cpu",
        },
    )
    kl = [(i, 0.9 * math.exp(-i / 60) + 0.08 + 0.02 * math.sin(i)) for i in range(300)]
    return (
        result,
        manifests,
        reports,
        {"healed": {"kl_divergence": kl, "perplexity": [(0, 26.4), (150, 23), (300, 22.6)]}},
    )


def gates(passed):
    def one(measure, corpus, measured, low, high, limit, against=None, bound="at_most"):
        held = high <= limit if bound == "at_most" else low >= limit
        return GateResult(
            measure=measure,
            artifact="cpu",
            target="onnxruntime:cpu",
            corpus=corpus,
            measured=measured,
            low=low,
            high=high,
            bound=bound,
            limit=limit,
            passed=held,
            against=against,
            text=f"{measure} of cpu on {corpus}: measured {measured}, limit {limit}",
        )

    return [
        one("perplexity", "text", 1.096, 1.081, 1.113, 1.25 if passed else 1.1, "dense"),
        one("perplexity", "other", 1.135, 1.118, 1.155, 1.35, "dense"),
        one("top1_agreement", "text", 0.842, 0.835, 0.849, 0.8, bound="at_least"),
        one("size_bytes", "", 146e6, 146e6, 146e6, 200e6),
    ]
