"""Sources that lie somewhere: their digests when a run is planned, their documents when it is made."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from stages.adapters import texts
from stages.adapters.sources import Wanted, changed_source, open_source, pin_source
from stages.corpus.params import SourceParams
from stages.runtime.contract import Pins, Progress, StageError

TEXT = Wanted("text", texts.PATTERNS, texts.REMEDY)
P = TypeVar("P", bound=SourceParams)


def pinned(params: P, pins: Pins, progress: Progress) -> P:
    """Resolve a source to the digest of its text. What a model will write has none: it is bound to the model.

    Raises:
        StageError: there is no text, or not the one whose digest was asked for.
    """
    if params.writes:
        return params
    if params.source in texts.GENERATED:
        digest, exact, downloads = texts.digest_of_documents(texts.generated(params.source)), params.source, ""
    else:
        found = pin_source(params.source, TEXT, texts.digest_of_files, pins, progress)
        digest, exact, downloads = found.digest, found.exact, found.downloads
    if params.digest not in ("", digest):
        raise changed_source(params.source, digest, params.digest)
    return params.model_copy(update={"digest": digest, "exact": exact, "downloads": downloads})


def read(params: SourceParams, spare: Path, progress: Progress) -> tuple[list[texts.Document], int, str]:
    """The documents of a source, how many rows are null, and the digest of the source.

    Args:
        params: of the source.
        spare: folder for what must be downloaded again.
        progress: told what is left out.

    Raises:
        StageError: it cannot be read, or rows are null where they may not be.
    """
    if params.source in texts.GENERATED:
        documents = texts.generated(params.source)
        return documents, 0, texts.digest_of_documents(documents)
    path = open_source(params.exact or params.source, TEXT, params.downloads, spare, progress)
    documents, nulls = [], []
    for found in texts.documents(path, params.column, progress):
        if isinstance(found, texts.Null):
            nulls.append(found.where)
        else:
            documents.append(found)
    if nulls and params.nulls == "refuse":
        raise StageError(
            f"{nulls[0]} has null for its text",
            measured=f"{len(nulls)} rows of {len(nulls) + len(documents)} are null",
            limit=0,
            remedy="Set the step's parameter `nulls` to skip, to leave them out.",
        )
    if nulls:
        progress.note(
            f"{len(nulls)} rows of {len(nulls) + len(documents)} are null and left out: {nulls[0]} is the first"
        )
    if chats := sum(bool(document.messages) for document in documents):
        progress.note(f"{chats} rows are conversations: each stays whole, and is written by a model's chat template")
    return documents, len(nulls), texts.digest_of_files(path)
