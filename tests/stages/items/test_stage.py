"""items: the set that ships and a person's own files become items by split, or are refused by line."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from stages.adapters.connect import pins
from stages.items.abilities.shipped import shipped
from stages.items.stage import ItemsParams, admit, pin
from stages.measures.items import Check, Item, holds_items, read_items
from stages.models.text.windows import passages, windows
from stages.runtime.artifacts import Store
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.conftest import Seal
from tests.stages.adapters.wheels import make_wheel, only_wheels_of

OWN = [
    {"id": "a", "ability": "capitals", "prompt": "The capital of Peru is", "answers": ["Lima"]},
    {"id": "b", "ability": "capitals", "prompt": 'Say "Rome", or 罗马:', "answers": ["Rome", "罗马"]},
    {"id": "c", "ability": "sums", "prompt": "1 + 1 =", "answers": ["2"], "match": "numeric"},
    {"id": "d", "ability": "c", "task": "choices", "prompt": "Fire is", "choices": [" hot", " cold"], "right": 0},
    {"id": "e", "ability": "c", "task": "choices", "prompt": "Snow is", "choices": [" hot", " cold"], "right": 1},
    {
        "id": "f",
        "ability": "i",
        "task": "instructions",
        "prompt": "Write, in\ntwo lines.",
        "checks": [{"demand": "lines", "value": 2}],
    },
    {"id": "g", "ability": "n", "task": "tag", "prompt": "Ada in Rome", "labels": ["B-PER", "O", "B-LOC"]},
    {"id": "h", "ability": "n", "task": "tag", "prompt": "罗马", "language": "zh", "labels": ["B-LOC", "I-LOC"]},
    {"id": "j", "ability": "q", "task": "question", "prompt": "Who?", "context": "Ada, in\nRome.", "answers": ["Ada"]},
    {"id": "k", "ability": "q", "task": "question", "prompt": "Why?", "context": "Ada.", "answers": []},
    {"id": "l", "ability": "t", "task": "translate", "prompt": "Rom", "language": "zh", "answers": ["罗马", "罗马城"]},
    {"id": "m", "ability": "t", "task": "summarize", "prompt": "Ada went to Rome.", "answers": ["Ada travels."]},
]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return path


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            cells = {k: "|".join(v) if isinstance(v, list) and k != "checks" else v for k, v in row.items()}
            writer.writerow({k: json.dumps(v) if k == "checks" else v for k, v in cells.items()})
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pandas.DataFrame(rows).to_parquet(path)
    return path


def made(store: Store, identity: str) -> dict[str, list[Item]]:
    folder = store.checkout(identity)
    assert holds_items(folder)
    return {path.stem: list(read_items(folder, path.stem)) for path in sorted(folder.glob("*.jsonl"))}


def refused(seal: Seal, store: Store, path: Path, **params: Any) -> StageError:
    with pytest.raises(StageError) as caught:
        seal("items", {"source": str(path), **params})
    assert not list(store.manifests()), "what was refused is sealed"
    return caught.value


def test_abilities_are_sealed_as_they_ship_and_a_second_run_is_cached(seal, store):
    done = seal("items", {"source": "abilities://"})
    found = made(store, done.identity)
    assert {split: tuple(items) for split, items in found.items()} == shipped()
    record = json.loads((store.checkout(done.identity) / "corpus.json").read_text(encoding="utf-8"))
    every = [item for items in found.values() for item in items]
    assert record["items"] == Counter(item.task for item in every)
    assert record["abilities"].keys() == {item.ability for item in every}
    for ability, counts in record["abilities"].items():
        assert counts == {split: sum(item.ability == ability for item in items) for split, items in found.items()}
    assert done.manifest.metrics == {"items": len(every), "abilities": len(record["abilities"])}
    assert done.manifest.work.params["digest"] == record["digest"]
    assert seal("items", {"source": "abilities://"}).cached


def test_some_abilities_keep_their_splits(seal, store):
    some = made(store, seal("items", {"source": "abilities://", "abilities": ["capitals", "chinese facts"]}).identity)
    for split, items in shipped().items():
        assert some[split] == [item for item in items if item.ability in ("capitals", "chinese facts")]
    assert ItemsParams(source="abilities://", abilities=("b", "a", "b")).abilities == ("a", "b")


def test_ability_that_is_not_there_is_refused_before_anything_runs(seal, tmp_path):
    asked = ItemsParams(source="abilities://", abilities=("flying",))
    with pytest.raises(StageError, match="no ability 'flying'") as caught:
        admit(asked, {})
    assert "capitals" in str(caught.value.limit)
    with pytest.raises(StageError, match="no ability 'flying'"):
        seal("items", {"source": str(jsonl(tmp_path / "own.jsonl", OWN)), "abilities": ["flying"]})


def test_admission_knows_the_splits():
    assert admit(ItemsParams(source="abilities://"), {}) == {"validate", "test"}
    assert admit(ItemsParams(source="own.csv"), {}) == {"test"}
    assert admit(ItemsParams(source="own.csv", splits={"test": 0.5, "validate": 0.5}), {}) == {"validate", "test"}


@pytest.mark.parametrize("params", [{"splits": {"test": 1}}, {"columns": {"prompt": "q"}}, {"ability": "a"}])
def test_what_abilities_have_of_their_own_is_not_asked_for(params):
    with pytest.raises(ValidationError, match="of its own"):
        ItemsParams(source="abilities://", **params)


@pytest.mark.parametrize("splits", [{"train": 1}, {"calibrate": 0.5}, {"test": 0.7, "validate": 0.7}, {"test": 0}])
def test_items_have_no_split_to_learn_from_and_no_more_than_all(splits):
    with pytest.raises(ValidationError):
        ItemsParams(source="own.jsonl", splits=splits)


def test_jsonl_csv_and_parquet_hold_the_same_items(seal, store, tmp_path):
    sources = [
        jsonl(tmp_path / "own.jsonl", OWN),
        table(tmp_path / "own.csv", OWN),
        parquet(tmp_path / "own.parquet", OWN),
    ]
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(sources[0].read_bytes()))
    expected = [Item.model_validate(row) for row in OWN]
    for source in (*sources, packed):
        assert made(store, seal("items", {"source": str(source)}).identity) == {"test": expected}, source.name


def test_columns_are_named_and_defaults_fill_what_rows_do_not_say(seal, store, tmp_path):
    rows = [{"q": {"text": f"Say {word}"}, "gold": word, "language": "French"} for word in ("one", "two")]
    path = jsonl(tmp_path / "mine.jsonl", rows)
    columns = {"prompt": "q.text", "answers": "gold", "language": ""}
    done = seal("items", {"source": str(path), "columns": columns, "language": "zh", "match": "contains"})
    (one, two) = made(store, done.identity)["test"]
    assert (one.id, one.ability, one.language, one.match) == ("1", "mine", "zh", "contains")
    assert (two.prompt, two.answers) == ("Say two", ("two",))
    named = seal("items", {"source": str(path), "columns": columns, "ability": "speech"})
    assert {item.ability for item in made(store, named.identity)["test"]} == {"speech"}
    assert "language 'zh'" not in str(done.manifest.work.params["columns"])


def test_words_are_a_prompt_and_a_nested_column_holds_accepted_answers(seal, store, tmp_path):
    rows = [{"tokens": ["Ada", "in", "Rome"], "tags": ["1", "0", "3"]}, {"tokens": ["Oslo"], "tags": [3]}]
    columns = {"words": "tokens", "labels": "tags"}
    path = jsonl(tmp_path / "conll.jsonl", rows)
    one, two = made(store, seal("items", {"source": str(path), "columns": columns, "task": "tag"}).identity)["test"]
    assert (one.prompt, one.words, one.labels) == ("Ada in Rome", ("Ada", "in", "Rome"), ("1", "0", "3"))
    assert two.labels == ("3",), "a number is what it is written as"
    params = {"source": str(path), "columns": columns, "task": "tag", "language": "zh"}
    assert made(store, seal("items", params).identity)["test"][0].prompt == "AdainRome"
    squad = [{"question": "Who?", "context": "Ada.", "answers": {"text": ["Ada"], "answer_start": [0]}},
             {"question": "Why?", "context": "Ada.", "answers": {"text": [], "answer_start": []}}]  # fmt: skip
    params = {"source": str(jsonl(tmp_path / "squad.jsonl", squad)), "task": "question"}
    params["columns"] = {"prompt": "question", "answers": "answers.text"}
    assert [one.answers for one in made(store, seal("items", params).identity)["test"]] == [("Ada",), ()]


def test_right_choice_may_be_a_number_a_letter_or_its_text(seal, store, tmp_path):
    choices = [" red", " green", " blue"]
    rows = [
        {"prompt": f"p{said}", "choices": choices, "right": said} for said in (1, 1.0, "1", "B", "b", "green", " green")
    ]
    path = jsonl(tmp_path / "own.jsonl", rows)
    items = made(store, seal("items", {"source": str(path), "task": "choices"}).identity)["test"]
    assert [item.right for item in items] == [1] * len(rows)


def test_choices_stand_apart_from_the_prompt_as_words_do(seal, store, tmp_path):
    rows = [
        {"prompt": prompt, "choices": "|".join(choices), "right": "0", "task": "choices"}
        for prompt, *choices in (
            ("The capital of France is", "Paris", "London"),
            ("The capital of France is ", "Paris", "London"),
            ("The capital of France is", " Paris", "London"),
            ("中国的首都是", "北京", "上海"),
            ("The word for water is", "水", "火"),
            ("values = list(", "range(3))", "len(3))"),
            ("Is it late", "?", "!"),
        )
    ]
    path = table(tmp_path / "own.csv", rows)
    for about, first in (({}, " Paris"), ({"spaced": False}, "Paris")):
        items = made(store, seal("items", {"source": str(path)} | about).identity)["test"]
        assert [item.choices[0] for item in items] == [first, "Paris", " Paris", "北京", "水", "range(3))", "?"]
    with pytest.raises(ValidationError, match="files of one's own"):
        ItemsParams(source="abilities://", spaced=False)


def test_folder_is_read_in_order_and_its_name_counts_where_items_bear_none(seal, store, tmp_path):
    folder = tmp_path / "trivia"
    (folder / "deep").mkdir(parents=True)
    jsonl(folder / "deep" / "b.jsonl", [{"prompt": "b", "answers": "2"}])
    table(folder / "a.CSV", [{"prompt": "a", "answers": "1"}])
    (folder / "README.md").write_text("about", encoding="utf-8")
    items = made(store, seal("items", {"source": folder.as_uri()}).identity)["test"]
    assert [(item.id, item.ability) for item in items] == [("a.CSV:1", "trivia"), ("deep/b.jsonl:1", "trivia")]


def test_same_bytes_at_another_place_are_the_same_work_unless_they_name_the_ability(seal, tmp_path):
    rows = [row for row in OWN if "ability" in row]
    (tmp_path / "else").mkdir()
    first = seal("items", {"source": str(jsonl(tmp_path / "own.jsonl", rows))})
    assert seal("items", {"source": str(jsonl(tmp_path / "else" / "own.jsonl", rows))}).cached
    other = seal("items", {"source": str(jsonl(tmp_path / "other.jsonl", rows))})
    assert other.manifest.work.params["ability"] == "other" and other.identity != first.identity


def test_source_in_a_package_is_pinned_by_its_content(seal, store, tmp_path, monkeypatch):
    lines = "".join(f"{json.dumps(row)}\n" for row in OWN)
    make_wheel(tmp_path / "wheels", "quiz", "1.0", {"quiz/own.jsonl": lines.encode()})
    only_wheels_of(tmp_path / "wheels", monkeypatch)
    packaged = seal("items", {"source": "pypi://quiz==1.0/quiz/own.jsonl"})
    local = seal("items", {"source": str(jsonl(tmp_path / "own.jsonl", OWN))})
    assert made(store, packaged.identity) == made(store, local.identity)


def test_changed_source_is_refused_by_its_digest(seal, store, tmp_path):
    path = jsonl(tmp_path / "own.jsonl", OWN)
    pinned = pin(ItemsParams(source=str(path)), pins(store), Silent())
    jsonl(path, OWN[:2])
    assert "not what it was" in refused(seal, store, path, digest=pinned.digest).what
    with pytest.raises(StageError, match="not what it was"):
        pin(ItemsParams(source="abilities://", digest="0" * 64), pins(store), Silent())


def test_shares_are_met_in_every_ability(seal, store, tmp_path):
    rows = [{"ability": "ab"[n % 3 == 0], "prompt": f"p{n}", "answers": "x"} for n in range(90)]
    done = seal("items", {"source": str(jsonl(tmp_path / "o.jsonl", rows)), "splits": {"test": 0.5, "validate": 0.25}})
    found = made(store, done.identity)
    for ability, many in (("a", 60), ("b", 30)):
        for split, share in (("test", 0.5), ("validate", 0.25)):
            assert abs(sum(item.ability == ability for item in found[split]) - share * many) <= 1
    every = [item.id for items in found.values() for item in items]
    assert len(every) == len({*every})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answers": "x"}, "has no column 'prompt'"),
        ({"prompt": None, "answers": "x"}, "has nothing in 'prompt'"),
        ({"prompt": "", "answers": "x"}, "has nothing in 'prompt'"),
        ({"prompt": " \n", "answers": "x"}, "has nothing in 'prompt'"),
        ({"prompt": 5, "answers": "x"}, "prompt: Input should be a valid string"),
        ({"prompt": "p"}, "accepts no answer"),
        ({"prompt": "p", "answers": None}, "accepts no answer"),
        ({"prompt": "p", "answers": []}, "accepts no answer"),
        ({"prompt": "p", "answers": ["x", None]}, "null among its answers"),
        ({"prompt": "p", "answers": ["x", " "]}, "an empty text among its answers"),
        ({"prompt": "p", "answers": {"text": "x"}}, "dict among its answers"),
        ({"prompt": "p", "answers": "x", "task": "essay"}, "task: Input should be"),
        ({"prompt": "p", "answers": "x", "match": "fuzzy"}, "match: Input should be"),
        ({"prompt": "p", "answers": "x", "id": "first"}, "has the id 'first'"),
        ({"prompt": "\ud800", "answers": "x"}, "prompt: Input should be a valid string"),
        ({"prompt": "p", "task": "choices", "choices": ["a", "b"]}, "does not say which choice is right"),
        (
            {"prompt": "p", "task": "choices", "choices": ["a", "b"], "right": None},
            "does not say which choice is right",
        ),
        ({"prompt": "p", "task": "choices", "choices": ["a", "b"], "right": 2}, "does not say which choice is right"),
        ({"prompt": "p", "task": "choices", "choices": ["a", "b"], "right": -1}, "does not say which choice is right"),
        (
            {"prompt": "p", "task": "choices", "choices": ["a", "b"], "right": "c d"},
            "does not say which choice is right",
        ),
        ({"prompt": "p", "task": "choices", "choices": ["1", "0"], "right": "0"}, "does not say which choice is right"),
        ({"prompt": "p", "task": "choices", "choices": ["a"], "right": 0}, "two different choices"),
        ({"prompt": "p", "task": "choices", "choices": ["a", "a"], "right": 0}, "two different choices"),
        ({"prompt": "a b", "task": "tag"}, "2 words and 0 labels"),
        ({"prompt": "a b", "task": "tag", "labels": ["O"]}, "2 words and 1 labels"),
        ({"prompt": "a b", "task": "tag", "labels": ["O", None]}, "null among its labels"),
        ({"words": ["a", ""], "task": "tag", "labels": ["O", "O"]}, "an empty text among its words"),
        ({"words": [], "task": "tag", "labels": []}, "has no column 'prompt'"),
        ({"prompt": "p", "task": "question", "context": "c"}, "does not say in 'answers' what is accepted"),
        ({"prompt": "p", "task": "question", "context": "c", "answers": None}, "does not say in 'answers'"),
        ({"prompt": "p", "task": "question", "context": "c", "answers": [" "]}, "an empty text among its answers"),
        ({"prompt": "p", "task": "translate"}, "no reference in `answers`"),
        ({"prompt": "p", "task": "summarize", "answers": []}, "no reference in `answers`"),
        ({"prompt": "p", "task": "instructions"}, "nothing to check"),
        ({"prompt": "p", "task": "instructions", "checks": "lines 3"}, "checks that are not JSON"),
        ({"prompt": "p", "task": "instructions", "checks": [{"demand": "rhyme"}]}, "demand: Input should be"),
        ({"prompt": "p", "task": "instructions", "checks": [{"demand": "lines", "value": "x"}]}, "takes a number"),
    ],
)
def test_row_that_is_no_item_is_refused_by_its_line(seal, store, tmp_path, row, said):
    path = tmp_path / "own.jsonl"
    first = {"id": "first", "prompt": "p", "answers": "x"}
    path.write_text(f"{json.dumps(first)}\n\n{json.dumps(row)}\n", encoding="utf-8")
    error = refused(seal, store, path)
    assert f"{path} line 3" in error.what and said in error.what
    assert error.remedy


def test_csv_and_parquet_rows_are_refused_by_their_place(seal, store, tmp_path):
    text = 'prompt,answers\n"two\nlines",x\nnext,\n'
    path = tmp_path / "own.csv"
    path.write_text(text, encoding="utf-8")
    assert f"{path} line 4" in refused(seal, store, path).what
    path.write_text(text.replace("next,", "next"), encoding="utf-8")
    assert "line 4 has not as many cells" in refused(seal, store, path).what
    path.write_text('prompt,answers\n"open,x\n', encoding="utf-8")
    assert "line 2 is not CSV" in refused(seal, store, path).what
    path.write_text("prompt,answers,answers\na,x,y\n", encoding="utf-8")
    assert "line 1 names a column more than once" in refused(seal, store, path).what
    frame = parquet(tmp_path / "own.parquet", [{"prompt": "p", "answers": ["x"]}, {"prompt": None, "answers": ["y"]}])
    assert f"{frame} row 2 has nothing in 'prompt'" in refused(seal, store, frame).what
    path.write_bytes(b"prompt,answers\ncaf\xe9,x\n")
    assert "line 2 is not UTF-8" in refused(seal, store, path).what


def test_cell_of_a_csv_is_as_long_as_it_is(seal, store, tmp_path):
    path, long = tmp_path / "own.csv", "word " * 40_000
    path.write_text(f'prompt,answers\n"{long}",x\n', encoding="utf-8")
    found = made(store, seal("items", {"source": str(path)}).identity)["test"]
    assert [len(one.prompt) for one in found] == [len(long)]


@pytest.mark.parametrize("between", [";", "\t"])
def test_csv_with_semicolons_or_tabs_is_read_as_one_with_commas(seal, store, tmp_path, between):
    lines = ["id,prompt,answers", 'a,"One, two; three\tfour",five', "b,Six,seven|eight"]
    (tmp_path / "comma.csv").write_text("\n".join(lines))
    other = [lines[0].replace(",", between), f'a{between}"One, two; three\tfour"{between}five', "b,Six,seven|eight"]
    other[2] = other[2].replace(",", between)
    (tmp_path / "other.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(other).encode())
    params = [{"source": str(tmp_path / f"{name}.csv"), "ability": "own"} for name in ("comma", "other")]
    first, second = (seal("items", one).identity for one in params)
    assert made(store, first) == made(store, second) and len(made(store, first)["test"]) == 2


@pytest.mark.parametrize(
    ("columns", "said"), [({"prompt": "q"}, "no row has|no column 'q'"), ({}, "no column 'prompt'")]
)
def test_items_that_lie_here_are_read_before_any_work(store, tmp_path, columns, said):
    jsonl(tmp_path / "own.jsonl", [{"question": "a", "answers": ["b"]}])
    with pytest.raises(StageError, match=said):
        pin(ItemsParams(source=(tmp_path / "own.jsonl").as_uri(), columns=columns), pins(store), Silent())


def test_line_that_is_no_object_and_files_without_items_are_refused(seal, store, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "p", "answers": "x"}\n["p"]\n', encoding="utf-8")
    assert "line 2 is not JSON (a list and no object)" in refused(seal, store, path).what
    path.write_text("\n", encoding="utf-8")
    assert "holds no items" in refused(seal, store, path).what
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text", encoding="utf-8")
    assert "holds no items" in refused(seal, store, tmp_path / "texts").what
    few = jsonl(tmp_path / "few.jsonl", OWN[:1])
    assert "nothing is left for" in refused(seal, store, few, splits={"validate": 0.5, "test": 0.5}).what


def test_column_that_no_row_has_is_refused(seal, store, tmp_path):
    path = jsonl(tmp_path / "own.jsonl", OWN)
    assert "'kind' that `columns` names for ability" in refused(seal, store, path, columns={"ability": "kind"}).what
    assert "has no column 'question'" in refused(seal, store, path, columns={"prompt": "question"}).what


def test_set_of_items_is_refused_where_text_is_read(seal, store, tiny):
    folder = store.checkout(seal("items", {"source": "abilities://", "abilities": ["capitals"]}).identity)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for split in ("test", "validate", "calibrate"):
        with pytest.raises(StageError, match="nothing may calibrate or train on it") as caught:
            windows(folder, split, tokenizer, 64)
        assert "`corpus`" in caught.value.remedy
        with pytest.raises(StageError, match="asked, not read"):
            next(passages(folder, split))


def test_step_that_would_calibrate_on_items_is_refused_and_seals_nothing(seal, store, tiny):
    dense = seal("fetch", {"source": tiny.as_uri()})
    asked = seal("items", {"source": "abilities://"})
    sealed = len(list(store.manifests()))
    with pytest.raises(StageError, match="nothing may calibrate or train on it"):
        seal("prune", {"method": "channels", "keep": 0.9}, model=dense.identity, text=asked.identity)
    assert len(list(store.manifests())) == sealed


def test_split_that_is_not_there_is_named(seal, store):
    folder = store.checkout(seal("items", {"source": "abilities://", "abilities": ["logic"]}).identity)
    with pytest.raises(StageError, match="no split 'train'") as caught:
        next(read_items(folder, "train"))
    assert caught.value.measured == "test, validate"


@pytest.mark.parametrize(
    ("demand", "value"),
    [
        ("words_at_most", "ten"),
        ("lines", None),
        ("lines", -1),
        ("contains", ""),
        ("case", "title"),
        ("language", "fr"),
        ("json", "x"),
    ],
)
def test_check_with_a_value_that_it_cannot_use_is_refused(demand, value):
    with pytest.raises(ValidationError, match="for its value"):
        Check(demand=demand, value=value)


PAIRS = [
    {"id": "s", "ability": "near", "task": "similarity", "prompt": "a cat", "other": "一只猫", "score": 4.5},
    {"id": "t", "ability": "near", "task": "similarity", "prompt": "a cat", "other": "a, b", "score": 0},
    {"id": "r", "ability": "found", "task": "retrieval", "prompt": "what purrs", "other": "The cat\npurrs."},
]


def test_pairs_of_texts_are_the_same_from_every_kind_of_file(seal, store, tmp_path):
    sources = [
        jsonl(tmp_path / "own.jsonl", PAIRS),
        table(tmp_path / "own.csv", PAIRS),
        parquet(tmp_path / "own.parquet", PAIRS),
    ]
    for source in sources:
        found = made(store, seal("items", {"source": str(source)}).identity)["test"]
        assert found == [Item.model_validate(row) for row in PAIRS], source.name
        assert [one.score for one in found] == [4.5, 0, None]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"task": "similarity", "other": "b"}, "has no `score`"),
        ({"task": "similarity", "other": "b", "score": None}, "has no `score`"),
        ({"task": "similarity", "other": "b", "score": "many"}, "score: Input should be a valid number"),
        ({"task": "similarity", "other": "b", "score": "inf"}, "score: Input should be a finite number"),
        ({"task": "similarity", "score": 1}, "has no `other` text"),
        ({"task": "retrieval", "other": " "}, "has no `other` text"),
    ],
)
def test_pair_that_lacks_something_is_refused_by_its_line(seal, store, tmp_path, row, said):
    path = jsonl(tmp_path / "own.jsonl", [PAIRS[0], {"prompt": "a"} | row])
    error = refused(seal, store, path)
    assert f"{path} line 2" in error.what and said in error.what
