"""Vectors of texts in OpenAI's form: what a client asks for, read strictly; one request is answered after the other."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool

from flows.endpoint.bodies import NOTES, check_names
from flows.endpoint.refusals import Refusal, broken
from stages.runtime.contract import StageError
from stages.serving.batching import Full
from stages.serving.engine import Answerer
from stages.serving.reading import embedded

AT_ONCE = 32
"""Texts between which it is seen whether anybody still listens."""
MOST_TEXTS = 2048
"""OpenAI's own limit of a request."""
_OWN = ("input", "encoding_format", "dimensions", "truncate")
_FORMS = ("float", "base64")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked.

    Attributes:
        texts: at least one.
        form: of the numbers, `float` or `base64`.
        dimensions: of a vector, where the client says it.
        truncate: of a text that is too long the beginning is read.
    """

    texts: Sequence[str]
    form: str
    dimensions: int | None
    truncate: bool


def wanted(said: Mapping[str, Any]) -> Wanted:
    """What is asked at /v1/embeddings; `truncate` is not OpenAI's.

    Raises:
        Refusal: a parameter is unknown, out of range or not followed.
    """
    check_names(said, {"model", *_OWN, *NOTES})
    given = said.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(one, str) for one in texts):
        text = "input is no text and no list of texts, or empty; tokens are not taken, since clients count by another"
        raise Refusal(f"{text} tokenizer. Give texts.", param="input")
    if len(texts) > MOST_TEXTS:
        raise Refusal(f"too many texts; measured {len(texts)}; limit {MOST_TEXTS}. Ask some later.", param="input")
    form, truncate, dimensions = said.get("encoding_format"), said.get("truncate"), said.get("dimensions")
    if form not in (None, *_FORMS):
        raise Refusal(
            f"encoding_format is unknown; measured {form!r:.200}; limit float, base64", param="encoding_format"
        )
    if not isinstance(truncate, bool | None):
        raise Refusal(f"truncate is neither true nor false; measured {truncate!r:.200}", param="truncate")
    if dimensions is not None and (isinstance(dimensions, bool) or not isinstance(dimensions, int)):
        raise Refusal(f"dimensions is no whole number; measured {dimensions!r:.200}", param="dimensions")
    return Wanted(texts=texts, form=form or _FORMS[0], dimensions=dimensions, truncate=bool(truncate))


class Vectors:
    """Asks a model for vectors, one request at a time.

    Args:
        model: its task is `embed`.
        waiting: requests that wait at most.
    """

    def __init__(self, model: Answerer, waiting: int) -> None:
        self.model, self.most_waiting, self._asked = model, waiting, 0
        self._turn = asyncio.Lock()

    @property
    def active(self) -> int:
        """Requests that are being answered."""
        return min(1, self._asked)

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return self._asked - self.active

    async def answered(self, asked: Wanted, name: str) -> dict[str, Any]:
        """OpenAI's list of embeddings; who cancels it waits for no more than AT_ONCE texts.

        Raises:
            Refusal: a text is not read, the vectors have other dimensions, or too many requests wait.
        """
        if self.active and self.waiting >= self.most_waiting:
            said = Full("too many requests wait already", measured=self.waiting, limit=self.most_waiting)
            raise broken(said)
        self._asked += 1
        try:
            async with self._turn:
                parts = [
                    await run_in_threadpool(embedded, self.model, some, truncate=asked.truncate)
                    for some in (asked.texts[at : at + AT_ONCE] for at in range(0, len(asked.texts), AT_ONCE))
                ]
            vector_NE, tokens = np.concatenate([part_NE for part_NE, _ in parts]), sum(count for _, count in parts)
        except StageError as error:
            raise Refusal(str(error), param="input") from error
        finally:
            self._asked -= 1
        if asked.dimensions not in (None, vector_NE.shape[1]):
            limit = f"measured {asked.dimensions}; limit {vector_NE.shape[1]}. Leave it out."
            raise Refusal(f"the model's vectors have other dimensions; {limit}", param="dimensions")
        data = [
            {"object": "embedding", "index": at, "embedding": _written(vector_E, asked.form)}
            for at, vector_E in enumerate(vector_NE)
        ]
        used = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": name, "usage": used}


def _written(vector_E: Any, form: str) -> Any:
    return vector_E.tolist() if form == "float" else base64.b64encode(vector_E.astype("<f4").tobytes()).decode()
