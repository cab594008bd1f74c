"""Turn text into splits that share no paragraph: duplicates out, passages dealt by share; a model may write some."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from stages.adapters.sources import changed_source
from stages.adapters.texts import digest_of_documents
from stages.corpus.dealing import Passage, Source, dealt
from stages.corpus.params import SELF, CorpusParams, MixedParams, SourceParams
from stages.corpus.reading import pinned, read
from stages.measures.items import ItemSplits, every_item, not_items
from stages.runtime.contract import (
    PARTIAL,
    Image,
    Input,
    Kind,
    Metrics,
    Pins,
    Progress,
    Stage,
    StageError,
)
from stages.runtime.fingerprint import canonical, digest_bytes

WRITER = "stages.corpus.self_written"
"""Imported by its name, so that a corpus without a model neither loads torch nor depends on the code of models."""
_WORK = 3
"""Steps forward beside those of writing: read, without duplicates, dealt."""


def pin(params: CorpusParams, pins: Pins, progress: Progress) -> CorpusParams:
    """Resolve each source to the digest of its text.

    Raises:
        StageError: there is no text, or not the one whose digest was asked for.
    """
    if not params.sources:
        return pinned(params, pins, progress)
    return params.model_copy(update={"sources": [pinned(one, pins, progress) for one in params.sources]})


def run(params: CorpusParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Write one `<split>.jsonl` a split and corpus.json."""
    _check_model(params, "model" in inputs)
    to_write = sum(one.samples for one in params.each if one.writes)
    sources, done = [], 0
    for one in params.each:
        sources.append(_source(one, inputs, output / PARTIAL, progress, (done, to_write)))
        done += one.samples if one.writes else 0
    progress.advanced(to_write + 1, to_write + _WORK)
    items = [one for role, folder in inputs.items() if role.startswith("items.") for one in every_item(folder)]
    made = dealt(sources, params, items, progress)
    splits = made.splits
    progress.advanced(to_write + 2, to_write + _WORK)
    counts = {name: _written(output / f"{name}.jsonl", passages) for name, passages in splits.items()}
    record = {
        "digest": _digest(sources),
        "duplicates_removed": made.duplicates,
        "telling_removed": made.telling,
        "nulls_skipped": sum(one.nulls for one in sources),
        "control_tokens": params.control_tokens,
        "splits": counts,
        **_of_sources(sources, splits),
    }
    (output / "corpus.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    progress.advanced(to_write + _WORK, to_write + _WORK)
    return {
        "passages": sum(count["passages"] for count in counts.values()),
        "characters": sum(count["characters"] for count in counts.values()),
        "duplicates_removed": made.duplicates,
        "telling_removed": made.telling,
        "nulls_skipped": sum(one.nulls for one in sources),
    }


def _source(
    params: SourceParams, inputs: Mapping[str, Path], partial: Path, progress: Progress, writing: tuple[int, int]
) -> Source:
    """One source, read or written; `writing` says how many texts of all sources were written, and how many will be."""
    name, share = (params.name, params.share) if isinstance(params, MixedParams) else ("", 1.0)
    known: dict[str, Any] = {}
    if params.writes:
        before, total = writing

        def advanced(done: float) -> None:
            progress.advanced(before + done, total + _WORK)

        documents, known = import_module(WRITER).written(
            params, inputs["model"], partial / f"written-{name}", progress, advanced
        )
        nulls, digest = 0, digest_of_documents(documents)
    else:
        documents, nulls, digest = read(params, partial, progress)
    if params.digest not in ("", digest):
        raise changed_source(params.source, digest, params.digest)
    return Source(name, share, documents, digest, nulls, known)


def _written(path: Path, passages: Sequence[Passage]) -> dict[str, int]:
    text = "".join(f"{passage.line()}\n" for passage in passages)
    path.write_text(text, encoding="utf-8", newline="\n")
    return {
        "passages": len(passages),
        "characters": sum(len(p.text) for p in passages),
        "conversations": sum(bool(p.messages) for p in passages),
    }


def _digest(sources: Sequence[Source]) -> str:
    if len(sources) == 1 and not sources[0].name:
        return sources[0].digest
    return digest_bytes(canonical([[one.name, one.share, one.digest] for one in sources]))


def _of_sources(sources: Sequence[Source], splits: Mapping[str, Sequence[Passage]]) -> dict[str, Any]:
    """What corpus.json says of several sources, and of text that a model wrote."""
    found: dict[str, Any] = {}
    for one in sources:
        ours = {name: [p for p in passages if p.source == one.name] for name, passages in splits.items()}
        found[one.name] = {
            "digest": one.digest,
            "share": one.share,
            "characters": {name: sum(len(p.text) for p in passages) for name, passages in ours.items()},
            **({"written": one.written} if one.written else {}),
        }
    if "" not in found:
        return {"sources": found}
    return {"written": sources[0].written} if sources[0].written else {}


def _check_model(params: CorpusParams, given: bool) -> None:
    """Raise StageError where a model is to write and is not there, or is there and has nothing to write."""
    if params.writes and not given:
        raise StageError(
            f"{SELF} is the text that a model writes, and no model is given",
            remedy="Name the step that makes the checkpoint as input `model` of this one.",
        )
    if given and not params.writes:
        raise StageError(
            "the corpus reads a model that has nothing to write",
            measured=f"sources {', '.join(one.source for one in params.each)}",
            remedy=f"Give {SELF} as `source` or as one of `sources`, or take the input `model` away.",
        )


def admit(params: CorpusParams, known: Mapping[str, Any]) -> frozenset[str]:
    """The splits that the corpus will have, if the model can write."""
    _check_model(params, "model" in known)
    if params.writes:
        import_module(WRITER).check_known(known["model"], params)
    for role, splits in known.items():
        if role.startswith("items.") and splits is not None and not isinstance(splits, ItemSplits):
            raise not_items()
    return frozenset(params.splits)


def chosen_image(params: CorpusParams) -> Image:
    """Where a model writes, what models need."""
    return Image.TORCH if params.writes else Image.BASE


def chosen_code(params: CorpusParams) -> tuple[str, ...]:
    """The module that has a model write, where one does."""
    return (WRITER,) if params.writes else ()


CORPUS = Stage(
    name="corpus",
    params=CorpusParams,
    inputs={
        "model": Input(kinds=frozenset({Kind.CHECKPOINT}), optional=True),
        "items": Input(kinds=frozenset({Kind.CORPUS}), optional=True, many=True),
    },
    output=Kind.CORPUS,
    image=Image.BASE,
    run=run,
    pin=pin,
    admit=admit,
    uses=chosen_code,
    chosen_image=chosen_image,
)
