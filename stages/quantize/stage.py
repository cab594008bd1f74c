"""quantize: a checkpoint's weights, and if asked what they read, in few bits with explicit symmetric scales."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.quantize.params import SIXTEEN_BITS, QuantizeParams
from stages.runtime.contract import Image, Input, Kind, Metrics, Progress, Stage

if TYPE_CHECKING:
    from stages.models.checkpoint.subject import Subject


def quantize(params: QuantizeParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See QuantizeParams. `layers.json` says for each map how it was rounded and what that lost."""
    if params.scheme in SIXTEEN_BITS:
        from stages.quantize.half_precision import in_sixteen_bits

        return in_sixteen_bits(params, inputs, output, progress)
    from stages.quantize.few_bits import in_few_bits

    return in_few_bits(params, inputs, output, progress)


def admit(params: QuantizeParams, known: Mapping[str, Any]) -> Subject:
    """See `stages.quantize.admission`."""
    from stages.quantize.admission import admitted

    return admitted(params, known)


QUANTIZE = Stage(
    name="quantize",
    params=QuantizeParams,
    inputs={
        "model": Input(kinds=frozenset({Kind.CHECKPOINT})),
        "text": Input(kinds=frozenset({Kind.CORPUS}), optional=True),
    },
    output=Kind.CHECKPOINT,
    image=Image.TORCH,
    run=quantize,
    admit=admit,
)
