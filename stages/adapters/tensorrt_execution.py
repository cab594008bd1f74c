"""Execute a TensorRT plan on a GPU, with memory from the CUDA driver and no other library.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import TYPES, Execution, encoder_of
from stages.adapters.tensorrt.build import MASK, PAST
from stages.adapters.tensorrt.device import Device, open_device
from stages.adapters.tensorrt_cache import IDS, CachedPlan, DeviceSteps, infer, names_of
from stages.adapters.tensorrt_stacks import DeviceStacks, EncoderPlan
from stages.runtime.contract import StageError


def execute_plan(plan: Path, backend: str, architectures: Sequence[str], *, verified: bool) -> Execution:
    """A plan, opened.

    Args:
        plan: the serialized engine; an encoder's may stand beside it.
        backend: `tensorrt_rtx` or `tensorrt`.
        architectures: what it was built for.
        verified: its digest stands in a manifest; without that it is not deserialized, since a plan can run code.

    Raises:
        DoesNotFit: no GPU that can execute it.
        StageError: it is not verified, or the library refuses it.
    """
    device = open_device(backend, architectures)
    if not verified:
        raise StageError(
            f"{plan.name} is executable code whose digest nobody checked",
            remedy="Open it from a store, or with verified=True after hashing it against its manifest.",
        )
    trt = import_module(backend)
    logger = trt.Logger(trt.Logger.ERROR)
    runtime = trt.Runtime(logger)
    # The runtime and its logger must outlive what they made.
    target, alive = f"{backend}:{device.architecture}", (runtime, logger)
    engine, names = _deserialized(runtime, plan, backend, device)
    if any(name.startswith(PAST) for name in names):
        opened = CachedPlan(device, engine, alive)
        if (beside := encoder_of(plan)).is_file():
            encoder = EncoderPlan(device, _deserialized(runtime, beside, backend, device)[0], alive)
            return Execution(target, None, stacks=DeviceStacks(encoder, opened))
        return Execution(target, opened.logits, partial(DeviceSteps, opened))
    context = engine.create_execution_context()
    most_rows = int(engine.get_tensor_profile_shape(IDS, 0)[2][0])

    def run(
        ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64], type_NT: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        _ = alive
        given = {IDS: ids_NT, MASK: mask_NT}
        if TYPES in names:
            given[TYPES] = np.zeros_like(ids_NT) if type_NT is None else type_NT
        groups = [slice(start, start + most_rows) for start in range(0, len(ids_NT), most_rows)]
        return np.concatenate([infer(device, context, {name: one[at] for name, one in given.items()}) for at in groups])

    return Execution(target, run, tells_segments=TYPES in names)


def _deserialized(runtime: Any, plan: Path, backend: str, device: Device) -> tuple[Any, list[str]]:
    """A plan's engine, and what it takes and gives."""
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise StageError(f"{backend} refuses {plan.name}", remedy="Compile it with the installed version.")
    if getattr(engine, "streamable_weights_size", 0) > device.free_bytes():
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    return engine, names_of(engine)
