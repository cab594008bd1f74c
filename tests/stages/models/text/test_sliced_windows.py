"""sliced_windows: a window is of one source, any first ones are the mix, and what begins a text begins a window."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from stages.models.text.text_ends import special_ends
from stages.models.text.windows import Each, sliced_windows, windows
from stages.runtime.contract import StageError
from tests.stages.models.text.test_windows import PROSE, TEMPLATE, Heard, byte_level, chat, with_bos


def corpus(folder: Path, sources: dict[str, tuple[float, list[dict[str, Any]]]]) -> Path:
    lines = [
        {"id": f"{name}/{number}#0", **({"source": name} if name else {}), **row}
        for name, (_, rows) in sources.items()
        for number, row in enumerate(rows)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {"sources": {name: {"share": share} for name, (share, _) in sources.items()}} if "" not in sources else {}
    (folder / "corpus.json").write_text(json.dumps(record))
    return folder


def texts(word: str, count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"text": f"{word} {number} {PROSE}", **more} for number in range(count)]


def row_of(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> list[int]:
    """The ids of all passages in a row, as windows were cut before there were sources."""
    return [i for row in rows for i in tokenizer(f"{row['text']}\n\n", add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("kind", [byte_level, with_bos])
def test_plain_prose_of_one_source_is_cut_as_its_ids_in_a_row(tmp_path: Path, reference: str, kind: Any) -> None:
    tokenizer, rows = kind(reference), [{"text": part} for part in reference[:9000].split("\n\n")]
    before, _ = special_ends(tokenizer)
    room, ids = 40 - len(before), row_of(tokenizer, rows)
    wanted = [[*before, *ids[start : start + room]] for start in range(0, len(ids) - room + 1, room)]
    found = sliced_windows(corpus(tmp_path, {"": (1.0, rows)}), "test", tokenizer, 40)
    assert found.ids_NT.tolist() == wanted and found.names == ("",) * len(wanted)
    assert windows(tmp_path, "test", tokenizer, 40).equal(found.ids_NT)


def test_window_is_of_one_source_and_any_first_ones_are_the_mix(tmp_path: Path, reference: str) -> None:
    tokenizer = byte_level(reference)
    rows = {"a": texts("alpha", 60), "b": texts("beta", 40), "c": texts("gamma", 20)}
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    folder = corpus(tmp_path, {name: (shares[name], rows[name]) for name in rows})
    found = sliced_windows(folder, "test", tokenizer, 32)
    for name, some in rows.items():
        ids = row_of(tokenizer, some)
        own = [row for row, whose in zip(found.ids_NT.tolist(), found.names, strict=True) if whose == name]
        assert own == [ids[start : start + 32] for start in range(0, len(ids) - 31, 32)]
    for count in range(1, 60):
        got = Counter(found.names[:count])
        assert all(abs(got[name] - share * count) < 1 for name, share in shares.items())
    few = sliced_windows(folder, "test", tokenizer, 32, most=7)
    assert few.names == found.names[:7] and few.ids_NT.equal(found.ids_NT[:7])
    each = sliced_windows(folder, "test", tokenizer, 32, most=Each(5))
    assert Counter(each.names) == {"a": 5, "b": 5, "c": 5}
    for name in rows:
        first, all_of = ([n for n, one in enumerate(some.names) if one == name] for some in (each, found))
        assert each.ids_NT[first].equal(found.ids_NT[all_of[:5]])


def test_what_a_model_wrote_begins_a_window_wherever_the_one_before_had_no_room(tmp_path: Path, reference: str) -> None:
    tokenizer = byte_level(reference)
    rows = [{"text": f"{number} {PROSE[: 20 + 9 * number % 60]}", "begins": True} for number in range(30)]
    pieces = [tokenizer(f"{row['text']}\n\n", add_special_tokens=False)["input_ids"] for row in rows]
    assert max(map(len, pieces)) <= 40 < sum(map(len, pieces)) / 5
    found = windows(corpus(tmp_path, {"": (1.0, rows)}), "test", tokenizer, 40).tolist()
    starts = [next(n for n, ids in enumerate(pieces) if row[: len(ids)] == ids) for row in found]
    for row, start in zip(found, starts, strict=True):
        assert row == [i for ids in pieces[start:] for i in ids][:40], "a passage and those behind it"
    whole = [n for row, start in zip(found, starts, strict=True) for n in inside(pieces[start:], start, 40)]
    assert whole == list(range(whole[-1] + 1)), "each stands whole in one window, in order"
    assert whole[-1] >= 26, "the last ones fill no window"


def inside(pieces: list[list[int]], first: int, room: int) -> list[int]:
    """Numbers of the passages that a window holds whole."""
    found, used = [], 0
    for number, ids in enumerate(pieces, start=first):
        used += len(ids)
        if used > room:
            break
        found.append(number)
    return found


def test_what_a_model_wrote_that_is_longer_than_a_window_begins_one_and_goes_on_in_the_next(
    tmp_path: Path, reference: str
) -> None:
    tokenizer = byte_level(reference)
    rows = texts("long", 6, begins=True)
    pieces = [tokenizer(f"{row['text']}\n\n", add_special_tokens=False)["input_ids"] for row in rows]
    assert all(24 < len(ids) < 48 for ids in pieces)
    found = windows(corpus(tmp_path, {"": (1.0, rows)}), "test", tokenizer, 24).tolist()
    wanted = []
    for ids, after in pairwise(pieces):
        wanted += [ids[:24], (ids[24:] + after)[:24]]
    assert found == [*wanted, pieces[-1][:24]]


@pytest.mark.parametrize("kind", [byte_level, with_bos])
def test_conversation_that_fits_stands_whole_in_a_window_with_the_template_around_it(
    tmp_path: Path, reference: str, kind: Any
) -> None:
    tokenizer = kind(reference)
    tokenizer.chat_template = TEMPLATE
    rows = [{"messages": chat(number)} for number in range(12)]
    whole = [tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in rows]
    tokens = max(map(len, whole)) + 12
    assert 2 * min(map(len, whole)) > tokens
    found = windows(corpus(tmp_path, {"": (1.0, rows)}), "test", tokenizer, tokens).tolist()
    assert len(found) == 11, "the last conversation does not fill one"
    for row, ids, after in zip(found, whole, whole[1:], strict=False):
        assert row == (ids + after)[:tokens], "nothing is cut in its middle, and no beginning stands twice"


def test_source_without_a_window_is_said_and_a_split_without_any_refused(tmp_path: Path, reference: str) -> None:
    tokenizer, heard = byte_level(reference), Heard()
    folder = corpus(tmp_path, {"a": (0.9, texts("alpha", 20)), "b": (0.1, [{"text": "a little text"}])})
    found = sliced_windows(folder, "test", tokenizer, 32, progress=heard)
    assert set(found.names) == {"a"}
    assert heard.said == ["source b has no window of 32 tokens in split 'test'"]
    assert sliced_windows(folder, "test", tokenizer, 32, most=2, progress=heard).names == ("a", "a")
    assert len(heard.said) == 2, "few are taken, and there would be none of it among more"
    sliced_windows(folder, "test", tokenizer, 8, most=1, progress=heard)
    assert len(heard.said) == 2
    with pytest.raises(StageError, match=r"shorter than one window; measured \d+ tokens; limit 5000 tokens"):
        windows(folder, "test", tokenizer, 5000)
