"""corpus: splits that share no paragraph, by the shares asked, from every kind of source."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from stages.adapters import texts
from stages.adapters.connect import pins
from stages.corpus.dealing import Source, _without_duplicates
from stages.corpus.params import CorpusParams
from stages.corpus.stage import pin
from stages.runtime.artifacts import Store
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.conftest import Seal
from tests.stages.adapters.wheels import make_wheel, only_wheels_of

SPLITS = {"calibrate": 0.1, "train": 0.7, "validate": 0.1, "test": 0.1}
HALVES = {"validate": 0.5, "test": 0.5}


def read(store: Store, identity: str) -> dict[str, list[dict[str, Any]]]:
    folder = store.checkout(identity)
    lines = {p.stem: p.read_text(encoding="utf-8").split("\n") for p in sorted(folder.glob("*.jsonl"))}
    return {split: [json.loads(line) for line in found if line] for split, found in lines.items()}


def normal(text: str) -> list[str]:
    """The paragraphs of a text, with neither case nor white space: written apart from the stage's own way."""
    parts = [" ".join(part.lower().split()) for part in re.split(r"\n\s*\n", text)]
    return [part for part in parts if part]


def prose(seed: int, paragraphs: int, words: int = 30) -> str:
    made = random.Random(seed)
    vocabulary = ["".join(made.choices("abcdefghij", k=6)) for _ in range(400)]
    return "\n\n".join(" ".join(made.choices(vocabulary, k=words)) for _ in range(paragraphs))


def triples(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def test_reference_prose_is_split_by_share_and_no_paragraph_stands_twice(shared_store: Store, topics: str) -> None:
    splits = read(shared_store, topics)
    where = Counter(part for lines in splits.values() for line in lines for part in normal(line["text"]))
    assert max(where.values()) == 1
    sizes = {name: sum(len(line["text"]) for line in lines) for name, lines in splits.items()}
    total = sum(sizes.values())
    longest = max(len(line["text"]) for lines in splits.values() for line in lines)
    for name, share in SPLITS.items():
        assert abs(sizes[name] - share * total) <= longest
    assert 0.75 < total / 465_000 < 1, "most of the text is kept"
    long = [(triples(part), name) for name, lines in splits.items() for line in lines for part in normal(line["text"])]
    long = [(found, name) for found, name in long if len(found) >= 30][:300]
    assert {name for _, name in long} >= {"calibrate", "test", "train"}
    assert all(len(a & b) < 0.8 * len(a | b) for i, (a, s) in enumerate(long) for b, t in long[:i] if s != t)


def test_manifest_and_record_count_what_was_written(shared_store: Store, topics: str) -> None:
    splits = read(shared_store, topics)
    record = json.loads((shared_store.checkout(topics) / "corpus.json").read_text())
    manifest = shared_store.manifest(topics)
    assert manifest is not None
    lines = [line for split in splits.values() for line in split]
    assert manifest.metrics["passages"] == len(lines) == len({line["id"] for line in lines})
    assert manifest.metrics["characters"] == sum(len(line["text"]) for line in lines)
    assert {name: c["passages"] for name, c in record["splits"].items()} == {n: len(s) for n, s in splits.items()}
    assert record["digest"] == manifest.work.params["digest"]
    median = sorted(len(line["text"]) for line in lines)[len(lines) // 2]
    assert 1000 < median <= 2000


def test_near_duplicate_of_another_document_is_left_out(seal: Seal, store: Store, tmp_path: Path) -> None:
    first, second = prose(1, 40), prose(2, 40)
    words = first.split("\n\n")[7].split()
    words[11] = "changed"
    copied = " ".join(words)
    lines = [{"text": first}, {"text": f"{second}\n\n{copied}\n\n{first.split(chr(10) * 2)[3].upper()}"}]
    source = tmp_path / "two.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    outcome = seal("corpus", {"source": str(source), "splits": HALVES, "passage_characters": 300})
    whole = " ".join(line["text"] for lines in read(store, outcome.identity).values() for line in lines)
    assert outcome.manifest.metrics["duplicates_removed"] == 2
    assert copied not in whole and " ".join(first.split("\n\n")[7].split()) in whole


def hanzi(seed: int, paragraphs: int) -> list[str]:
    """Chinese of made-up sentences: no space between words, none between sentences."""
    made = random.Random(seed)
    return [
        "".join("".join(chr(made.randrange(0x4E00, 0x4F00)) for _ in range(19)) + "。" for _ in range(4))
        for _ in range(paragraphs)
    ]


def test_near_duplicate_without_spaces_between_words_is_left_out(seal: Seal, store: Store, tmp_path: Path) -> None:
    parts = hanzi(1, 40)
    copied = parts[7][:30] + "变" + parts[7][31:]
    (tmp_path / "a.txt").write_text("\n\n".join([*parts, copied]))
    outcome = seal("corpus", {"source": str(tmp_path / "a.txt"), "splits": HALVES, "passage_characters": 200})
    whole = "".join(line["text"] for lines in read(store, outcome.identity).values() for line in lines)
    assert outcome.manifest.metrics["duplicates_removed"] == 1 and copied not in whole and parts[7] in whole


def test_near_duplicates_are_found_in_little_more_memory_than_the_text_takes() -> None:
    made = random.Random(3)
    vocabulary = ["".join(made.choices("abcdefghij", k=made.randrange(2, 10))) for _ in range(5_000)]
    text = "\n\n".join(" ".join(made.choices(vocabulary, k=90)) for _ in range(900))
    params = CorpusParams(source="pydoc://topics", splits=HALVES)
    tracemalloc.start()
    try:
        _, removed = _without_duplicates([Source("", 1.0, [texts.Document("one", text)], "")], params)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert removed == 0
    assert peak < 20 * len(text)


@pytest.mark.parametrize("text", ["".join(hanzi(2, 300)), "x" * 20_000, "word " * 4_000], ids=["hanzi", "one", "words"])
def test_text_of_one_line_is_dealt_and_nothing_of_it_lost(text: str) -> None:
    parts = list(texts.paragraphs(text, 800))
    assert len(parts) > 20 and max(len(part.text) for part in parts) <= 800
    assert "".join(part.glue + part.text for part in parts).strip() == text.strip()
    if text.startswith(("x", "word")):
        return
    assert {part.text[-1] for part in parts} == {"。"} and {part.glue for part in parts[1:]} == {""}


def test_quote_is_not_parted_from_its_sentence() -> None:
    text = "他说：“好。”她说：“不。”" * 30
    parts = list(texts.paragraphs(text, 50))
    assert [part.text for part in parts] == ["他说：“好。”", "她说：“不。”"] * 30


def test_short_paragraph_that_recurs_is_kept_once(seal: Seal, store: Store, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("\n\n".join(f"{part}\n\nSee  also:" for part in prose(3, 30).split("\n\n")) + "\n\nsee also:")
    outcome = seal("corpus", {"source": str(source), "splits": HALVES, "passage_characters": 200})
    texts_of = [line["text"] for lines in read(store, outcome.identity).values() for line in lines]
    assert sum(text.lower().split().count("also:") for text in texts_of) == 1
    assert outcome.manifest.metrics["duplicates_removed"] == 30


def test_text_without_blank_lines_is_taken_line_by_line(seal: Seal, store: Store, tmp_path: Path) -> None:
    lines = prose(4, 200).split("\n\n")
    (tmp_path / "lines.txt").write_text("\n".join([*lines, lines[5]]))
    (tmp_path / "one.txt").write_text(" ".join(f"{line}." for line in prose(5, 200).split("\n\n")))
    for name, removed in (("lines.txt", 1), ("one.txt", 0)):
        outcome = seal("corpus", {"source": str(tmp_path / name), "splits": HALVES, "passage_characters": 1000})
        assert outcome.manifest.metrics["passages"] > 30
        assert outcome.manifest.metrics["duplicates_removed"] == removed
    dealt = [part for lines_ in read(store, outcome.identity).values() for line in lines_ for part in [line["text"]]]
    assert not any("\n" in text for text in dealt), "sentences of a line stay in a line"


def test_shares_below_one_leave_the_rest_out(seal: Seal, store: Store, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text(prose(6, 400))
    outcome = seal("corpus", {"source": str(source), "splits": {"train": 0.2, "test": 0.1}})
    splits = read(store, outcome.identity)
    got = {name: sum(len(line["text"]) for line in lines) for name, lines in splits.items()}
    assert set(got) == {"train", "test"}
    assert abs(got["train"] / len(prose(6, 400)) - 0.2) < 0.03 and abs(got["test"] / len(prose(6, 400)) - 0.1) < 0.03


def test_same_text_at_two_places_is_one_corpus(seal: Seal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prose(7, 60).encode()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_bytes(data)
    (tmp_path / "two.md").write_bytes(data)
    make_wheel(tmp_path / "wheels", "prose", "1", {"prose/three.txt": data})
    only_wheels_of(tmp_path / "wheels", monkeypatch)
    sources = [str(tmp_path / "a" / "one.txt"), (tmp_path / "two.md").as_uri(), "pypi://prose==1/prose/three.txt"]
    outcomes = [seal("corpus", {"source": source, "splits": HALVES}) for source in sources]
    assert len({outcome.identity for outcome in outcomes}) == 1
    assert [outcome.cached for outcome in outcomes] == [False, True, True]


def test_same_bytes_in_another_format_are_another_corpus(seal: Seal, tmp_path: Path) -> None:
    rows = "\n".join(json.dumps({"text": part}) for part in prose(8, 60).split("\n\n"))
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text(rows)
    params = {"splits": HALVES, "passage_characters": 500}
    one = seal("corpus", {"source": str(tmp_path / "a.txt"), **params})
    two = seal("corpus", {"source": str(tmp_path / "a.jsonl"), **params})
    assert one.identity != two.identity and one.manifest.metrics != two.manifest.metrics


def test_formats_of_the_same_rows_give_the_same_passages(seal: Seal, store: Store, tmp_path: Path) -> None:
    rows = prose(9, 50).split("\n\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": row, "n": 1}) + "\n\n" for row in rows))
    parquet.write_table(pyarrow.table({"body": rows, "n": range(50)}), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps([{"body": row} for row in rows]))
    params = {"splits": HALVES, "column": "body"}
    found = []
    for name in ("a.jsonl", "a.parquet", "a.json"):
        outcome = seal("corpus", {"source": str(tmp_path / name), **params})
        found.append({split: [x["text"] for x in lines] for split, lines in read(store, outcome.identity).items()})
    assert found[0] == found[1] == found[2] and sum(map(len, found[0].values())) == 50


def test_null_rows_are_refused_or_counted_and_left_out(seal: Seal, store: Store, tmp_path: Path) -> None:
    rows = [*prose(9, 50).split("\n\n"), None, None]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"text": row}) for row in rows))
    for name, first in (("a.parquet", "row 51"), ("a.jsonl", "line 101")):
        params = {"source": str(tmp_path / name), "splits": HALVES}
        refused = rf"{re.escape(name)} {first} has null for its text; measured 2 rows of 52 are null.*`nulls` to skip"
        with pytest.raises(StageError, match=refused):
            seal("corpus", params)
        outcome = seal("corpus", {**params, "nulls": "skip"})
        assert outcome.manifest.metrics["nulls_skipped"] == 2 and outcome.manifest.metrics["passages"] == 50
        assert json.loads((store.checkout(outcome.identity) / "corpus.json").read_text())["nulls_skipped"] == 2


def test_conversation_stays_whole_in_one_split_and_stands_once(seal: Seal, store: Store, tmp_path: Path) -> None:
    rules = {"role": "system", "content": prose(20, 3)}
    asked = [
        [rules, {"role": "user", "content": prose(seed, 4)}, {"role": "assistant", "content": prose(seed + 100, 1)}]
        for seed in range(30)
    ]
    rows = [{"messages": said} for said in [*asked, asked[3]]]
    rows += [{"text": part} for part in prose(21, 30).split("\n\n")]
    rows += [{"messages": [{"role": "user", "content": " "}]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    params = {"source": str(tmp_path / "a.jsonl"), "splits": HALVES, "passage_characters": 300}
    outcome = seal("corpus", params)
    splits = read(store, outcome.identity)
    kept = [line["messages"] for lines in splits.values() for line in lines if "messages" in line]
    assert sorted(kept, key=asked.index) == asked, "each whole and once, whatever many have in common"
    assert all(any("messages" in line for line in lines) for lines in splits.values())
    assert sum("text" in line for lines in splits.values() for line in lines) == 30
    record = json.loads((store.checkout(outcome.identity) / "corpus.json").read_text())
    assert sum(split["conversations"] for split in record["splits"].values()) == 30
    assert record["duplicates_removed"] == 1 and record["control_tokens"] == "text"
    said = sum(len("\n\n".join(turn["content"] for turn in turns)) for turns in asked)
    written = sum(len(line["text"]) for lines in splits.values() for line in lines if "text" in line)
    assert outcome.manifest.metrics["characters"] == said + written
    parsed = seal("corpus", {**params, "control_tokens": "parse"})
    assert parsed.identity != outcome.identity
    assert json.loads((store.checkout(parsed.identity) / "corpus.json").read_text())["control_tokens"] == "parse"


def test_folder_is_read_in_order_of_names_and_other_files_do_not_count(seal: Seal, tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder / "inner").mkdir(parents=True)
        (tmp_path / folder / "inner" / "b.md").write_text(prose(10, 30))
        (tmp_path / folder / "a.txt").write_text(prose(11, 30))
    (tmp_path / "y" / "notes.pdf").write_bytes(b"%PDF")
    one = seal("corpus", {"source": str(tmp_path / "x"), "splits": HALVES})
    two = seal("corpus", {"source": str(tmp_path / "y"), "splits": HALVES})
    assert one.identity == two.identity and two.cached
    (tmp_path / "y" / "a.txt").write_text(prose(12, 30))
    assert seal("corpus", {"source": str(tmp_path / "y"), "splits": HALVES}).identity != one.identity


def test_descriptions_of_pinned_libraries_are_a_corpus(seal: Seal, store: Store) -> None:
    outcome = seal("corpus", {"source": "descriptions://constraints", "splits": HALVES})
    names = {line["id"].split("#")[0] for lines in read(store, outcome.identity).values() for line in lines}
    assert {"numpy", "pydantic"} <= names and outcome.manifest.metrics["characters"] > 300_000


def test_forced_run_reproduces_every_byte(seal: Seal, store: Store) -> None:
    from stages.corpus.stage import CORPUS
    from stages.runtime.execute import execute, work_of

    params = pin(CorpusParams(source="pydoc://topics", splits=SPLITS), pins(store), Silent())
    work = work_of(CORPUS, params, {})
    first = execute(CORPUS, params, work, store, Silent())
    second = execute(CORPUS, params, work, store, Silent(), force=True)
    assert not second.changed and second.manifest.files == first.manifest.files


def test_text_that_changed_after_it_was_pinned_is_refused(store: Store, tmp_path: Path) -> None:
    from stages.corpus.stage import CORPUS
    from stages.runtime.execute import execute, work_of

    source = tmp_path / "a.txt"
    source.write_text(prose(13, 60))
    params = pin(CorpusParams(source=str(source), splits=HALVES), pins(store), Silent())
    source.write_text(prose(14, 60))
    with pytest.raises(StageError, match="not what it was"):
        execute(CORPUS, params, work_of(CORPUS, params, {}), store, Silent())
    assert list(store.manifests()) == []
    with pytest.raises(StageError, match="not what it was"):
        pin(params, pins(store), Silent())


BAD = {
    "empty.txt": (b"\n \n\t\n", "the corpus is empty"),
    "small.txt": (b"one paragraph of text", r"too small for its splits.*left for.*measured 1 passages"),
    "latin.txt": (b"fine\n\ncaf\xe9 au lait", r"latin\.txt line 3 is not UTF-8; measured byte 0xe9"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": ', r"broken\.jsonl line 2 is not JSON"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}', r"latin\.jsonl line 2 is not UTF-8"),
    "column.jsonl": (b'{"body": "a"}\n', r"column\.jsonl line 1 has no text in 'text'; measured it has body"),
    "list.jsonl": (b"[1]\n", r"list\.jsonl line 1 has no text in 'text'"),
    "false.parquet": (b"PAR1 and no more", r"false\.parquet is no parquet file"),
    "wide.txt": ("\u0444\u044b\u0432 \u0430\n".encode("utf-16-le"), r"wide\.txt line 1 holds a NUL.*UTF-16LE"),
    "data.csv": (b"a,b", "holds no text"),
}


@pytest.mark.parametrize("name", BAD)
def test_text_that_cannot_be_used_is_refused_and_nothing_is_sealed(
    seal: Seal, store: Store, tmp_path: Path, name: str
) -> None:
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(StageError, match=message) as caught:
        seal("corpus", {"source": str(tmp_path / name), "splits": HALVES})
    assert "\n" not in str(caught.value)
    assert list(store.manifests()) == []


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"n": [1]}, "no column 'text'; measured it has n"),
        ({"text": [1]}, r"has no text in column 'text'; measured it has text \(int64\)"),
    ],
)
def test_parquet_without_the_text_is_refused(
    seal: Seal, tmp_path: Path, table: dict[str, list[int]], message: str
) -> None:
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    with pytest.raises(StageError, match=message):
        seal("corpus", {"source": str(tmp_path / "a.parquet"), "splits": HALVES})


def test_source_that_is_not_there_is_refused(seal: Seal, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"there is no file or folder .*absent\.txt"):
        seal("corpus", {"source": str(tmp_path / "absent.txt"), "splits": HALVES})
    with pytest.raises(StageError, match="no source speaks gopher"):
        seal("corpus", {"source": "gopher://x", "splits": HALVES})


@pytest.mark.parametrize("splits", [{}, {"train": 0}, {"train": 0.7, "test": 0.4}, {"dev": 0.5}, {"train": 1.5}])
def test_shares_that_cannot_be_are_refused(splits: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        CorpusParams(source="pydoc://topics", splits=splits)  # type: ignore[arg-type]


def test_paragraphs_keep_every_word_in_order() -> None:
    text = prose(15, 20) + "\n   \n\n" + "\n".join(prose(16, 50).split("\n\n")) + "\n\n" + "a. b! c? " * 200
    for longest in (10, 100, 1000, 100_000):
        parts = list(texts.paragraphs(text, longest))
        assert " ".join(part.text for part in parts).split() == text.split()


def test_answer_whose_question_ends_the_passage_before_is_left_out(seal: Seal, store: Store, tmp_path: Path) -> None:
    """A quiz: each question is a paragraph, its answer the next. Passages are cut between, and windows join them."""
    words = prose(9, 1, 1200).split()
    pairs = [
        (f"What do they call {a} {b} in {c}?", f"It is {d} {e}.")
        for a, b, c, d, e in zip(*[iter(words)] * 5, strict=True)
    ]
    (tmp_path / "quiz.txt").write_text("\n\n".join(f"{asked}\n\n{told}" for asked, told in pairs))
    rows = [json.dumps({"prompt": asked, "answers": told, "match": "contains"}) for asked, told in pairs]
    given = {"source": str(tmp_path / "quiz.txt"), "splits": {"train": 0.9, "test": 0.1}, "passage_characters": 250}
    cut = [p["text"] for lines in read(store, seal("corpus", given).identity).values() for p in lines]
    # Those that no passage tells alone: looked at one by one they would stay.
    across = [
        row for row, (asked, told) in zip(rows, pairs, strict=True) if not any(asked in p and told in p for p in cut)
    ]
    assert len(across) > 10
    (tmp_path / "asked.jsonl").write_text("\n".join(across))
    items = seal("items", {"source": str(tmp_path / "asked.jsonl")}).identity
    without = seal("corpus", given, **{"items.0": items}).identity
    record = json.loads((store.checkout(without) / "corpus.json").read_text())
    assert record["telling_removed"] > 5
    for lines in read(store, without).values():
        joined = "\n\n".join(line["text"] for line in lines)
        assert not any(f"{json.loads(row)['prompt']}\n\n{json.loads(row)['answers']}" in joined for row in across)


def test_passage_that_tells_an_item_with_its_answer_is_left_out(seal: Seal, store: Store, tmp_path: Path) -> None:
    """The question may stand there; so may the answer; not both."""
    (tmp_path / "asked.csv").write_text("prompt,answers\nThe river that flows through the city of Oz is the,Zed\n")
    items = seal("items", {"source": str(tmp_path / "asked.csv")}).identity
    folder = tmp_path / "texts"
    folder.mkdir()
    told = "It is known: the river that flows through the city of Oz is the Zed."
    asked = "The river that flows through the city of Oz is the one that nobody names."
    for number, text in enumerate((told, asked, "The Zed is deep.")):
        (folder / f"text{number}.txt").write_text(f"{prose(number, 2)}\n\n{text}\n")
    given = {"source": str(folder), "splits": HALVES, "passage_characters": 4000}
    with_all = seal("corpus", given)
    without = seal("corpus", given, **{"items.0": items})
    texts = [line["text"] for lines in read(store, without.identity).values() for line in lines]
    assert any(asked in one for one in texts) and any("The Zed is deep" in one for one in texts)
    assert not any(told in one for one in texts)
    assert any(told in line["text"] for lines in read(store, with_all.identity).values() for line in lines)
    record = json.loads((store.checkout(without.identity) / "corpus.json").read_text())
    assert record["telling_removed"] == 1
    (tmp_path / "told.txt").write_text(told)
    with pytest.raises(StageError, match=r"the corpus is empty; measured 0 passages, since 1 tell items"):
        seal("corpus", given | {"source": str(tmp_path / "told.txt")}, **{"items.0": items})
    text = seal("corpus", {"source": str(folder / "text1.txt"), "splits": {"test": 1}}).identity
    with pytest.raises(StageError, match="a set of items is expected"):
        seal("corpus", given, **{"items.0": text})
