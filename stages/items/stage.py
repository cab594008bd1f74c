"""Bring a set of items: what a model is asked and what is right, split into `validate` and `test`.

Nothing calibrates or trains on it: it has no split for that, and where text is expected it is refused.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from stages.adapters.lm_eval_harness import folder as harness_folder
from stages.adapters.sources import Wanted, changed_source, local_path, open_source, pin_source, scheme_of
from stages.items import reading
from stages.items.abilities.shipped import shipped
from stages.measures.items import HARNESS, Item, ItemSplits
from stages.measures.items import ITEMS as RECORD
from stages.measures.items import Kind as Task
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
from stages.runtime.fingerprint import canonical, digest_bytes

ABILITIES = "abilities://"
WANTED = Wanted("items", reading.PATTERNS, reading.REMEDY)

Split = Literal["validate", "test"]
Share = Annotated[float, Field(gt=0, le=1)]


class ItemsParams(Params):
    """Where the items lie, what their columns are called, and how they are split.

    Attributes:
        source: abilities://, the set that ships, or a .jsonl, .csv or .parquet file, any of them with .gz, or a folder
            of them: a path, hf://, s3:// or pypi://.
        digest: what its content must be; by default what it is when the run is planned.
        harness: the name of a task of lm-evaluation-harness, which lies as NAME.yaml with its data in the folder that
            `source` is; of the fields below it has none.
        columns: a field of an item (id, ability, language, task, prompt, answers, match, choices, right, checks,
            context, words, labels, other, score) -> the column where it stands; `a.b` is a path, and an empty name is
            no column. By default one of the field's name.
        task: of rows that name none.
        ability: of rows that name none; by default the source's name.
        language: of rows that name none.
        match: of rows that name none.
        spaced: a space is put between a prompt and its choices where neither brings one, but not in scripts without
            spaces, behind what opens or before what closes; false takes them as they stand, as for the rest of a word.
        splits: split -> its share of each ability's items; by default all are of `test`. Those of abilities:// are
            fixed: every third item is of `test`, the others of `validate`.
        abilities: take these alone; empty for all.
    """

    source: str = Location()
    digest: str = ""
    harness: str = Field("", pattern=r"^[A-Za-z0-9_.-]*$")
    columns: dict[reading.Column, str] = Field({})
    task: Task = "answers"
    ability: str = ""
    language: Literal["en", "zh"] = "en"
    match: Literal["exact", "contains", "numeric"] = "exact"
    spaced: bool = True
    splits: dict[Split, Share] = Field({}, validate_default=True)
    abilities: tuple[str, ...] = ()
    exact: str = Location("", pinned=True)
    downloads: str = Location("", pinned=True)

    @field_validator("splits")
    @classmethod
    def _ordered(cls, splits: dict[Split, Share], info: ValidationInfo) -> dict[Split, Share]:
        # Equal mappings are one work, in whatever order a recipe or JSON lists them; dealing goes by this order.
        if not splits and info.data.get("source") != ABILITIES:
            return {"test": 1.0}
        return {name: splits[name] for name in get_args(Split) if name in splits}

    @field_validator("abilities")
    @classmethod
    def _sorted(cls, abilities: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted({*abilities}))

    @model_validator(mode="after")
    def _whole(self) -> ItemsParams:
        if self.source == ABILITIES and (self.splits or self.columns or self.ability):
            raise ValueError(f"{ABILITIES} has splits, columns and abilities of its own: leave them out")
        if self.harness and (self.source == ABILITIES or self.columns or self.ability or self.abilities):
            raise ValueError("a task of lm-evaluation-harness has columns and abilities of its own: leave them out")
        if not self.spaced and (self.source == ABILITIES or self.harness):
            raise ValueError("`spaced` is of files of one's own: leave it out")
        if self.harness and self.splits != {"test": 1.0}:
            raise ValueError("a task of lm-evaluation-harness is all of the split test: leave `splits` out")
        if sum(self.splits.values()) > 1 + 1e-9:
            raise ValueError(f"the shares in `splits` add up to {sum(self.splits.values()):g}, more than 1")
        return self


def pin(params: ItemsParams, pins: Pins, progress: Progress) -> ItemsParams:
    """Resolve the source to the digest of its items.

    Rows that lie here are read, so that one that is no item is told before any work.

    Raises:
        StageError: there are none, one that is no item, or not those whose digest was asked for.
    """
    if params.source == ABILITIES:
        digest, exact, downloads, ability = _digest_of(shipped()), params.source, "", ""
    elif params.harness:
        found = pin_source(params.source, harness_folder.WANTED, harness_folder.digest_of_task, pins, progress)
        digest, exact, downloads, ability = found.digest, found.exact, found.downloads, ""
    else:
        found = pin_source(params.source, WANTED, reading.digest_of_files, pins, progress)
        digest, exact, downloads = found.digest, found.exact, found.downloads
        # It is written into the items, so that it is a part of what they are, wherever they lie.
        ability = params.ability or _name_of(params.source)
        if scheme_of(params.source) == "file":
            _read(params, local_path(params.source))
    if params.digest not in ("", digest):
        raise changed_source(params.source, digest, params.digest)
    return params.model_copy(update={"digest": digest, "exact": exact, "downloads": downloads, "ability": ability})


def _digest_of(items: Mapping[str, Sequence[Item]]) -> str:
    return digest_bytes(canonical({split: [one.model_dump(mode="json") for one in of] for split, of in items.items()}))


def _name_of(source: str) -> str:
    """`questions` for hf://owner/data@1234/questions.jsonl.gz, `data` for hf://owner/data@1234."""
    own = PurePosixPath(source.rstrip("/")).name.partition("@")[0]
    return own.partition(".")[0] or own or "items"


def run(params: ItemsParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Write one `<split>.jsonl` a split and corpus.json; of a task of lm-evaluation-harness its files."""
    if params.harness:
        return _task(params, output, progress)
    dealt, digest = _dealt(params, output, progress)
    if params.digest and digest != params.digest:
        raise changed_source(params.source, digest, params.digest)
    progress.advanced(1, 2)
    every = [item for items in dealt.values() for item in items]
    _check_abilities(params, {item.ability for item in every})
    taken = {
        split: [item for item in items if not params.abilities or item.ability in params.abilities]
        for split, items in dealt.items()
    }
    _check_dealt(taken, params)
    for split, items in taken.items():
        text = "".join(f"{item.model_dump_json()}\n" for item in items)
        (output / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")
    record = _record(taken, digest) | ({"shipped": True} if params.source == ABILITIES else {})
    (output / "corpus.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    progress.advanced(2, 2)
    return {"items": float(sum(map(len, taken.values()))), "abilities": float(len(record["abilities"]))}


def _task(params: ItemsParams, output: Path, progress: Progress) -> Metrics:
    wanted = harness_folder.WANTED
    path = open_source(params.exact or params.source, wanted, params.downloads, output / PARTIAL, progress)
    digest = harness_folder.digest_of_task(path)
    if params.digest and digest != params.digest:
        raise changed_source(params.source, digest, params.digest)
    said = harness_folder.copied_task(path, params.harness, output / HARNESS)
    record = {"digest": digest, RECORD: {HARNESS: 1}, HARNESS: said, "abilities": {}, "splits": {"test": {}}}
    (output / "corpus.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    # Its items are the harness's: whoever looks for ours finds none.
    (output / "test.jsonl").write_text("")
    progress.advanced(2, 2)
    return {"files": float(sum(one.is_file() for one in (output / HARNESS).rglob("*")))}


def _dealt(params: ItemsParams, output: Path, progress: Progress) -> tuple[dict[str, list[Item]], str]:
    """The items by split, and the digest of the source."""
    if params.source == ABILITIES:
        return {split: list(items) for split, items in shipped().items()}, _digest_of(shipped())
    path = open_source(params.exact or params.source, WANTED, params.downloads, output / PARTIAL, progress)
    return _by_share(_read(params, path), params.splits), reading.digest_of_files(path)


def _read(params: ItemsParams, path: Path) -> list[Item]:
    defaults: dict[str, str] = {"task": params.task, "language": params.language, "match": params.match}
    defaults["ability"] = params.ability or _name_of(params.source)
    return reading.items_of(path, params.columns, defaults, spaced=params.spaced)


def _by_share(items: Sequence[Item], splits: Mapping[Split, float]) -> dict[str, list[Item]]:
    """Each item to the split that lags its share of the item's ability most."""
    shares: dict[str, float] = {str(name): share for name, share in splits.items()}
    if (rest := 1 - sum(shares.values())) > 1e-9:
        shares[""] = rest
    dealt: dict[str, list[Item]] = {name: [] for name in shares}
    got: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        mine = got[item.ability]
        total = mine.total() + 1
        behind = max(shares, key=lambda name: shares[name] * total - mine[name])
        dealt[behind].append(item)
        mine[behind] += 1
    dealt.pop("", None)
    return dealt


def _record(taken: Mapping[str, Sequence[Item]], digest: str) -> dict[str, Any]:
    every = [(split, item) for split, items in taken.items() for item in items]
    abilities: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for split, item in every:
        abilities[item.ability][split] += 1
    return {
        "digest": digest,
        RECORD: dict(Counter(item.task for _, item in every)),
        "abilities": {name: {split: counts[split] for split in taken} for name, counts in abilities.items()},
        "splits": {split: {"items": len(items)} for split, items in taken.items()},
    }


def _check_abilities(params: ItemsParams, have: set[str]) -> None:
    if unknown := sorted({*params.abilities} - have):
        raise StageError(
            f"{params.source} has no ability {', '.join(map(repr, unknown))}",
            limit=", ".join(sorted(have)),
            remedy="Name some of these in `abilities`, or leave it out to take all.",
        )


def _check_dealt(dealt: Mapping[str, Sequence[Item]], params: ItemsParams) -> None:
    if empty := [split for split, items in dealt.items() if not items]:
        raise StageError(
            f"there are too few items for the splits: nothing is left for {', '.join(empty)}",
            measured=f"{sum(map(len, dealt.values()))} items",
            remedy="Give more items, larger shares in `splits`, or fewer splits.",
        )


def admit(params: ItemsParams, known: Mapping[str, Any]) -> ItemSplits:
    """The splits that the set will have.

    Raises:
        StageError: the set that ships has no ability of a name that is asked for.
    """
    if params.source != ABILITIES:
        found = ItemSplits(params.splits)
        found.tasks = frozenset({HARNESS}) if params.harness else _tasks(params, known.get(""))
        return found
    _check_abilities(params, {item.ability for items in shipped().values() for item in items})
    found = ItemSplits(get_args(Split))
    found.tasks = frozenset(item.task for items in shipped().values() for item in items)
    return found


def _tasks(params: ItemsParams, sealed: Path | None) -> frozenset[str]:
    """Those of items that are sealed or lie here, empty where that is not known yet."""
    if sealed is not None:
        return frozenset(json.loads((sealed / "corpus.json").read_text(encoding="utf-8"))[RECORD])
    if not params.digest or scheme_of(params.source) != "file":
        return frozenset()
    return frozenset(item.task for item in _read(params, local_path(params.source)))


ITEMS = Stage(
    name="items",
    params=ItemsParams,
    inputs={},
    output=Kind.CORPUS,
    image=Image.BASE,
    run=run,
    pin=pin,
    admit=admit,
)
