"""Turn an ONNX graph into an engine: TensorRT plans for the listed architectures, or a graph for the CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stages.adapters.targets import refuse_impossible
from stages.runtime.contract import Image, Input, Kind, Metrics, Params, Progress, Stage, StageError

GRAPH, PLAN = "model.onnx", "model.plan"
PARITY_TOKENS = 64


class CompileParams(Params):
    """What the engine is for.

    Attributes:
        backend: what executes it.
        architectures: GPUs a TensorRT plan is for, `sm_89`, ...; one plan serves them all. None for onnxruntime.
        maximum_tokens: the longest sequence; null for as many as the model reads, at most 2,048.
        maximum_batch: the largest batch of a TensorRT plan.
    """

    backend: Literal["tensorrt_rtx", "tensorrt", "onnxruntime"]
    architectures: tuple[str, ...] = ()
    maximum_tokens: int | None = Field(None, ge=1)
    maximum_batch: int = Field(8, ge=1)


def compile_engine(params: CompileParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Write the executable and `engine.json`, with the tokenizer beside them."""
    from stages.serving.files import carry

    source = inputs["graph"]
    described = json.loads((source / "graph.json").read_text(encoding="utf-8"))
    architectures = tuple(dict.fromkeys(params.architectures))
    refuse_impossible(params.backend, architectures, described["precisions"])
    longest = min(params.maximum_tokens or 2048, described["maximum_tokens"])
    engine: dict[str, Any] = {
        "backend": params.backend,
        "architectures": list(architectures),
        "precisions": described["precisions"],
        "vocabulary": described["vocabulary"],
        "maximum_tokens": longest,
    }
    if params.backend == "onnxruntime":
        metrics = _for_processor(source, output, described, progress)
        engine |= {"target": "onnxruntime:cpu", "executable": GRAPH, "executed": True}
    else:
        metrics = _plan(params, architectures, longest, source, output, progress)
        # One plan for several architectures has not run on any of them when it was built ahead of time.
        target = f"{params.backend}:{'+'.join(architectures)}"
        engine |= {"target": target, "executable": PLAN, "executed": False, "maximum_batch": params.maximum_batch}
    carry(source, output)
    (output / "engine.json").write_text(json.dumps(engine, indent=1, sort_keys=True), encoding="utf-8")
    return metrics


def _plan(
    params: CompileParams, architectures: Sequence[str], longest: int, source: Path, output: Path, progress: Progress
) -> Metrics:
    from stages.adapters.tensorrt import Shapes, build_plan

    shapes = Shapes(maximum_batch=params.maximum_batch, maximum_tokens=longest)
    plan = build_plan(source / GRAPH, params.backend, architectures, shapes, progress)
    (output / PLAN).write_bytes(plan)
    return {"size_bytes": float(len(plan)), "architectures": float(len(architectures))}


def _for_processor(source: Path, output: Path, described: Mapping[str, Any], progress: Progress) -> Metrics:
    """The graph with integer kernels, proven to compute what the graph computes."""
    from tokenizers import Tokenizer

    from stages.graphs import onnx_graph, ort_checks, ort_lowering
    from stages.graphs.parity import prose_ids

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    ids_NT = prose_ids(
        lambda text: list(tokenizer.encode(text).ids), 1, min(PARITY_TOKENS, described["maximum_tokens"])
    )
    model = onnx_graph.load(source / GRAPH)
    lowered = ort_lowering.lower(model)
    onnx_graph.save(model, output / GRAPH)
    del model
    _require_lowered(onnx_graph.held(onnx_graph.load(output / GRAPH)).precisions, described)
    progress.advanced(1, 3)
    difference = ort_checks.require_same_numbers(source / GRAPH, output / GRAPH, ids_NT)
    progress.advanced(2, 3)
    ort_checks.require_exact_products(output / GRAPH, ids_NT)
    progress.advanced(3, 3)
    return {
        "size_bytes": float(sum(path.stat().st_size for path in output.glob(f"{GRAPH}*"))),
        "integer_products": float(lowered.get(ort_lowering.INTEGER_PRODUCT, 0)),
        "parity_logit_difference": difference,
    }


def _require_lowered(precisions: frozenset[str], described: Mapping[str, Any]) -> None:
    lost = set(described["precisions"]) - precisions
    if lost:
        raise StageError(
            "the engine lost a number format of the graph",
            measured=", ".join(sorted(precisions)),
            limit=", ".join(described["precisions"]),
            remedy="Report it with graph.json.",
        )


COMPILE = Stage(
    name="compile",
    params=CompileParams,
    inputs={"graph": Input(kinds=frozenset({Kind.ONNX}))},
    output=Kind.ENGINE,
    image=Image.TENSORRT,
    run=compile_engine,
)
