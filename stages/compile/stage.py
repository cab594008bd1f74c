"""Turn an ONNX graph into an engine: a plan for the listed GPUs, or an engine for the processor, which is proven."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.adapters.backends import (
    ENCODER,
    Asked,
    Backend,
    backend,
    backends,
    encoder_of,
    module_of,
    refuse_impossible,
)
from stages.runtime.contract import Image, Input, Kind, Metrics, Params, Progress, Stage, StageError

GRAPH = "model.onnx"
DEFAULT_TOKENS = 2048
WHOLE = "float32"

if TYPE_CHECKING:
    from stages.models.checkpoint.subject import Subject

    BackendName = str
else:
    BackendName = Literal[backends()]


class CompileParams(Params):
    """What the engine is for.

    Attributes:
        backend: what executes it.
        architectures: GPUs a TensorRT plan is for, `sm_89`, ...; one plan serves them all. None for onnxruntime.
        maximum_tokens: the longest sequence; null for as many as the model reads, at most 2,048.
        maximum_batch: the largest batch of a TensorRT plan.
        activations: how onnxruntime multiplies INT4 and INT8 weights of float activations: with activations as the
            graph has them, or rounded to INT8 as they come, in blocks for INT4, by rows for INT8, which is faster. An
            engine that rounds is judged as it rounds, as any other.
        fine: with `activations: int8`, the largest share of the INT8 weights that meet activations in sixteen bits,
            where eight move the answers most: a kind of map in all layers, or none of it.
    """

    backend: BackendName
    architectures: tuple[str, ...] = ()
    maximum_tokens: int | None = Field(None, ge=1)
    maximum_batch: int = Field(8, ge=1)
    activations: Literal["as_graph", "int8"] = "as_graph"
    fine: float = Field(0, ge=0, le=1)


def compile_engine(params: CompileParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Write the executable and `engine.json`, with the tokenizer beside them."""
    from stages.compile.processor import build_proven, describe, without_cache
    from stages.compile.rounding import round_activations
    from stages.graphs import components, ort_engine
    from stages.models.checkpoint.layout import carry_served

    source, chosen = inputs["graph"], backend(params.backend)
    described = describe(source)
    architectures = tuple(dict.fromkeys(params.architectures))
    refuse_impossible(params.backend, architectures, described["precisions"])
    _refuse_rounding(params)
    _refuse_halves(params, described.get("dtype", WHOLE))
    _refuse_stacks(params.backend, described["task"])
    longest = _longest(params, described["maximum_tokens"])
    if longest < (params.maximum_tokens or 0):
        progress.note(f"the engine reads {longest} tokens, all that its graph reads, not {params.maximum_tokens}")
    cache = described.get("cache")
    asked = Asked(
        graph=source / GRAPH,
        architectures=architectures,
        maximum_tokens=longest,
        maximum_batch=params.maximum_batch,
        lower=partial(ort_engine.lower, layers=cache["layers"] if cache else ()),
    )
    told = {"answers": described["answers"]} if "answers" in described else {}
    engine: dict[str, Any] = told | {
        "backend": params.backend,
        "architectures": list(architectures),
        "task": described["task"],
        "precisions": described["precisions"],
        "vocabulary": described["vocabulary"],
        "cache": cache if chosen.keeps else None,
        "pooling": described.get("pooling"),
        "activations": params.activations,
        "components": _components(described, chosen.keeps, chosen.executable),
        "maximum_tokens": asked.maximum_tokens,
        "executable": chosen.executable,
        # One plan for several architectures has not run on any of them when it was built ahead of time.
        "executed": not architectures,
        "target": f"{params.backend}:{'+'.join(architectures) or 'cpu'}",
    }
    if architectures:
        metrics = _plan(chosen, asked, engine, output, progress)
    else:
        with without_cache(asked, output) if cache and not chosen.keeps else nullcontext(asked) as asked:
            metrics = build_proven(chosen, asked, source, output, progress)
            if params.activations == "int8":
                metrics |= round_activations(chosen, source, output, params.fine)
    files = {*output.glob(f"{chosen.executable}*"), *components.files(output / chosen.executable)}
    size = sum(path.stat().st_size for path in files)
    carry_served(source, output)
    (output / "engine.json").write_text(json.dumps(engine, indent=1, sort_keys=True), encoding="utf-8")
    return {"size_bytes": float(size)} | metrics


def _components(described: Mapping[str, Any], keeps: bool, executable: str) -> dict[str, Any]:
    """What the executable takes and gives, so that any program can call it, and an encoder beside it."""
    if described.get("cache") and keeps:
        given: Mapping[str, Any] = described["components"]
        files = {GRAPH: executable, ENCODER: encoder_of(Path(executable)).name}
        return {name: {**one, "file": files[one["file"]]} for name, one in given.items()}
    # What a graph with a cache takes without it, and any other as it stands.
    one = described.get("components", {}).get("model", {}) if not described.get("cache") else {}
    inputs = one.get("inputs", ["input_ids", "attention_mask"])
    return {"model": {"file": executable, "inputs": inputs, "outputs": ["logits"], "state": {}}}


def _plan(chosen: Backend, asked: Asked, engine: dict[str, Any], output: Path, progress: Progress) -> Metrics:
    """Build it and say in `engine` what it keeps."""
    from stages.graphs import plans

    metrics, kept = plans.build(chosen, asked, output, progress)
    engine["maximum_batch"] = asked.maximum_batch
    if kept:
        most = asked.maximum_batch, asked.maximum_tokens
        engine["cache"] = {**engine["cache"], "maximum": asked.maximum_tokens}
        engine["profiles"] = plans.profiles(*most, answers="answers" in engine)
        if "answers" in engine:
            engine["components"]["encoder"]["profiles"] = plans.reading_profiles(*most)
    elif engine["cache"]:
        engine |= {"cache": None, "components": _components({}, False, chosen.executable)}
    return metrics


def admit(params: CompileParams, known: Mapping[str, Any]) -> Subject:
    """The engine of a graph."""
    graph: Subject = known["graph"]
    architectures = tuple(dict.fromkeys(params.architectures))
    refuse_impossible(params.backend, architectures, graph.precisions)
    _refuse_rounding(params)
    _refuse_halves(params, graph.dtype)
    _refuse_stacks(params.backend, graph.task)
    return replace(graph, built=_longest(params, graph.built))


def _refuse_rounding(params: CompileParams) -> None:
    if params.fine and params.activations == "as_graph":
        raise StageError(
            "`fine` says which activations are not rounded to INT8, and none are",
            measured=f"activations: {params.activations}",
            limit="activations: int8",
            remedy="Set `activations: int8`, or leave `fine` out.",
        )
    if params.activations != "as_graph" and params.backend != "onnxruntime":
        raise StageError(
            f"`activations` is for onnxruntime, not for {params.backend}",
            measured=params.activations,
            limit="as_graph",
            remedy="Leave it out; `quantize` rounds activations for every backend by a scheme like int8_w8a8.",
        )


def _refuse_halves(params: CompileParams, dtype: str) -> None:
    if not params.architectures and dtype != WHOLE:
        raise StageError(
            f"{params.backend} computes in {WHOLE} on the processor",
            measured=f"a graph in {dtype}",
            limit=WHOLE,
            remedy="Export another graph without `dtype` for the processor; this one is for TensorRT.",
        )


def _refuse_stacks(name: str, task: str) -> None:
    if task == "translate" and not backend(name).keeps:
        raise StageError(
            f"{name} builds no engine of a model with an encoder and a decoder",
            measured="it keeps nothing of what it has read",
            limit="a backend that does",
            remedy="Choose backend: onnxruntime.",
        )


def _longest(params: CompileParams, most: int | None) -> int:
    """Tokens that the engine of a graph reads that reads so many itself."""
    asked = params.maximum_tokens or DEFAULT_TOKENS
    return asked if most is None else min(asked, most)


COMPILE = Stage(
    name="compile",
    params=CompileParams,
    inputs={"graph": Input(kinds=frozenset({Kind.ONNX}))},
    output=Kind.ENGINE,
    image=Image.TENSORRT,
    run=compile_engine,
    admit=admit,
    uses=lambda params: (module_of(params.backend),),
)
