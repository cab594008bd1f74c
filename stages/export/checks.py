"""Proof from the written bytes that a graph is the checkpoint's model: its few bits, its tensors, its numbers.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.adapters.onnxruntime import CachedSession, Session, open_session
from stages.adapters.onnxruntime_slots import StackSessions, open_stacks
from stages.export import called
from stages.graphs import components, onnx_graph, stepping
from stages.graphs.onnx_graph import Held
from stages.graphs.parity import parity, require_parity
from stages.models.anatomy.blocks import embedding, named_tensors
from stages.models.checkpoint.pooling import Pooling
from stages.models.layers import rounded_cache
from stages.models.layers.quantized_linear import QuantizedEmbedding, QuantizedLinear, quantized_modules
from stages.runtime.contract import StageError

SLACK_BYTES = 1 << 20
"""Room for what a graph holds beyond the checkpoint's tensors: shapes, zero points, rotary frequencies."""


@dataclass(frozen=True)
class Expected:
    """What a checkpoint's graph must hold.

    Attributes:
        quantized: (bits, values) of each distinct quantized weight -> how many are like it.
        rounding: weight -> the scale by which its activations are rounded, for those that are.
        caches: scales of rounded keys and values.
        size_bytes: of all tensors, each distinct one once, block scales as the graph holds them.
        least_bytes: of the matrices of the blocks' modules that ran, and the table of tokens: an answer need not depend
            on all others (a pooler, an attention to an encoder that is not there).
        answer_N: on the parity windows, without the rounding of activations and caches; its shape is the task's.
        shorter_1: the same on the first window without its last tokens.
    """

    quantized: Counter[tuple[int, int]]
    rounding: dict[str, frozenset[float]]
    caches: Counter[float]
    size_bytes: int
    least_bytes: int
    answer_N: NDArray[np.float32]
    shorter_1: NDArray[np.float32]


def expected(
    model: PreTrainedModel,
    ids_NT: NDArray[np.int64],
    task: str = "generate",
    pool: Pooling | None = None,
    *,
    tells_segments: bool = False,
) -> Expected:
    """Read a loaded checkpoint before it is exported; `pool` makes one vector of each text.

    Where it `tells_segments` the halves of each window are two.
    """
    names: dict[int, str] = {}
    for name, tensor in named_tensors(model):
        names.setdefault(id(tensor), name)
    distinct = {id(tensor): tensor for _, tensor in named_tensors(model)}
    modules = quantized_modules(model).values()
    weights = {id(m.weight): (m.weight.numel(), getattr(m, "bits", 8)) for m in modules}
    rounded = [m for m in modules if isinstance(m, QuantizedLinear) and m.input_scale is not None]
    scales = {names[id(m.weight)]: m.input_scale for m in rounded}
    with called.unrounded(model), _noting(model) as ran:
        # One after the other: a classifier without a token of padding takes no two.
        alone = partial(called.alone, model, task, pool=pool, tells_segments=tells_segments)
        answer_N = np.concatenate([alone(ids_T[None]) for ids_T in ids_NT])
        shorter_1 = alone(ids_NT[:1, : -called.PADDING])
    return Expected(
        Counter((bits, values * 8 // bits if bits == 4 else values) for values, bits in weights.values()),
        {name: frozenset({float(scale)}) for name, scale in scales.items() if scale is not None},
        Counter(rounded_cache.scales(model)),
        sum(tensor.nbytes for tensor in distinct.values()) + _wider_scales(modules),
        sum(tensor.nbytes for tensor in _needed(model, ran).values()),
        answer_N,
        shorter_1,
    )


def require_effect(written: Held, wanted: Expected) -> None:
    """The graph holds each quantized weight as integers, rounds what the checkpoint rounds, and each tensor once.

    Raises:
        StageError: it does not.
    """
    if written.quantized != wanted.quantized:
        raise StageError(
            "the graph does not hold the checkpoint's quantized weights as integers",
            measured=f"{written.quantized.total()} tensors",
            limit=f"{wanted.quantized.total()} tensors",
            remedy="Report it with the checkpoint's quantization.json.",
        )
    if written.rounding != wanted.rounding:
        raise StageError(
            "the graph does not round the activations that the checkpoint rounds",
            measured=_first_difference(written.rounding, wanted.rounding),
            remedy="Report it with the checkpoint's quantization.json.",
        )
    if written.caches != wanted.caches:
        raise StageError(
            "the graph does not round the keys and values that the checkpoint rounds",
            measured=f"{written.caches.total()} tensors",
            limit=f"{wanted.caches.total()} tensors, by the checkpoint's scales",
            remedy="Report it with the checkpoint's quantization.json.",
        )
    limit = wanted.size_bytes + SLACK_BYTES
    if not wanted.least_bytes * 0.99 <= written.size_bytes <= limit:
        raise StageError(
            "the graph's weights are not the checkpoint's",
            measured=f"{written.size_bytes} bytes",
            limit=f"{wanted.least_bytes} to {limit} bytes",
            remedy="Report it: a tensor is stored twice or in another format.",
        )


def unrounded_session(path: Path) -> Session | CachedSession:
    """A graph as it is written, but for the rounding of activations and caches, and with four-bit floats widened."""
    with _unrounded(path) as twin:
        return open_session(twin, literal=True)


def unrounded_stacks(path: Path) -> StackSessions:
    """The same of an encoder's graph and a decoder's."""
    with _unrounded(path) as twin:
        return open_stacks(twin, literal=True)


@contextmanager
def _unrounded(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".parity-") as folder:
        models = components.load(path)
        changed = sum(onnx_graph.drop_rounding(model) + onnx_graph.widen_fp4(model) for model in models)
        twin = Path(folder) / path.name if changed else path
        if changed:
            components.save(models, twin)
        del models
        yield twin


def require_numbers(path: Path, ids_NT: NDArray[np.int64], wanted: Expected, task: str = "generate") -> float:
    """Compare graph and torch on whole windows, behind padding and before it, without the rounding of activations.

    Returns:
        The largest logit difference, in standard deviations.

    Raises:
        StageError: they differ.
    """
    session = unrounded_session(path)
    predicts = task == "generate"
    found_N = np.concatenate([stepping.outputs(session, ids_T[None])["logits"] for ids_T in ids_NT])
    whole = parity(ids_NT if predicts else None, wanted.answer_N, found_N)
    require_parity(whole, "the graph and the torch model")
    kept_NT = np.repeat(ids_NT[:1, : -called.PADDING], 2, axis=0) if predicts else None
    segments = [called.padded_halves(ids_NT[:1])] if isinstance(session, Session) else []
    beside_N = called.unpadded(task, session.logits(*called.padded(ids_NT[:1]), *segments))
    padded = parity(kept_NT, np.repeat(wanted.shorter_1, 2, axis=0), beside_N)
    require_parity(padded, "the padded graph and the torch model")
    return max(whole.logit_difference, padded.logit_difference)


def _needed(model: PreTrainedModel, ran: Container[int]) -> dict[int, Tensor]:
    """The matrices of the modules that ran, by their id. Equal vectors (biases of zeros) stand once in a graph."""
    parts = [one for one in model.modules() if isinstance(one, nn.ModuleList)]
    modules = [one for part in (*parts, embedding(model)) for one in part.modules() if id(one) in ran]
    tensors = [tensor for one in modules for tensor in one.state_dict(keep_vars=True).values()]
    return {id(tensor): tensor for tensor in tensors if tensor.ndim > 1}


@contextmanager
def _noting(model: PreTrainedModel) -> Iterator[set[int]]:
    """The ids of the modules without children that run within it."""
    ran: set[int] = set()
    with ExitStack() as hooks:
        for one in model.modules():
            if not any(one.children()):
                hooks.callback(one.register_forward_hook(lambda module, *_: ran.add(id(module))).remove)
        yield ran


def _wider_scales(modules: Iterable[QuantizedLinear | QuantizedEmbedding]) -> int:
    """Bytes that scales take more in a graph, where those of a single level are float32."""
    scales = {
        id(module.weight_scale): module.weight_scale
        for module in modules
        if not (isinstance(module, QuantizedLinear) and module.form.two_level)
    }
    return sum(scale.numel() * (4 - scale.element_size()) for scale in scales.values())


def _first_difference(written: Mapping[str, frozenset[float]], wanted: Mapping[str, frozenset[float]]) -> str:
    name = min(name for name in written.keys() | wanted.keys() if written.get(name) != wanted.get(name))
    return f"{name} by {sorted(written.get(name, ()))} instead of {sorted(wanted.get(name, ()))}"
