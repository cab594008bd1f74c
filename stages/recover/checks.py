"""What must hold before a student learns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stages.models.checkpoint.layout import QUANTIZATION, ZEROS
from stages.models.checkpoint.loading import load_config, load_tokenizer
from stages.models.checkpoint.subject import Subject
from stages.runtime.contract import StageError

_TEACHES_NOTHING = ("answer", "embed")


def check(inputs: Mapping[str, Path], update: str) -> None:
    """Raise StageError unless model and teacher speak the same tokens, and the model can learn in the way asked."""
    model, teacher = inputs["model"], inputs["teacher"]
    sizes = [load_config(folder).get_text_config().vocab_size for folder in (model, teacher)]
    if sizes[0] != sizes[1] or load_tokenizer(model).get_vocab() != load_tokenizer(teacher).get_vocab():
        raise _other_tokens(*sizes)
    for role in ("model", "teacher"):
        _refuse_quantized(role, (inputs[role] / QUANTIZATION).is_file())
    _refuse_filling((model / ZEROS).is_file(), update)


def check_known(model: Subject, teacher: Subject, update: str) -> None:
    """The same of a model and a teacher that are not made yet."""
    sizes = [one.model.config.get_text_config().vocab_size for one in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise _other_tokens(*sizes)
    if model.task in _TEACHES_NOTHING:
        raise StageError(
            f"{type(model.model).__name__} has no answer that recovery compares",
            measured=f"its task is {model.task}",
            limit="generate, translate, fill, classify, score, tag",
            remedy="Take `recover` out of the recipe.",
        )
    _refuse_quantized("model", bool(model.scheme))
    _refuse_quantized("teacher", bool(teacher.scheme))
    _refuse_filling(model.masked, update)


def _other_tokens(ours: int, theirs: int) -> StageError:
    return StageError(
        "model and teacher do not speak the same tokens",
        measured=f"vocabulary of {theirs} in the teacher",
        limit=f"the model's own, {ours}",
        remedy="Give as teacher the checkpoint that the model was made from.",
    )


def _refuse_quantized(role: str, quantized: bool) -> None:
    if quantized:
        raise StageError(
            f"a quantized checkpoint cannot {'learn' if role == 'model' else 'teach'}",
            remedy="Put `recover` before `quantize`.",
        )


def _refuse_filling(masked: bool, update: str) -> None:
    if masked and update != "sparse":
        raise StageError(
            f"`update: {update}` would fill the zeros that {ZEROS} counts", remedy="Give `update: sparse`."
        )
