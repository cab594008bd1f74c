"""What a model that continues no text is asked by a table of texts, and its answers as plain values.

A server hands over columns and parameters; what a model of its task does not take is refused. It travels inside the
registered model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tokenizers import Encoding

from stages.runtime.contract import StageError
from stages.serving.engine import Answerer
from stages.serving.reading import answer, choose, classify, embed, tag

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "embed": ("text",), "classify": ("text", "pair"), "score": ("text", "pair"), "tag": ("text",),
    "answer": ("question", "context"), "choose": ("question", "choices"),
}  # fmt: skip
"""Task -> the columns that it is asked by."""
OPTIONAL = frozenset({"pair"})
LISTS = frozenset({"choices"})
"""Columns that hold a list of texts in each row."""
PARAMETERS: Mapping[str, frozenset[str]] = {
    "truncate": frozenset({"embed", "classify", "score"}),
    "unanswerable": frozenset({"answer"}),
}
"""Parameter, false unless it is asked for -> the tasks that take it."""


_PAIRS = ("answer", "choose")


def told(model: Answerer, table: Mapping[str, Sequence[Any]], params: Mapping[str, Any]) -> list[Any]:
    """What a model says of each row.

    Args:
        model: its task is one of COLUMNS.
        table: columns of COLUMNS; a pair may be None.
        params: see PARAMETERS.

    Returns:
        A list of numbers; the likeliest class as {"label", "score", "scores"}; a list of {"label", "score", "start",
        "end", "text"}; {"text", "score", "start", "end"}; or the likeliest choice as {"choice", "text", "score",
        "scores"}, its place and the scores of all in the order that they were given in.

    Raises:
        StageError: columns or parameters that the task does not take, or see `stages.serving.reading`.
    """
    _check(model.task, table, params)
    asked = dict(params)
    if model.task == "answer":
        return [asdict(answer(model, *row, **asked)) for row in zip(table["question"], table["context"], strict=True)]
    if model.task == "choose":
        return [_chosen(model, *row) for row in zip(table["question"], table["choices"], strict=True)]
    texts = table["text"]
    if model.task == "embed":
        return list(embed(model, texts, **asked).tolist())
    if model.task == "tag":
        return [[asdict(one) for one in found] for found in tag(model, texts)]
    others = table.get("pair", [None] * len(texts))
    rows = [text if other is None else (text, other) for text, other in zip(texts, others, strict=True)]
    return [
        asdict(found[0]) | {"scores": {one.label: one.score for one in found}}
        for found in classify(model, rows, **asked)
    ]


def _chosen(model: Answerer, question: str, choices: Any) -> dict[str, Any]:
    choices = choices.tolist() if hasattr(choices, "tolist") else choices
    if not isinstance(choices, list | tuple):
        raise StageError(
            "the choices of a question are no list",
            measured=repr(choices)[:200],
            limit="a list of texts in each row",
            remedy="Give one.",
        )
    found = choose(model, question, choices)
    in_order = sorted(found, key=lambda one: one.choice)
    return asdict(found[0]) | {"scores": [one.score for one in in_order]}


def numbers(model: Answerer, asked: Sequence[Sequence[str]]) -> list[list[float]]:
    """What a model's answers are made of, by texts or by questions with their contexts; of a long one its beginning."""
    found = []
    for one in asked:
        encoding = _encoding(model, one)
        ids_1T, type_1T = (np.array([row[: model.maximum_tokens]]) for row in (encoding.ids, encoding.type_ids))
        found.append(model.logits(ids_1T, type_1T).ravel().tolist())
    return found


def asked_by(model: Answerer, asked: Sequence[Sequence[str]]) -> dict[str, list[Any]]:
    """The columns that ask a model the same, but for what is longer than it reads; none where it is asked by none.

    Args:
        model: whose task says the columns.
        asked: texts, or questions with their contexts; a text alone is its own context.
    """
    names = [name for name in COLUMNS.get(model.task, ()) if name not in OPTIONAL]
    # A text that is its own context is read as both; a question needs room for some of its context, too.
    whole = [[one[0], one[min(1, len(one) - 1)]] if model.task in _PAIRS else one for one in asked]
    fit = [one for one in whole if len(_encoding(model, one).ids) <= model.maximum_tokens]
    rows = {name: [one[min(at, len(one) - 1)] for one in fit] for at, name in enumerate(names)} if fit else {}
    return {name: [[one] for one in texts] if name in LISTS else texts for name, texts in rows.items()}


def _encoding(model: Answerer, asked: Sequence[str]) -> Encoding:
    return model.tokenizer.encode(asked[0], asked[1] if len(asked) > 1 else None)


def _check(task: str, table: Mapping[str, Sequence[Any]], params: Mapping[str, Any]) -> None:
    columns = COLUMNS.get(task, ())
    if not columns:
        raise StageError(
            "the model is not asked by texts",
            measured=f"its task is {task}",
            limit=", ".join(COLUMNS),
            remedy="Ask its engine for `logits`.",
        )
    strange = [name for name in table if name not in columns]
    missing = [name for name in columns if name not in table and name not in OPTIONAL]
    if strange or missing:
        raise StageError(
            "the columns are not those that the model is asked by",
            measured=", ".join(map(str, table)) or "none",
            limit=", ".join(columns),
            remedy="Name them so.",
        )
    for name, value in params.items():
        if task not in PARAMETERS.get(name, ()):
            known = [one for one, tasks in PARAMETERS.items() if task in tasks]
            raise StageError(
                f"there is no parameter {name!r}",
                measured=f"its task is {task}",
                limit=", ".join(known) or "none",
                remedy="Leave it out.",
            )
        if not isinstance(value, bool):
            raise StageError(
                f"{name} is neither true nor false", measured=repr(value)[:200], limit="true, false", remedy="Give one."
            )
