"""What a recipe may say of corpus. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from stages.runtime import rows
from stages.runtime.contract import Location, Params

SELF = "model://self"
"""The source that is the model's own writing."""
SHARES_TOLERANCE = 0.005
"""How far the shares of several sources may be from 1: thirds are written as 0.33."""

Split = Literal["calibrate", "train", "validate", "test"]
Share = Annotated[float, Field(gt=0, le=1)]


class SourceParams(Params):
    """Where text comes from.

    Attributes:
        source: a .txt, .md, .jsonl, .json or .parquet file, any of them with .gz, or a folder of them: a path, hf://,
            s3://, pypi://, pydoc://topics or descriptions://constraints; or model://self: the input `model` writes it.
        digest: what its content must be; by default what it is when the run is planned.
        column: of .jsonl, .json and .parquet: where a text, a list of texts or a conversation stands; `a.b` is a path.
            Rows without `text` are read by `messages`, `conversations`, or a prompt and its answer.
        nulls: what becomes of rows that have nothing there.
        samples: of model://self: texts to write: as many as texts begin, behind a drawn word of the vocabulary, and as
            conversations where the model has a chat template.
        sample_tokens: of model://self: tokens of a text, with what it begins with, at most.
        temperature: of model://self: softens what the model says.
        nucleus: of model://self: share of each distribution that the likeliest tokens make up of which one is drawn.
        seed: of model://self.
    """

    source: str = Location("")
    digest: str = ""
    column: str = rows.TEXT
    nulls: Literal["refuse", "skip"] = "refuse"
    samples: int = Field(384, ge=1)
    sample_tokens: int = Field(128, ge=8)
    temperature: float = Field(1.0, gt=0)
    nucleus: float = Field(0.95, ge=0.05, le=1)
    seed: int = Field(0, ge=0)
    exact: str = Location("", pinned=True)
    downloads: str = Location("", pinned=True)

    @property
    def writes(self) -> bool:
        """Whether a model writes this text."""
        return self.source == SELF


_ALIKE = frozenset(SourceParams.model_fields) - {"source", "digest", "exact", "downloads"}
"""What a step may say of all its sources at once."""


class MixedParams(SourceParams):
    """One of several sources.

    Attributes:
        share: of the characters of every split.
        name: of its passages, and of the slice that is measured; by default what `source` ends with.
    """

    share: Share
    name: str = Field("", pattern=r"^[\w.-]*$")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("name") and isinstance(data.get("source"), str):
            return {**data, "name": _name_of(data["source"])}
        return data

    @model_validator(mode="after")
    def _somewhere(self) -> MixedParams:
        if not self.source:
            raise ValueError("one of `sources` has no `source`")
        return self


class CorpusParams(SourceParams):
    """Where the text comes from and how it is split.

    Attributes:
        sources: several in place of `source`, each with its `share` of the characters; what is said beside them of all
            holds for each that says nothing else. Passages keep their source's name.
        splits: split -> its share of the text; no paragraph stands in two.
        control_tokens: words that look like a tokenizer's control tokens stay text, or are parsed as control tokens.
        passage_characters: length of the passages that are dealt to the splits.
        near_duplicate: share of common word runs from which on two passages are one; 1 takes equal ones only.
    """

    sources: list[MixedParams] = Field([])
    splits: dict[Split, Share] = Field(min_length=1)
    control_tokens: Literal["text", "parse"] = "text"
    passage_characters: int = Field(2000, ge=100)
    near_duplicate: float = Field(0.8, gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _alike(cls, data: Any) -> Any:
        several = data.get("sources") if isinstance(data, dict) else None
        if not isinstance(several, list):
            return data
        common = {name: data[name] for name in _ALIKE if name in data}
        return {**data, "sources": [{**common, **one} if isinstance(one, dict) else one for one in several]}

    @field_validator("splits")
    @classmethod
    def _ordered(cls, splits: dict[Split, Share]) -> dict[Split, Share]:
        # Equal mappings are one work, in whatever order a recipe or JSON lists them; dealing goes by this order.
        return {name: splits[name] for name in get_args(Split) if name in splits}

    @model_validator(mode="after")
    def _whole(self) -> CorpusParams:
        if sum(self.splits.values()) > 1 + 1e-9:
            raise ValueError(f"the shares in `splits` add up to {sum(self.splits.values()):g}, more than 1")
        if bool(self.source) == bool(self.sources):
            raise ValueError("a corpus has either `source` or `sources`")
        if self.sources and self.digest:
            raise ValueError("`digest` is said of each of `sources`, not of all")
        names = [one.name for one in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two of `sources` are called {twice[0]}: give each a `name`")
        total = sum(one.share for one in self.sources)
        if self.sources and abs(total - 1) > SHARES_TOLERANCE:
            raise ValueError(f"the shares in `sources` add up to {total:g}, not to 1")
        return self

    @property
    def each(self) -> Sequence[SourceParams]:
        """Every source."""
        return self.sources or [self]

    @property
    def writes(self) -> bool:
        """Whether a model writes some of the text."""
        return any(one.source == SELF for one in self.each)


def _name_of(source: str) -> str:
    """pydoc://topics -> topics, model://self -> self, ./my/Book 1.jsonl.gz -> Book-1."""
    last = PurePosixPath(source.partition("://")[2] or source).name
    return re.sub(r"[^\w.-]+", "-", re.sub(r"(\.[a-z]+)?(\.gz)?$", "", last, flags=re.IGNORECASE)) or "text"
