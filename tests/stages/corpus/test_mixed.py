"""corpus: several sources in one, by share in every split."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flows.recipe.read import load_recipe
from stages.adapters.connect import pins
from stages.corpus.params import CorpusParams
from stages.corpus.stage import CORPUS, pin
from stages.runtime.artifacts import Store
from stages.runtime.contract import StageError
from stages.runtime.execute import execute, work_of
from stages.runtime.progress import Silent
from tests.conftest import Seal
from tests.stages.corpus.test_stage import HALVES, SPLITS, normal, prose, read
from tests.stages.models.text.test_windows import Heard

SELF = {"source": "model://self", "share": 0.25, "samples": 60, "sample_tokens": 40}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Two texts: a.txt, and rows in b.jsonl of which two are paragraphs of the first and one recurs."""
    first, second = prose(31, 150), prose(32, 60)
    (tmp_path / "a.txt").write_text(first)
    rows = [*second.split("\n\n"), first.split("\n\n")[3], first.split("\n\n")[90].upper(), second.split("\n\n")[0]]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"body": row}) for row in rows))
    return tmp_path


def mixed(folder: Path, *shares: float, **more: Any) -> dict[str, Any]:
    a = {"source": str(folder / "a.txt"), "share": shares[0]}
    b = {"source": str(folder / "b.jsonl"), "share": shares[1], "column": "body"}
    return {"sources": [a, b, *more.pop("and_", [])], "splits": SPLITS, "passage_characters": 300} | more


def sizes(lines: list[dict[str, Any]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for line in lines:
        found[line["source"]] += len(line.get("text") or "\n\n".join(one["content"] for one in line["messages"]))
    return found


def test_every_split_has_its_share_of_each_source_and_every_passage_its_name(
    seal: Seal, store: Store, written: Path
) -> None:
    outcome = seal("corpus", mixed(written, 0.6, 0.4))
    splits = read(store, outcome.identity)
    longest = max(len(line["text"]) for lines in splits.values() for line in lines)
    whole = sum((sizes(lines) for lines in splits.values()), Counter())
    total = sum(whole.values())
    # The second is too short for its share of the first, and gives all that stands in it alone.
    assert abs(whole["b"] - len(prose(32, 60).replace("\n", ""))) < 50
    for split, lines in splits.items():
        for name, share in (("a", 0.6), ("b", 0.4)):
            assert abs(sizes(lines)[name] - share * SPLITS[split] * total) <= longest
    ids = [line["id"] for lines in splits.values() for line in lines]
    assert len(ids) == len(set(ids)) and all(one.startswith(("a/#", "b/")) for one in ids)


def test_no_paragraph_stands_in_two_sources_or_in_two_splits(seal: Seal, store: Store, written: Path) -> None:
    outcome = seal("corpus", mixed(written, 0.7, 0.3))
    splits = read(store, outcome.identity)
    where = Counter(part for lines in splits.values() for line in lines for part in normal(line["text"]))
    assert max(where.values()) == 1
    assert outcome.manifest.metrics["duplicates_removed"] == 3
    first = {part for part in normal(prose(31, 150))}
    assert all(
        part not in first
        for lines in splits.values()
        for line in lines
        if line["source"] == "b"
        for part in normal(line["text"])
    )


def test_record_names_sources_shares_and_characters(seal: Seal, store: Store, written: Path) -> None:
    outcome = seal("corpus", mixed(written, 0.5, 0.5))
    record = json.loads((store.checkout(outcome.identity) / "corpus.json").read_text())
    splits = read(store, outcome.identity)
    assert {name: one["share"] for name, one in record["sources"].items()} == {"a": 0.5, "b": 0.5}
    for name, one in record["sources"].items():
        assert one["characters"] == {split: sizes(lines)[name] for split, lines in splits.items()}
    pinned = outcome.manifest.work.params["sources"]
    assert [one["digest"] for one in pinned] == [record["sources"][name]["digest"] for name in "ab"]
    assert record["digest"] not in {one["digest"] for one in pinned}


def test_source_that_is_too_short_for_its_share_is_said(store: Store, written: Path) -> None:
    heard = Heard()
    for shares, said in (((0.5, 0.5), ["a", "b", "0.5"]), ((0.95, 0.05), ["b", "a", "0.95"])):
        params = pin(CorpusParams.model_validate(mixed(written, *shares)), pins(store), Silent())
        heard.said.clear()
        execute(CORPUS, params, work_of(CORPUS, params, {}), store, heard)
        pattern = r"characters of source (\w) are left out: source (\w) is too short for its share of ([\d.]+)"
        found = [re.search(pattern, one) for one in heard.said]
        assert [list(one.groups()) for one in found if one] == [said]


def test_source_of_which_nothing_is_left_is_refused(seal: Seal, store: Store, written: Path) -> None:
    (written / "c.txt").write_text(prose(31, 150).split("\n\n")[5])
    copied = {"source": str(written / "c.txt"), "share": 0.2}
    with pytest.raises(StageError, match="source c has no text of its own"):
        seal("corpus", mixed(written, 0.4, 0.4, and_=[copied]))
    (written / "c.txt").write_text(prose(33, 3))
    with pytest.raises(StageError, match=r"source c is too small for its splits: nothing is left for"):
        seal("corpus", mixed(written, 0.4, 0.4, and_=[copied]))
    # A conversation is of one piece, however long it is beside the others.
    said = [{"messages": [{"role": "user", "content": "Say it. " * 9000}]}]
    (written / "d.jsonl").write_text(json.dumps(said[0]))
    talk = {"source": str(written / "d.jsonl"), "share": 0.2}
    with pytest.raises(StageError, match=r"source d is too small for its splits: .* measured 1 passages"):
        seal("corpus", mixed(written, 0.4, 0.4, and_=[talk]))
    assert list(store.manifests()) == []


def test_same_texts_elsewhere_are_the_same_mix_and_changed_ones_another(seal: Seal, written: Path) -> None:
    first = seal("corpus", mixed(written, 0.6, 0.4))
    (written / "other").mkdir()
    for name in ("a.txt", "b.jsonl"):
        (written / "other" / name).write_bytes((written / name).read_bytes())
    moved = seal("corpus", mixed(written / "other", 0.6, 0.4))
    assert moved.cached and moved.identity == first.identity
    changed = [mixed(written, 0.5, 0.5), mixed(written, 0.6, 0.4, seed=1)]
    changed[1]["sources"][0]["name"] = "prose"
    (written / "other" / "a.txt").write_text(prose(34, 150))
    changed.append(mixed(written / "other", 0.6, 0.4))
    assert len({first.identity, *(seal("corpus", one).identity for one in changed)}) == 4


def test_text_of_one_source_that_changed_after_it_was_pinned_is_refused(store: Store, written: Path) -> None:
    params = pin(CorpusParams.model_validate(mixed(written, 0.6, 0.4)), pins(store), Silent())
    (written / "a.txt").write_text(prose(35, 150))
    with pytest.raises(StageError, match=r"a\.txt is not what it was"):
        execute(CORPUS, params, work_of(CORPUS, params, {}), store, Silent())


def test_what_is_said_of_all_sources_holds_for_each_that_says_nothing_else() -> None:
    said = {"column": "body", "splits": HALVES}
    sources = [{"source": "a", "share": 0.5}, {"source": "b", "share": 0.5, "column": "text"}]
    made = CorpusParams.model_validate(said | {"sources": sources})
    assert [one.column for one in made.sources] == ["body", "text"]
    assert CorpusParams.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"source": "a", "sources": [{"source": "b", "share": 1}]}, "either `source` or `sources`"),
        ({}, "either `source` or `sources`"),
        ({"sources": [{"source": "a", "share": 0.5}, {"source": "b", "share": 0.4}]}, "add up to 0.9, not to 1"),
        ({"sources": [{"source": "x/a.txt", "share": 0.5}, {"source": "y/a.md", "share": 0.5}]}, "are called a:"),
        ({"sources": [{"share": 1}]}, "has no `source`"),
        ({"sources": [{"source": "a"}]}, "share"),
        ({"sources": [{"source": "a", "share": 1, "name": "a b"}]}, "name"),
        ({"sources": [{"source": "a", "share": 1}], "digest": "0"}, "`digest` is said of each"),
    ],
)
def test_sources_that_cannot_be_are_refused(said: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        CorpusParams.model_validate(said | {"splits": HALVES})


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("pydoc://topics", "topics"),
        ("model://self", "self"),
        ("./my/Book 1.jsonl.gz", "Book-1"),
        ("hf://owner/set@main/data", "data"),
        ("file:///x/texts/", "texts"),
    ],
)
def test_source_is_called_by_what_it_ends_with(source: str, name: str) -> None:
    made = CorpusParams.model_validate({"sources": [{"source": source, "share": 1}], "splits": HALVES})
    assert made.sources[0].name == name


def test_model_s_own_text_is_mixed_with_others(seal: Seal, store: Store, written: Path, tiny: Path) -> None:
    dense = seal("fetch", {"source": tiny.as_uri()})
    params = mixed(written, 0.5, 0.25, and_=[SELF], splits=HALVES)
    outcome = seal("corpus", params, model=dense.identity)
    lines = [line for some in read(store, outcome.identity).values() for line in some]
    assert Counter(line["source"] for line in lines).keys() == {"a", "b", "self"}
    assert all(line.get("begins", False) == (line["source"] == "self") for line in lines)
    record = json.loads((store.checkout(outcome.identity) / "corpus.json").read_text())
    assert record["sources"]["self"]["written"]["samples"] == 60
    assert "written" not in record["sources"]["a"]
    whole = sum((sizes(some) for some in read(store, outcome.identity).values()), Counter())
    assert whole["self"] / sum(whole.values()) == pytest.approx(0.25, abs=0.02)


def test_sources_of_a_recipe_are_found_beside_it(written: Path) -> None:
    recipe = {
        "recipe": 1,
        "name": "mix",
        "steps": [
            {
                "name": "text",
                "stage": "corpus",
                "params": {
                    "sources": [{"source": "a.txt", "share": 0.5}, {"source": "pydoc://topics", "share": 0.5}],
                    "splits": HALVES,
                },
            }
        ],
    }
    (written / "mix.yaml").write_text(json.dumps(recipe))
    read_ = load_recipe(written / "mix.yaml")
    sources = [one["source"] for one in read_.step("text").params["sources"]]
    assert sources == [(written / "a.txt").as_uri(), "pydoc://topics"]
