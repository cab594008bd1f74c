"""Turn text into splits that share no paragraph: duplicates out, passages dealt by share.

A *paragraph* stands between blank lines; a *passage* is a run of consecutive paragraphs of one document and goes to one
split whole. A conversation is one passage; what many have in common, as a system's words, may stand in two splits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from stages.adapters import texts
from stages.adapters.sources import Wanted, changed_source, open_source, pin_source
from stages.algorithms.prefix_filter import first_of_each
from stages.runtime import rows
from stages.runtime.contract import (
    PARTIAL,
    Image,
    Kind,
    Location,
    Metrics,
    Params,
    Pins,
    Progress,
    Stage,
    StageError,
)

TEXT = Wanted("text", texts.PATTERNS, texts.REMEDY)
SHORT_WORDS = 8
"""Shorter paragraphs are duplicates only when equal: three words in common say too little."""
_SHINGLE_WORDS = 3
_LONGEST = 4
"""A paragraph of more than so many passages is taken apart."""

Split = Literal["calibrate", "train", "validate", "test"]
Share = Annotated[float, Field(gt=0, le=1)]


class CorpusParams(Params):
    """Where the text lies and how it is split.

    Attributes:
        source: a .txt, .md, .jsonl, .json or .parquet file, any of them with .gz, or a folder of them: a path, hf://, s3://,
            pypi://, or pydoc://topics.
        splits: split -> its share of the text; no paragraph stands in two.
        digest: what its content must be; by default what it is when the run is planned.
        column: of .jsonl, .json and .parquet: where a text, a list of texts or a conversation stands; `a.b` is a path.
            Rows without `text` are read by `messages`, `conversations`, or a prompt and its answer.
        nulls: what becomes of rows that have nothing there.
        control_tokens: words that look like a tokenizer's control tokens stay text, or are parsed as control tokens.
        passage_characters: length of the passages that are dealt to the splits.
        near_duplicate: share of common word runs from which on two passages are one; 1 takes equal ones only.
    """

    source: str = Location()
    splits: dict[Split, Share] = Field(min_length=1)
    digest: str = ""
    column: str = rows.TEXT
    nulls: Literal["refuse", "skip"] = "refuse"
    control_tokens: Literal["text", "parse"] = "text"
    passage_characters: int = Field(2000, ge=100)
    near_duplicate: float = Field(0.8, gt=0, le=1)
    exact: str = Location("", pinned=True)
    downloads: str = Location("", pinned=True)

    @field_validator("splits")
    @classmethod
    def _ordered(cls, splits: dict[Split, Share]) -> dict[Split, Share]:
        # Equal mappings are one work, in whatever order a recipe or JSON lists them; dealing goes by this order.
        return {name: splits[name] for name in get_args(Split) if name in splits}

    @model_validator(mode="after")
    def _whole(self) -> CorpusParams:
        if sum(self.splits.values()) > 1 + 1e-9:
            raise ValueError(f"the shares in `splits` add up to {sum(self.splits.values()):g}, more than 1")
        return self


@dataclass(frozen=True)
class Passage:
    """A run of consecutive paragraphs of one document, or a conversation."""

    name: str
    text: str
    messages: tuple[rows.Message, ...] = ()

    def line(self) -> str:
        """Its line of a split."""
        if not self.messages:
            return json.dumps({"id": self.name, "text": self.text}, ensure_ascii=False)
        return json.dumps({"id": self.name, "messages": [asdict(said) for said in self.messages]}, ensure_ascii=False)


def pin(params: CorpusParams, pins: Pins, progress: Progress) -> CorpusParams:
    """Resolve the source to the digest of its text.

    Raises:
        StageError: there is no text, or not the one whose digest was asked for.
    """
    if params.source in texts.GENERATED:
        digest, exact, downloads = texts.digest_of_documents(texts.generated(params.source)), params.source, ""
    else:
        found = pin_source(params.source, TEXT, texts.digest_of_files, pins, progress)
        digest, exact, downloads = found.digest, found.exact, found.downloads
    if params.digest not in ("", digest):
        raise changed_source(params.source, digest, params.digest)
    return params.model_copy(update={"digest": digest, "exact": exact, "downloads": downloads})


def run(params: CorpusParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Write one `<split>.jsonl` a split and corpus.json."""
    documents, nulls, digest = _read(params, output, progress)
    if params.digest and digest != params.digest:
        raise changed_source(params.source, digest, params.digest)
    progress.advanced(1, 3)
    kept, removed = _without_duplicates(documents, params)
    progress.advanced(2, 3)
    passages = list(_passages(kept, params.passage_characters))
    if not passages:
        raise StageError("the corpus is empty", measured="0 paragraphs", limit=1, remedy="Give a source with text.")
    dealt = _dealt(passages, params.splits)
    _check_dealt(dealt, len(passages), params)
    counts = {}
    for split, share in dealt.items():
        text = "".join(f"{passage.line()}\n" for passage in share)
        (output / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        counts[split] = {
            "passages": len(share),
            "characters": sum(len(p.text) for p in share),
            "conversations": sum(bool(p.messages) for p in share),
        }
    progress.advanced(3, 3)
    record = {
        "digest": digest,
        "duplicates_removed": removed,
        "nulls_skipped": nulls,
        "control_tokens": params.control_tokens,
        "splits": counts,
    }
    (output / "corpus.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return {
        "passages": sum(count["passages"] for count in counts.values()),
        "characters": sum(count["characters"] for count in counts.values()),
        "duplicates_removed": removed,
        "nulls_skipped": nulls,
    }


def _read(params: CorpusParams, output: Path, progress: Progress) -> tuple[list[texts.Document], int, str]:
    """The documents, how many rows are null, and the digest of the source."""
    if params.source in texts.GENERATED:
        documents = texts.generated(params.source)
        return documents, 0, texts.digest_of_documents(documents)
    path = open_source(params.exact or params.source, TEXT, params.downloads, output / PARTIAL, progress)
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


def _without_duplicates(
    documents: Iterable[texts.Document], params: CorpusParams
) -> tuple[dict[str, list[texts.Paragraph]], int]:
    """Each document's paragraphs that stand nowhere earlier, and how many were left out."""
    longest = _LONGEST * params.passage_characters
    passages = [(d.name, part) for d in documents for part in texts.parts(d, longest)]
    seen: set[tuple[str, ...]] = set()
    fresh, shingles = [], []
    for name, part in passages:
        words = tuple(part.compared.lower().split())
        if words not in seen:
            seen.add(words)
            fresh.append((name, part))
            shingles.append(_shingles(words))
    kept: dict[str, list[texts.Paragraph]] = {}
    keep = first_of_each(shingles, params.near_duplicate)
    for (name, part), alone in zip(fresh, keep, strict=True):
        if alone:
            kept.setdefault(name, []).append(part)
    return kept, len(passages) - sum(keep)


def _shingles(words: tuple[str, ...]) -> frozenset[tuple[str, ...]]:
    if len(words) < SHORT_WORDS:
        return frozenset()
    return frozenset(words[i : i + _SHINGLE_WORDS] for i in range(len(words) - _SHINGLE_WORDS + 1))


def _passages(documents: Mapping[str, list[texts.Paragraph]], characters: int) -> Iterator[Passage]:
    for name, parts in documents.items():
        if parts[0].messages:
            yield Passage(f"{name}#0", parts[0].text, parts[0].messages)
            continue
        number, text = 0, ""
        for part in parts:
            if text and len(text) + len(part.text) > characters:
                yield Passage(f"{name}#{number}", text)
                number, text = number + 1, ""
            text += (part.glue if text else "") + part.text
        yield Passage(f"{name}#{number}", text)


def _dealt(passages: list[Passage], splits: Mapping[Split, float]) -> dict[str, list[Passage]]:
    """Each passage to the split that lags its share of the characters most: every share is met within a passage."""
    shares: dict[str, float] = {str(name): share for name, share in splits.items()}
    rest = 1 - sum(shares.values())
    if rest > 1e-9:
        shares[""] = rest
    dealt: dict[str, list[Passage]] = {name: [] for name in shares}
    got = dict.fromkeys(shares, 0)
    total = 0
    for passage in passages:
        total += len(passage.text)
        behind = max(shares, key=lambda name: shares[name] * total - got[name])
        dealt[behind].append(passage)
        got[behind] += len(passage.text)
    dealt.pop("", None)
    return dealt


def _check_dealt(dealt: Mapping[str, list[Passage]], passages: int, params: CorpusParams) -> None:
    empty = [name for name, share in dealt.items() if not share]
    if empty:
        raise StageError(
            f"the corpus is too small for its splits: nothing is left for {', '.join(empty)}",
            measured=f"{passages} passages",
            limit=f"about {round(1 / min(params.splits.values()))} of {params.passage_characters} characters",
            remedy="Use more text, larger shares or a smaller passage_characters.",
        )


def admit(params: CorpusParams, known: Mapping[str, Any]) -> frozenset[str]:
    """The splits that the corpus will have."""
    return frozenset(params.splits)


CORPUS = Stage(
    name="corpus",
    params=CorpusParams,
    inputs={},
    output=Kind.CORPUS,
    image=Image.BASE,
    run=run,
    pin=pin,
    admit=admit,
)
