"""Execute a TensorRT plan on a GPU, with memory from the CUDA driver and no other library.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import TYPES, Execution
from stages.adapters.tensorrt.build import PAST
from stages.adapters.tensorrt.device import open_device
from stages.adapters.tensorrt_cache import CachedPlan, DeviceSteps, infer
from stages.runtime.contract import StageError


def execute_plan(plan: Path, backend: str, architectures: Sequence[str], *, verified: bool) -> Execution:
    """A plan, opened.

    Args:
        plan: the serialized engine.
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
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise StageError(f"{backend} refuses {plan.name}", remedy="Compile it with the installed version.")
    if getattr(engine, "streamable_weights_size", 0) > device.free_bytes():
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    target = f"{backend}:{device.architecture}"
    names = {str(engine.get_tensor_name(number)) for number in range(engine.num_io_tensors)}
    if any(name.startswith(PAST) for name in names):
        # The runtime and its logger must outlive what they made.
        opened = CachedPlan(device, engine, (runtime, logger))
        return Execution(target, opened.logits, partial(DeviceSteps, opened))
    context = engine.create_execution_context()

    def run(
        ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64], type_NT: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        _ = runtime, logger
        given = {"input_ids": ids_NT, "attention_mask": mask_NT}
        if TYPES in names:
            given[TYPES] = np.zeros_like(ids_NT) if type_NT is None else type_NT
        return infer(device, context, given)

    return Execution(target, run, tells_segments=TYPES in names)
