"""Whether a checkpoint can be quantized as asked, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stages.models.checkpoint.editing import matching
from stages.models.checkpoint.subject import Subject
from stages.quantize import plan
from stages.quantize.params import SIXTEEN_BITS, QuantizeParams
from stages.quantize.rounding import names


def admitted(params: QuantizeParams, known: Mapping[str, Any]) -> Subject:
    """The quantized checkpoint.

    Raises:
        StageError: as the work would.
    """
    given: Subject = known["model"]
    plan.refuse_quantized(given.scheme, given.layout)
    maps = matching(names(given.model), params.layers, params.skip)
    if params.scheme not in SIXTEEN_BITS and not given.loose:
        plan.check_block(params, given.model, maps)
    plan.check_cache(params, given.model)
    return replace(given, scheme=params.scheme, layout="" if params.layout == "enginery" else params.layout)
