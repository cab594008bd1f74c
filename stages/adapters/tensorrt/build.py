"""A plan built by TensorRT-RTX or TensorRT in this process; `child` has it built in one of its own.

Their Python faces are the same; only the targets differ. Nothing is imported before it is needed, so that targets can
be checked where neither is installed.

Shapes: N sequences, T tokens, S of the text that a decoder answers, K of T asked, M places of the cache, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from stages.runtime.contract import DoesNotFit, Progress, StageError

PAST, LENGTHS, ASKED = "past_key_values", "past_lengths", "logits_at"
CROSS, MASK = "cross", "attention_mask"
"""What a decoder takes of the text that it answers."""
TIMINGS = "ENGINERY_TIMING_CACHE"
"""A file of TensorRT's, which times kernels on the GPU; TensorRT-RTX does not."""
PREFILL, DECODE = 0, 1
"""Profiles of a plan with a cache: prompts; one token of each row."""
USUAL_TOKENS = 512
MOST_ASKED = 256
"""Tokens of a row of which logits are given at once: of 8 rows and 50,000 words they take 400 MB."""
VISIBLE = 0.1
"""Share of a build's time in which the library reports steps; it compiles all kernels within a single one."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a plan has kernels for.

    Attributes:
        maximum_batch: N.
        maximum_tokens: T and S, and M of a graph with a cache.
        sparse: weights have two zeros in four, which a GPU's sparse kernels leave out.
    """

    maximum_batch: int
    maximum_tokens: int
    sparse: bool = False


@dataclass
class _Heard:
    """What the library logged."""

    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


_EXPECTED = "has Int64 binding"
"""Token ids are 64-bit in every graph of ours, so this reminder tells a user nothing."""


def build_plan(graph: Path, backend: str, architectures: Sequence[str], shapes: Shapes, progress: Progress) -> bytes:
    """Compile a graph, ahead of time and without a GPU where the backend can.

    Args:
        graph: model.onnx; external data beside it.
        backend: `tensorrt_rtx` or `tensorrt`.
        architectures: `sm_89`, ...; one plan serves them all.
        shapes: the longest batch and sequence, and whether zeros stand two in four.
        progress: hears the fraction that is done, and the library's warnings.

    Raises:
        StageError: the parser or the builder refuses, with its own text.
        DoesNotFit: the backend is not installed, or needs a GPU.
    """
    trt = _library(backend)
    heard = _Heard()
    logger = _logger(trt, heard)
    builder = trt.Builder(logger)
    if builder is None:
        raise DoesNotFit(f"{backend} cannot build here", measured="; ".join(heard.errors), remedy="Build on a GPU.")
    # Precision stands in the graph. Where the library knows another mode, it would choose one itself.
    typed = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(typed))
    _parse(trt, network, logger, graph, backend)
    _allow_decomposition(trt, network)
    config = builder.create_builder_config()
    configure(trt, config, backend, architectures, sparse=shapes.sparse)
    for profile in profiles(builder, network, shapes):
        config.add_optimization_profile(profile)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    with timings(config, os.environ.get(TIMINGS, "")) if backend == "tensorrt" else nullcontext():
        plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    for text in dict.fromkeys(heard.warnings):
        progress.note(f"{backend}: {text}")
    if plan is None:
        raise StageError(
            f"{backend} could not build an engine for {', '.join(architectures)}",
            measured="; ".join(heard.errors) or "no reason given",
            remedy="Leave the precision or the architecture it names out of the recipe.",
        )
    return bytes(plan)


def configure(trt: Any, config: Any, backend: str, architectures: Sequence[str], *, sparse: bool) -> None:
    """Say what a plan is for and what it may do."""
    if backend == "tensorrt_rtx":
        config.num_compute_capabilities = len(architectures)
        for number, name in enumerate(architectures):
            config.set_compute_capability(getattr(trt.ComputeCapability, name.replace("_", "").upper()), number)
    else:
        # A GPU that is smaller than the weights reads them as it goes; where they fit nothing changes.
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)


@contextmanager
def timings(config: Any, path: str) -> Iterator[None]:
    """Within it a builder that times kernels reads what was timed before from a file, and adds to it; "": it does not.

    A file of another version or GPU is written anew.
    """
    if not path:
        yield
        return
    file = Path(path)
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)
    yield
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_bytes(bytes(config.get_timing_cache().serialize()))
    draft.replace(file)


def _library(backend: str) -> Any:
    try:
        return import_module(backend)
    except ImportError as error:
        package = backend.replace("_", "-")
        raise DoesNotFit(
            f"{package} is not installed here",
            measured=error,
            remedy=f"Install it with `pip install {package}`, or run the step where its image is.",
        ) from error


def _logger(trt: Any, heard: _Heard) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.ILogger.WARNING and _EXPECTED not in message:
                heard.warnings.append(message)
            elif severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                heard.errors.append(message)

    return Logger()


def _parse(trt: Any, network: Any, logger: Any, graph: Path, backend: str) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(graph)):
        return
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    raise StageError(
        f"{backend} cannot read the graph",
        measured="; ".join(f"{e.desc()} (node {e.node_name() or e.node()}, {e.node_operator()})" for e in errors),
        remedy="Take out the step that makes this node, or export with another `opset`.",
    )


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Let attention be built from products and a softmax where no kernel has its data type (fp32) or shape."""
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def profiles(builder: Any, network: Any, shapes: Shapes) -> list[Any]:
    """One where whole sequences are read; with a cache PREFILL for prompts and DECODE for a token at a time."""
    inputs = [network.get_input(number) for number in range(network.num_inputs)]
    kept = any(one.name.startswith(PAST) for one in inputs)
    made = []
    for tokens in (shapes.maximum_tokens, 1) if kept else (shapes.maximum_tokens,):
        profile = builder.create_optimization_profile()
        for one in inputs:
            # A decoder's mask is the text's, which is as long for a single token.
            of_text = one.name.startswith(CROSS) or (kept and one.name == MASK)
            length = shapes.maximum_tokens if of_text else tokens
            profile.set_shape(one.name, *_sizes(one, shapes.maximum_batch, length))
        made.append(profile)
    return made


def _sizes(one: Any, rows: int, tokens: int) -> list[tuple[int, ...]]:
    """The least, the usual and the greatest shape of an input."""
    found = []
    for n, t in ((1, 1), (1, min(USUAL_TOKENS, tokens)), (rows, tokens)):
        if one.name.startswith(PAST):
            found.append((n, *one.shape[1:]))
        elif one.name.startswith(CROSS):
            found.append((n, one.shape[1], t, one.shape[3]))
        elif one.name == LENGTHS:
            found.append((n,))
        elif one.name == ASKED:
            # A prompt is asked for what follows it; a text of which all is asked is read in parts.
            found.append((n, min(t, MOST_ASKED) if (n, t) == (rows, tokens) else 1))
        else:
            found.append((n, t))
    return found


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Phases lie inside phases; what is done of an inner one is a part of its parent's current step."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._steps: dict[str, tuple[str | None, int, int]] = {}
            self._told = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = (parent_phase, num_steps, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            parent, count, _ = self._steps.get(phase_name, (None, 1, 0))
            self._steps[phase_name] = (parent, count, step + 1)
            try:
                self._tell(phase_name)
            except KeyboardInterrupt:
                # An exception cannot cross the library; it is raised again after the build gave up.
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            parent, _, _ = self._steps.pop(phase_name, (None, 1, 0))
            if parent is None and not self._steps:
                progress.advanced(1.0, 1.0)

        def _tell(self, phase_name: str) -> None:
            fraction, name = 0.0, phase_name
            while name in self._steps:
                parent, count, done = self._steps[name]
                fraction = min(1.0, (done + fraction) / max(count, 1))
                name = parent or ""
            # A phase that another thread began later may report less.
            self._told = max(self._told, fraction * VISIBLE)
            progress.advanced(self._told, 1.0)

    return Monitor()
