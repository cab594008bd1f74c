"""What each backend builds for, and what it cannot build. No vendor's library is needed to ask."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from stages.runtime.contract import StageError

TARGETS: Mapping[str, tuple[str, ...]] = {
    "tensorrt_rtx": ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"),
    "tensorrt": ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"),
    "onnxruntime": (),
}
"""Backend -> the architectures it builds for; onnxruntime is for the processor."""

_SINCE = {"fp4": 100, "fp8": 89, "int4": 80}
"""Number format -> the first architecture that has it."""


def refuse_impossible(backend: str, architectures: Sequence[str], precisions: Collection[str] = ()) -> None:
    """Refuse before anything is built what no builder can build.

    Args:
        backend: `tensorrt_rtx`, `tensorrt` or `onnxruntime`.
        architectures: as a recipe lists them.
        precisions: number formats of the graph: `float32`, `float16`, `int8`, `int4`, `fp8`, `fp4`.

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
    if not allowed and "fp4" in precisions:
        raise StageError(
            f"{backend} multiplies no fp4",
            measured="a graph with fp4 weights",
            limit="tensorrt_rtx or tensorrt from sm_100 on",
            remedy="Choose such a backend, or quantize by another scheme.",
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
