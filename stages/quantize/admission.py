"""Whether a checkpoint can be quantized as asked, before any weight is read.

Shapes: none; the model stands on the meta device.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import LLAMA_TYPE
from stages.models.blockwise.run import check_order
from stages.models.checkpoint.compressed_tensors import METHOD, refuse_inexpressible
from stages.models.checkpoint.editing import check_text, matching
from stages.models.checkpoint.subject import Subject
from stages.models.text.windows import check_split
from stages.quantize import plan
from stages.quantize.params import SIXTEEN_BITS, QuantizeParams
from stages.quantize.rotation import of_values
from stages.quantize.rounding import names


def admitted(params: QuantizeParams, known: Mapping[str, Any]) -> Subject:
    """The quantized checkpoint.

    Raises:
        StageError: as the work would.
    """
    given: Subject = known["model"]
    model, kind = given.model, given.model.config.model_type
    plan.refuse_quantized(given.scheme, given.layout)
    if params.scheme in SIXTEEN_BITS:
        every = [f"{block.name}.{path}" for block in anatomy.blocks(model) for path in anatomy.linear_maps(block)]
        matching(every, params.layers, params.skip)
    else:
        inputs = given.inputs([one for one in names(model) if not _only_read(model, one)])
        maps = matching(list(inputs), params.layers, params.skip)
        plan.check_block(params, {inputs[one] for one in maps}, given.loose)
        if params.layout == METHOD:
            tables = [] if params.embedding == "keep" else ["the table of tokens"]
            refuse_inexpressible(model, maps, tables, ["maps on a basis"] if given.structured else [])
    if params.rotation not in (None, "off"):
        of_values(model, anatomy.blocks(model))
    fitted = params.scheme not in SIXTEEN_BITS and not plan.by_weights_alone(params)
    if plan.needs_text(params, known, fitted=fitted):
        check_order(model)
        check_split(known, "calibrate")
    elif params.rotation == "auto":
        check_text(known)
        check_split(known, "calibrate")
    if params.scheme == "int8_w8a8" and kind not in LLAMA_TYPE:
        plan.refuse_moved(params, model)
    plan.check_cache(params, model)
    return replace(given, scheme=params.scheme, layout="" if params.layout == "enginery" else params.layout)


def _only_read(model: PreTrainedModel, path: str) -> bool:
    """Whether the module that has a map reads its weight by itself: such a map stays float (Mamba's `dt_proj`).

    Of what type a weight is T5 asks of a map that it runs all the same.
    """
    owner, _, leaf = path.rpartition(".")
    source = _source(type(model.get_submodule(owner)))  # type: ignore[arg-type]
    return bool(re.search(rf"self\.{leaf}\.weight(?!\.dtype|, torch\.Tensor)", source))


@cache
def _source(kind: type) -> str:
    """Of a class; blocks are alike, and to find one takes the time of parsing its file."""
    return inspect.getsource(kind)
