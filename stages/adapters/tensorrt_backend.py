"""TensorRT-RTX and TensorRT: what they build for and multiply. A child builds plans; they run where a GPU is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from stages.adapters.backends import Asked, Backend, Execution
from stages.adapters.tensorrt import child
from stages.adapters.tensorrt.build import Shapes
from stages.runtime.contract import Metrics, Progress, StageError

PLAN = "model.plan"
_SINCE = {"fp4": 100, "fp8": 89, "int4": 80, "bfloat16": 80}
"""Number format -> the first architecture that has it."""


def made(library: str, architectures: tuple[str, ...], *, lacks: Mapping[str, str] | None = None) -> Backend:
    """One of the two libraries as a backend.

    Args:
        library: module and name of the backend.
        architectures: what it builds for.
        lacks: architecture -> a format that this library alone does not multiply there.
    """

    def refuse(architecture: str, precisions: Collection[str]) -> None:
        for precision in sorted(precisions):
            if int(architecture.removeprefix("sm_")) < _SINCE.get(precision, 0):
                raise StageError(
                    f"{architecture} has no {precision}",
                    measured=architecture,
                    limit=f"sm_{_SINCE[precision]} and newer",
                    remedy="Leave the architecture out, or quantize by another scheme or export in another `dtype`.",
                )
            if (lacks or {}).get(architecture) == precision:
                raise StageError(
                    f"{library} multiplies no {precision} on {architecture}",
                    measured=f"a graph with {precision} products",
                    limit="float16",
                    remedy=f"Leave {architecture} out.",
                )

    def build(asked: Asked, output: Path, progress: Progress) -> Metrics:
        shapes = Shapes(
            maximum_batch=asked.maximum_batch, maximum_tokens=asked.maximum_tokens, sparse=asked.two_in_four
        )
        child.build(asked.graph, library, asked.architectures, shapes, output / PLAN, progress)
        return {"architectures": float(len(asked.architectures))}

    def execute(executable: Path, built_for: Sequence[str], verified: bool) -> Execution:
        # An engine is built where no GPU is, so what executes it comes later.
        from stages.adapters.tensorrt_execution import execute_plan

        return execute_plan(executable, library, built_for, verified=verified)

    return Backend(
        library=library.replace("_", "-"),
        executable=PLAN,
        build=build,
        execute=execute,
        architectures=architectures,
        keeps=True,
        refuse=refuse,
    )


BACKEND = made(
    "tensorrt", ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
)
