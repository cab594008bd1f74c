"""The registered model: MLflow runs this file where the model is loaded, far from the project that made it.

It travels with the engine it answers from and the part of `stages` that opens it. MLflow is imported on top, since the
class derives from its own; nothing of the project imports this file.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd  # type: ignore[import-untyped]
from mlflow import pyfunc
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.pyfunc import PythonModel

from stages.runtime.contract import StageError
from stages.serving.generation import PARAMETERS, generation
from stages.serving.inputs import MESSAGES, PROMPT, Question, question
from stages.serving.told import COLUMNS, told
from stages.serving.told import PARAMETERS as READING


class Served(PythonModel):
    """Answers prompts and conversations with the engine that the model carries."""

    def load_context(self, context: Any) -> None:
        """Open the engine once its bytes are those that were judged.

        Raises:
            ValueError: a file is missing or has other bytes: an engine is executable code.
        """
        from stages.serving.engine import open_engine

        folder = Path(context.artifacts["engine"])
        for name, sha256 in json.loads(Path(context.artifacts["digests"]).read_text(encoding="utf-8")).items():
            if not (folder / name).is_file():
                raise ValueError(f"{name} of the registered engine is missing: register the model again")
            with (folder / name).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != sha256:
                raise ValueError(
                    f"{name} of the registered engine is not what was judged: measured {found[:12]}, limit "
                    f"{sha256[:12]}. Register the model again"
                )
        self._engine = open_engine(folder, verified=True)
        _hear_all()

    # MLflow would derive a signature from any other hint and drop the stated one, with its params.
    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Continue each prompt, or answer each conversation; of a model of another task, say what it says of each text.

        Args:
            context: not used.
            model_input: a text or a list of texts; a conversation or a list of them, each a list of messages with
                `role` and `content`; a dictionary, or a list of them, with `prompt` or `messages`; a table with a
                column of either name, or whose first column holds texts. Of another task a text, a list of texts or of
                rows, or a table, with the columns of `stages.serving.told.COLUMNS`.
            params: see `stages.serving.generation.Generation`, or PARAMETERS of `stages.serving.told`.

        Returns:
            A list of texts; to a conversation a completion as OpenAI's chat has it, to several a list of them. Of
            another task see `stages.serving.told.told`.

        Raises:
            MlflowException: of the code BAD_REQUEST, where what is asked is refused.
        """
        if self._engine.task in COLUMNS:
            with _refusing():
                return told(self._engine, _table(model_input, self._engine.task), params or {})
        with _refusing():
            asked = _question(model_input)
            answers = self._engine.answers(asked.prompts, generation({**asked.given, **(params or {})}))
        if not asked.talks:
            return [one.text for one in answers]
        made = []
        for one in answers:
            said = {"index": 0, "message": {"role": "assistant", "content": one.text}, "finish_reason": one.finish}
            read, written = one.prompt_tokens, one.new_tokens
            usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
            made.append(self._head("chat.completion") | {"choices": [said], "usage": usage})
        return made[0] if asked.alone else made

    def predict_stream(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> Iterator[Any]:
        """The answer to one prompt in pieces of text, to one conversation in chunks as OpenAI's chat has them.

        Raises:
            MlflowException: see `predict`.
        """
        with _refusing():
            asked = _question(model_input)
            if len(asked.prompts) != 1:
                raise StageError(
                    "a stream is one answer", measured=f"{len(asked.prompts)} prompts", limit="1", remedy="Ask one."
                )
            pieces = self._engine.stream(asked.prompts[0], **{**asked.given, **(params or {})})
            if not asked.talks:
                yield from pieces
                return
            head, told = self._head("chat.completion.chunk"), {"role": "assistant"}
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    yield head | {"choices": [{"index": 0, "delta": told, "finish_reason": end.value.finish}]}
                    return
                yield head | {"choices": [{"index": 0, "delta": told | {"content": piece}, "finish_reason": None}]}
                told = {}

    def _head(self, kind: str) -> dict[str, Any]:
        made = int(time.time())
        return {"id": f"chatcmpl-{uuid4().hex}", "object": kind, "created": made, "model": self._engine.target}


def _question(model_input: Any) -> Question:
    if isinstance(model_input, pd.Series):
        return question(model_input.tolist())
    if not isinstance(model_input, pd.DataFrame):
        return question(model_input)
    named = [name for name in model_input.columns if name in PARAMETERS]
    if named:
        raise StageError(
            f"{named[0]} is a parameter, and no column", limit=f"{PROMPT} or {MESSAGES}", remedy="Give it in `params`."
        )
    if not len(model_input.columns):
        return question([])
    both = [name for name in (PROMPT, MESSAGES) if name in model_input.columns]
    if others := [name for name in model_input.columns if both and name not in both]:
        raise StageError(
            f"there is no column {others[0]!r}",
            limit=f"{PROMPT} or {MESSAGES}",
            remedy="Leave it out; parameters are given in `params`.",
        )
    if MESSAGES in both:
        return question({name: model_input[name].tolist() for name in both})
    return question((model_input[PROMPT] if both else model_input.iloc[:, 0]).tolist())


def _table(model_input: Any, task: str) -> Mapping[str, list[Any]]:
    """Column -> values: a list of texts is the first column."""
    if isinstance(model_input, pd.Series):
        model_input = model_input.tolist()
    if isinstance(model_input, pd.DataFrame):
        plain = model_input.astype(object).where(model_input.notna(), None)
        return {str(name): plain[name].tolist() for name in plain.columns}
    if isinstance(model_input, dict):
        columns = {str(name): _listed(one) for name, one in model_input.items()}
        if len({len(one) for one in columns.values()}) > 1:
            raise StageError(
                "columns are of different lengths",
                measured=", ".join(f"{name} {len(one)}" for name, one in columns.items()),
                limit="one length",
                remedy="Give as many of each.",
            )
        return columns
    rows = _listed(model_input)
    if rows and all(isinstance(one, dict) for one in rows):
        names = dict.fromkeys(name for one in rows for name in one)
        return {str(name): [one.get(name) for one in rows] for name in names}
    return {COLUMNS.get(task, ("text",))[0]: rows}


def _listed(value: Any) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, list | tuple) else [value]


@contextmanager
def _refusing() -> Iterator[None]:
    """What is refused is a bad request to MLflow's server, whose answer then says why; anything else is its own."""
    try:
        yield
    except StageError as error:
        raise MlflowException(str(error), error_code=BAD_REQUEST) from error


def _hear_all() -> None:
    """Have MLflow hand over to such a model all that it was asked.

    MLflow drops a parameter that a signature does not name, and says so in a log alone: who misspells `temperature` is
    answered at another one. By the named column it refuses a plain list of texts and any conversation. It has no switch
    for either; this model checks both itself. Models of other makers are served as before.
    """
    checked = getattr(pyfunc, "_validate_prediction_input", None)
    if checked is None or hasattr(checked, "enginery"):
        return

    def validate(data: Any, params: Any, input_schema: Any, params_schema: Any, *rest: Any, **named: Any) -> Any:
        if {one.name for one in params_schema or ()} not in (set(PARAMETERS), set(READING)):
            return checked(data, params, input_schema, params_schema, *rest, **named)
        if not isinstance(params or {}, Mapping):
            raise MlflowException(f"params are no dictionary: {params!r}", error_code=BAD_REQUEST)
        return data, params

    validate.enginery = True  # type: ignore[attr-defined]
    pyfunc._validate_prediction_input = validate


set_model(Served())
