"""Turn an ONNX graph into an engine: TensorRT plans for the listed architectures, or a graph for the CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stages.runtime.contract import Image, Input, Kind, Metrics, Params, Progress, Stage, StageError

GRAPH, PLAN = "model.onnx", "model.plan"
CARRIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
           "special_tokens_map.json")  # fmt: skip

TARGETS: Mapping[str, tuple[str, ...]] = {
    "tensorrt_rtx": ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"),
    "tensorrt": ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"),
    "onnxruntime": (),
}
"""Backend -> the architectures it builds for; onnxruntime is for the processor."""

_SINCE = {"fp8": 89, "int4": 80}
"""Number format -> the first architecture that has it."""

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


def refuse_impossible(backend: str, architectures: Sequence[str], precisions: Collection[str] = ()) -> None:
    """Refuse before anything is built what no builder can build.

    Args:
        backend: `tensorrt_rtx`, `tensorrt` or `onnxruntime`.
        architectures: as a recipe lists them.
        precisions: number formats of the graph: `float32`, `float16`, `int8`, `int4`, `fp8`.

    Raises:
        StageError: an unknown or missing architecture, or a format that one of them has not.
    """
    allowed = TARGETS[backend]
    if not allowed and architectures:
        raise StageError(
            f"{backend} is for the processor and takes no `architectures`",
            measured=", ".join(architectures),
            remedy="Remove them, or choose backend: tensorrt_rtx.",
        )
    if allowed and not architectures:
        raise StageError(f"{backend} needs `architectures`", measured="none", limit=", ".join(allowed))
    for name in architectures:
        if name not in allowed:
            other = [one for one, names in TARGETS.items() if name in names]
            remedy = f"Choose backend: {other[0]} for it." if other else "Name one of these."
            raise StageError(f"{backend} builds nothing for {name!r}", limit=", ".join(allowed), remedy=remedy)
        _refuse_formats(backend, name, precisions)


def _refuse_formats(backend: str, name: str, precisions: Iterable[str]) -> None:
    for precision in sorted(precisions):
        if int(name.removeprefix("sm_")) < _SINCE.get(precision, 0):
            raise StageError(
                f"{name} has no {precision}",
                measured=name,
                limit=f"sm_{_SINCE[precision]} and newer",
                remedy="Leave the architecture out, or quantize by another scheme.",
            )
        if backend == "tensorrt_rtx" and name == "sm_75" and precision == "float32":
            raise StageError(
                "tensorrt_rtx multiplies no float32 on sm_75",
                measured="a graph with float32 products",
                limit="float16",
                remedy="Leave sm_75 out.",
            )


def compile_engine(params: CompileParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Write the executable and `engine.json`, with the tokenizer beside them."""
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
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
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

    from stages.models import cpu_kernels, graph, kernel_checks
    from stages.models.parity import prose_ids

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    ids_NT = prose_ids(
        lambda text: list(tokenizer.encode(text).ids), 1, min(PARITY_TOKENS, described["maximum_tokens"])
    )
    model = graph.load(source / GRAPH)
    lowered = cpu_kernels.lower(model)
    graph.save(model, output / GRAPH)
    del model
    _require_lowered(graph.held(graph.load(output / GRAPH)).precisions, described)
    progress.advanced(1, 3)
    difference = kernel_checks.require_same_numbers(source / GRAPH, output / GRAPH, ids_NT)
    progress.advanced(2, 3)
    kernel_checks.require_exact_products(output / GRAPH, ids_NT)
    progress.advanced(3, 3)
    return {
        "size_bytes": float(sum(path.stat().st_size for path in output.glob(f"{GRAPH}*"))),
        "integer_products": float(lowered.get(cpu_kernels.INTEGER_PRODUCT, 0)),
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
