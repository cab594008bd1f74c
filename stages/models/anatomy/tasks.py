"""What a model is for and how much it reads at once: by transformers' own tables and by the model, never by name.

Shapes: N sequences, T tokens, V vocabulary, C classes, H hidden.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from stages.adapters.backends import TYPES
from stages.models.anatomy import classes

TASKS = dict(
    zip(("generate", "translate", "fill", "classify", "tag", "answer", "choose", "embed"), classes.TASKS, strict=True)
)
"""Task -> transformers' table of its architectures."""
SCORE = "score"
"""The task of a classifier with a single class: it gives a text a number, as a reward model does."""
ENDLESS_TOKENS = 2048
"""What an engine reads of a model whose positions have no end, where its tokenizer says nothing either."""
SANE_TOKENS = 1 << 24
"""transformers writes 10^30 for a tokenizer that knows no longest text."""


def task(config: PreTrainedConfig) -> str:
    """What the class that the configuration names is for: a key of TASKS, or SCORE.

    Raises:
        StageError: the architecture is not understood.
    """
    return _task(classes.model_class(config), config)


def task_of(model: PreTrainedModel) -> str:
    """What a model's own class is for, whatever its configuration names; `embed` for one that no table knows."""
    return _task(type(model), model.config)


def _task(chosen: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    for name, table in TASKS.items():
        found = table._model_mapping.get(type(config), ())
        if chosen in (found if isinstance(found, tuple) else (found,)):
            return SCORE if name == "classify" and config.num_labels == 1 else name
    return "embed"


def answer(task: str, output: Any) -> Tensor:
    """The tensor of a model's output that holds its answer.

    Returns:
        Logits: [N, T, V] of each token, [N, C] of a text's classes, [N, 1] of a question with one of
        its choices, [N, 2, T] of an answer's first and last token; the
        last hidden states, [N, T, H], of `embed`.
    """
    if task == "answer":
        return torch.stack([output.start_logits, output.end_logits], dim=1)
    found: Tensor = output.last_hidden_state if task == "embed" else output.logits
    return found


def tells_segments(config: PreTrainedConfig, given: Collection[str]) -> bool:
    """Whether a model is told of each token whether it is of the first text of a pair or of the second.

    Args:
        config: of the model.
        given: what its tokenizer hands over, `model_input_names`.

    Raises:
        StageError: the architecture is not understood.
    """
    if TYPES not in given or task(config) in ("generate", "translate"):
        return False
    taken = inspect.signature(classes.model_class(config).forward).parameters
    return TYPES in taken and int(getattr(config, "type_vocab_size", None) or 0) > 1


def longest(config: PreTrainedConfig) -> int | None:
    """Tokens that a model of the configuration reads at once; None where its positions have no end.

    Of positions that turn in one way up to some length and in another beyond it, so many (`turned_alike`).

    Raises:
        StageError: the architecture is not understood.
    """
    return min((one for one in (places(config), turned_alike(config)) if one is not None), default=None)


def ropes(config: PreTrainedConfig) -> list[Mapping[str, Any]]:
    """How a model turns positions: one way, or one for each kind of layer; none where it turns none."""
    told = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [told] if "rope_type" in told else [one for one in told.values() if isinstance(one, Mapping)]


def turned_alike(config: PreTrainedConfig) -> int | None:
    """Tokens up to which all positions turn in one way, whatever comes behind them; None where they always do.

    By `longrope` the longest of all texts that are read at once decides, and what has been read stays as it was turned:
    beyond this length an answer depends on what is asked beside it, and on where its prompt ends.
    """
    two = [one for one in ropes(config) if one.get("rope_type") == "longrope"]
    two = [one for one in two if one.get("short_factor") != one.get("long_factor")]
    return min((int(one["original_max_position_embeddings"]) for one in two), default=None)


def places(config: PreTrainedConfig) -> int | None:
    """Tokens that there are positions for; None where these have no end.

    Raises:
        StageError: the architecture is not understood.
    """
    text = config.get_text_config()
    told = [getattr(text, f"max_{whose}position_embeddings", None) for whose in ("", "encoder_", "decoder_")]
    told.append(getattr(text, "max_seq_len", None))  # MPT's biases of distances, DBRX
    most = min((one for one in told if isinstance(one, int) and one > 0), default=None)
    if most is None:
        return None
    chosen, kind = classes.model_class(config), type(config)
    # To mypy these classes have no hash, since their metaclass is unknown to it.
    return most - _unused(chosen, kind, config.to_json_string(use_diff=False), most)  # type: ignore[arg-type]


@lru_cache(maxsize=32)  # admission asks for every step, and an outline takes some hundredths of a second
def _unused(chosen: type[PreTrainedModel], kind: type[PreTrainedConfig], config: str, most: int) -> int:
    """Rows at the beginning of a table of positions that no token gets, since these count from behind padding's."""
    model = classes.outline(chosen, kind.from_dict(json.loads(config)))
    tables = (one for one in model.modules() if isinstance(one, nn.Embedding))
    own = [one for one in tables if one.num_embeddings == most and one is not model.get_input_embeddings()]
    return max((one.padding_idx + 1 for one in own if one.padding_idx is not None), default=0)


def longest_text(said: Any) -> int:
    """Tokens that a model reads whose positions have no end: its tokenizer's longest text, where that is sane."""
    sane = isinstance(said, int | float) and 0 < said < SANE_TOKENS
    return int(said) if sane else ENDLESS_TOKENS
