"""What items are answered that are typed otherwise, beside what they are answered as they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stages.measures.documents import Document, summary


def with_variants(
    documents: Sequence[Document], varied: Mapping[str, Mapping[str, str]], by_name: Mapping[str, Document]
) -> list[Document]:
    """The documents of items, each with what it was answered when it was typed otherwise.

    Args:
        documents: of the items as they are written.
        varied: variant -> name of an item -> name of what it was asked as.
        by_name: every document.
    """
    if not varied or any("right" not in one for one in documents):
        return [*documents]
    return [
        _with(one, {kind: by_name[of[one["id"]]] for kind, of in varied.items() if one["id"] in of})
        for one in documents
    ]


def _with(document: Document, others: Mapping[str, Document]) -> Document:
    kept = ("prompt", "answer", "right")
    right = [int(one["right"]) for one in others.values()]
    counts = {
        "varied": len(right),
        "varied_right": sum(right),
        "varied_flipped": sum(one != document["right"] for one in right),
    }
    return document | counts | {"variants": {kind: {key: one[key] for key in kept} for kind, one in others.items()}}


def by_variant(documents: Sequence[Document], kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{"variants": kind -> how many items there are of it, right answers to them and, as written, to the same ones}."""
    found: dict[str, Any] = {}
    for kind in kinds:
        those = [one for one in documents if kind in one.get("variants", {})]
        alone = [_with(one | {"variants": {}}, {kind: one["variants"][kind]}) for one in those]
        measures = summary(alone) if alone else {}
        found[kind] = {
            "items": len(those),
            "right": sum(one["varied_right"] for one in alone),
            "right_as_written": sum(one["right"] for one in alone),
            **{name: measures[name] for name in ("robustness", "variant_flips") if name in measures},
        }
    return {"variants": found} if found else {}
