"""What must hold before a student learns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.layout import QUANTIZATION, ZEROS
from stages.models.checkpoint.loading import load_config, load_tokenizer
from stages.models.checkpoint.subject import Subject, vocabularies
from stages.recover.params import RecoverParams
from stages.runtime.contract import StageError

CLASSES = ("classify", "score", "choose", "tag", "answer")
"""Tasks whose few logits are the answer: there is no head to take off."""
_TEACHES_NOTHING = ("embed",)


def check(inputs: Mapping[str, Path], update: str) -> None:
    """Raise StageError unless model and teacher speak the same tokens, and the model can learn in the way asked."""
    model, teacher = inputs["model"], inputs["teacher"]
    sizes = [load_config(folder).get_text_config().vocab_size for folder in (model, teacher)]
    if sizes[0] != sizes[1] or load_tokenizer(model).get_vocab() != load_tokenizer(teacher).get_vocab():
        raise _other_tokens(*sizes)
    for role in ("model", "teacher"):
        _refuse_quantized(role, (inputs[role] / QUANTIZATION).is_file())
    _refuse_filling((model / ZEROS).is_file(), update)


def check_known(model: Subject, teacher: Subject, params: RecoverParams) -> None:
    """The same of a model and a teacher that are not made yet, with what else their configurations say."""
    sizes = [one.model.config.get_text_config().vocab_size for one in (model, teacher)]
    ours, theirs = vocabularies(model, teacher)
    if sizes[0] != sizes[1] or ours != theirs:
        raise _other_tokens(*sizes)
    if model.task in _TEACHES_NOTHING:
        raise StageError(
            f"{type(model.model).__name__} has no answer that recovery compares",
            measured=f"its task is {model.task}",
            limit="generate, translate, fill, classify, score, choose, tag, answer",
            remedy="Take `recover` out of the recipe.",
        )
    _refuse_quantized("model", bool(model.scheme))
    _refuse_quantized("teacher", bool(teacher.scheme))
    _refuse_filling(model.masked, params.update)
    check_length(teacher.model, min(params.window_tokens, model.reads or params.window_tokens), teacher.reads)
    check_goal(model.model, model.task, params.kl_weight)
    if params.written_windows:
        check_writer(teacher.model, teacher.task)


def check_length(model: PreTrainedModel, tokens: int, most: int | None) -> None:
    """Raise StageError where a model that reads so many at most is to read windows of so many tokens."""
    if most is not None and tokens > most:
        raise StageError(
            f"{type(model).__name__} reads no windows of this length",
            measured=tokens,
            limit=most,
            remedy=f"Set `window_tokens` of the step to {most}.",
        )


def check_goal(model: PreTrainedModel, task: str, kl_weight: float) -> None:
    """Raise StageError where a model that predicts no next token is to learn from that."""
    if kl_weight < 1 and not anatomy.predicts(model, task):
        why = "predicts no next token" if task in CLASSES else "sees the next token"
        why = "answers the teacher's texts, which are no truth" if model.config.is_encoder_decoder else why
        raise StageError(
            f"{type(model).__name__} {why}, so that predicting it teaches nothing",
            measured=f"kl_weight {kl_weight}",
            limit="kl_weight 1",
            remedy="Set `kl_weight: 1` in the step.",
        )


def check_writer(model: PreTrainedModel, task: str) -> None:
    """Raise StageError where a teacher is to write text that is no decoder, or keeps no keys and values."""
    if not anatomy.predicts(model, task):
        raise StageError(f"{type(model).__name__} cannot write text", remedy="Give `written_windows: 0`.")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise StageError(
            f"{type(model).__name__} cannot write text here: it hands on what it has read in a way of its own",
            measured="no past_key_values",
            limit="past_key_values, as transformers caches them",
            remedy="Give `written_windows: 0`, or a corpus of `model://self` beside the text.",
        )


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
