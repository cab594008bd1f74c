"""What an encoder says of pairs of texts: how near they are, and whether a query's document is the nearest of all.

Shapes: C candidates, E of a vector.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stages.measures.documents import Document
from stages.models.checkpoint.pooling import Pooling
from stages.runtime.contract import StageError
from stages.serving.engine import Answerer
from stages.validate.asking import Question
from stages.validate.by_length import by_length

VECTORS = "vectors"
"""Key of a document's two vectors while the others of its set are not there yet."""
_SHOWN = 160
"""Characters of a document that stand in the report."""
_NEAR = 1e-6
"""Cosines are not told apart below this: a model to which all texts are one finds none of them."""


def embedded(pooling: Pooling, group: list[Question], judged: Answerer, dense: Answerer | None) -> list[Document]:
    """The vectors of a group of items, and how near they are to dense's."""
    rows = [row for one in group for row in (one.ids, one.wholes[0])]
    ours_NE = _vectors(pooling, rows, judged)
    theirs_NE = _vectors(pooling, rows, dense) if dense else None
    found = []
    for place, one in enumerate(group):
        own = slice(2 * place, 2 * place + 2)
        document: Document = {"id": one.name, "slice": one.item.ability, "tokens": len(one.ids)}
        document |= {"prompt": one.item.prompt, "other": one.item.other, "item": one.item.id}
        document |= {} if one.item.score is None else {"gold": one.item.score}
        if theirs_NE is not None:
            # The mean over rows is weighted by tokens, as it is on text.
            document["cosine"] = float((ours_NE[own] * theirs_NE[own]).sum(-1).mean()) * len(one.ids)
        document[VECTORS] = base64.b64encode(ours_NE[own].astype("<f4").tobytes()).decode()
        found.append(document)
    return found


def _vectors(pooling: Pooling, rows: Sequence[Sequence[int]], model: Answerer) -> NDArray[np.float64]:
    """Of each row, of length 1."""
    # A model that modules follow answers with one vector already; of another its tokens' are pooled here.
    said = by_length(rows, model)
    vector_NE = torch.stack([one.double() if one.ndim == 1 else pooling.vector(one) for one in said])
    length_N = vector_NE.norm(dim=-1, keepdim=True)
    if not bool(((length_N > 0) & length_N.isfinite()).all()):
        raise StageError("the model or its baseline gives a text no direction", measured="zero, NaN or infinity")
    found: NDArray[np.float64] = (vector_NE / length_N).numpy()
    return found


def sound(document: Document) -> bool:
    """Whether what was kept of a document are two vectors."""
    pair = _pair(document)
    return pair.size > 0 and bool(np.isfinite(pair).all())


def _pair(document: Document) -> NDArray[np.float64]:
    found = np.frombuffer(base64.b64decode(document[VECTORS]), dtype="<f4").astype(np.float64)
    return found.reshape(2, -1)


def compared(by_name: Mapping[str, Document], written: Sequence[str]) -> dict[str, Document]:
    """The documents with what their vectors say, and without these.

    Args:
        by_name: every document, of items typed otherwise as well.
        written: names of the items as they are written: their documents are the candidates.
    """
    pairs = {name: _pair(one) for name, one in by_name.items()}
    first: dict[str, str] = {}
    for name in written:
        if "gold" not in by_name[name]:
            first.setdefault(by_name[name]["other"], name)
    others_CE = np.stack([pairs[name][1] for name in first.values()]) if first else None
    shown = [f"{by_name[name]['item']}: {text[:_SHOWN]}" for text, name in first.items()]
    places = {text: place for place, text in enumerate(first)}
    found = {}
    for name, one in by_name.items():
        query_E, other_E = pairs[name]
        if others_CE is None or "gold" in one:
            cosine = float(query_E @ other_E)
            said = {"similarity": cosine, "expected": f"{one['gold']:g}", "answer": f"{cosine:.4f}", "repeated": 0}
        else:
            said = _ranked(others_CE @ query_E, places[one["other"]], shown)
        found[name] = {key: value for key, value in one.items() if key not in (VECTORS, "item")} | said
    return found


def _ranked(cosine_C: NDArray[np.float64], own: int, shown: Sequence[str]) -> dict[str, Any]:
    """Where a query's document stands among all, behind those that are as near."""
    ahead_C = cosine_C > cosine_C[own] - _NEAR
    ahead_C[own] = False
    rank = 1 + int(ahead_C.sum())
    nearest = own if rank == 1 else int(np.where(ahead_C, cosine_C, -np.inf).argmax())
    return {
        "rank": rank,
        "right": int(rank == 1),
        "chance": 1 / len(cosine_C),
        "expected": shown[own],
        "answer": shown[nearest],
        "repeated": 0,
    }


def check_pairs(asked: Sequence[Question]) -> None:
    """Raise StageError where queries have but one document to find, or the set mixes what cannot be measured as one."""
    kinds = {one.item.task for one in asked}
    if len(kinds) > 1:
        raise StageError(
            "items of similarity and of retrieval stand in one set, and no measure is of both",
            measured=", ".join(sorted(kinds)),
            limit="one of them",
            remedy="Make a step of the stage items for each.",
        )
    if kinds == {"retrieval"} and len({one.item.other for one in asked}) < 2:
        raise StageError(
            "all queries have one document, so that none can be missed",
            measured="1 document",
            limit="2 at least",
            remedy="Give queries with other documents as well.",
        )
