"""What must hold before a student learns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stages.models.checkpoint.layout import MASKS, QUANTIZATION
from stages.models.checkpoint.loading import load_config, load_tokenizer
from stages.runtime.contract import StageError


def check(inputs: Mapping[str, Path], update: str) -> None:
    """Raise StageError unless model and teacher speak the same tokens, and the model can learn in the way asked."""
    model, teacher = inputs["model"], inputs["teacher"]
    sizes = [load_config(folder).vocab_size for folder in (model, teacher)]
    if sizes[0] != sizes[1] or load_tokenizer(model).get_vocab() != load_tokenizer(teacher).get_vocab():
        raise StageError(
            "model and teacher do not speak the same tokens",
            measured=f"vocabulary of {sizes[1]} in the teacher",
            limit=f"the model's own, {sizes[0]}",
            remedy="Give as teacher the checkpoint that the model was made from.",
        )
    for role in ("model", "teacher"):
        if (inputs[role] / QUANTIZATION).is_file():
            raise StageError(
                f"a quantized checkpoint cannot {'learn' if role == 'model' else 'teach'}",
                remedy="Put `recover` before `quantize`.",
            )
    if (model / MASKS).is_file() and update != "sparse":
        raise StageError(f"`update: {update}` would fill the zeros that {MASKS} keeps", remedy="Give `update: sparse`.")
