"""What an engine or a graph says of itself, and its tokenizer: read strictly, since a folder may be anybody's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer

from stages.models.checkpoint.json_files import read_json
from stages.runtime.contract import StageError

EXECUTABLE = "executable"
"""The field of `engine.json` that names a file beside it."""
_UNFOLLOWED: Mapping[str, Any] = {
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "sequence_bias": {}, "guidance_scale": 1.0,
    "exponential_decay_length_penalty": [],
}  # fmt: skip
"""Settings of generation that nothing here follows, and the value by which they ask for nothing."""
_AGAIN = "Make the artifact again."
_MAY_SAY = {"task": str, "answers": dict}


def read_beside(path: Path) -> dict[str, Any]:
    """A JSON file without which a folder is none of the three.

    Raises:
        StageError: it is missing or no JSON object.
    """
    absent = StageError(
        f"{path.parent.name} holds no engine, graph or checkpoint",
        measured=f"{path.name} is missing",
        remedy="Give the folder of such an artifact.",
    )
    return read_json(path, absent=absent)


def described_by(path: Path, fields: Mapping[str, type]) -> dict[str, Any]:
    """`engine.json` or `graph.json`.

    Args:
        path: of the file.
        fields: what it has to say, of which type.

    Raises:
        StageError: it says something else, or its executable lies elsewhere.
    """
    found = read_beside(path)
    for name, kind in (*fields.items(), *((name, kind) for name, kind in _MAY_SAY.items() if name in found)):
        value = found.get(name)
        outside = name == EXECUTABLE and isinstance(value, str) and value != Path(value).name
        few = kind is int and isinstance(value, int) and value < 1
        if not isinstance(value, kind) or isinstance(value, bool) or outside or few:
            raise StageError(
                f"{path.name} of {path.parent.name} is damaged",
                measured=f"{name}: {value!r:.60}",
                limit="the name of a file beside it" if outside else "at least 1" if few else kind.__name__,
                remedy=_AGAIN,
            )
    return found


def read_tokenizer(path: Path) -> Tokenizer:
    """A `tokenizer.json`; it neither pads nor cuts.

    Raises:
        StageError: it is missing or damaged.
    """
    if not path.is_file():
        raise StageError(f"{path.parent.name} has no {path.name}", limit="one beside the executable", remedy=_AGAIN)
    try:
        return bare(Tokenizer.from_file(str(path)))
    # The library raises nothing more exact.
    except Exception as error:
        raise StageError(
            f"{path.name} of {path.parent.name} is damaged",
            measured=error,
            limit=f"what tokenizers {tokenizers.__version__} reads",
            remedy=_AGAIN,
        ) from error


def bare(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that neither pads nor cuts."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def settings_of(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is said of answers: by generation_config.json, or else by config.json."""
    path = folder / "generation_config.json"
    return read_beside(path) if path.is_file() else config


def ends_of(settings: Mapping[str, Any], config: Mapping[str, Any]) -> frozenset[int]:
    """Tokens that end a sequence.

    Raises:
        StageError: one is no number.
    """
    found = settings.get("eos_token_id", config.get("eos_token_id"))
    ends = [] if found is None else found if isinstance(found, list) else [found]
    if strange := [one for one in ends if isinstance(one, bool) or not isinstance(one, int)]:
        raise StageError(
            "a token that ends a sequence is no number",
            measured=f"eos_token_id: {strange[0]!r:.60}",
            limit="a whole number, or a list of them",
            remedy=_AGAIN,
        )
    return frozenset(ends)


def unfollowed(settings: Mapping[str, Any]) -> list[str]:
    """What settings ask for that transformers' own generation follows and none of ours, each with its value.

    What is drawn, and how, everybody says who asks.
    """
    return [
        f"{name} {value}" for name, none in _UNFOLLOWED.items() if (value := settings.get(name)) not in (None, none)
    ]
