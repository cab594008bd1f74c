"""Text files as people have them: encodings, line ends, packing, rows of every shape, and refusals that help."""

# ruff: noqa: RUF001

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from stages.adapters import texts
from stages.adapters.sources import Wanted
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from stages.runtime.rows import Message

PROSE = "Ein Satz über Bäume.\n\nDer zweite Absatz, größer als der erste.\n" * 20
SAMPLES = {
    "WINDOWS-1252": "Le garçon est déjà là, où l'été s'achève. El niño pidió agua. Grüße aus München.\n",
    "WINDOWS-1250": "Zażółć gęślą jaźń, proszę pana, właśnie się zaczęło łowić ryby.\n",
    "MACINTOSH": "Le garçon est déjà là, où l'été s'achève. Grüße aus München.\n",
    "WINDOWS-1251": "В начале было слово. Это простой русский текст, который мы проверяем.\n",
    "KOI8-R": "В начале было слово. Это простой русский текст, который мы проверяем.\n",
    "CP932": "これは日本語の文章です。文字コードを確認するために書きました。\n",
    "EUC-JP": "これは日本語の文章です。文字コードを確認するために書きました。\n",
    "CP949": "이것은 한국어 문장입니다. 파일의 인코딩을 확인하기 위해 작성했습니다.\n",
    "BIG5": "這是一個中文的句子，我們用它來檢查文件的編碼。他在那裡說了很多話。\n",
    "GB18030": "这是一个中文的句子，我们用它来检查文件的编码。他在那里说了很多话。\n",
    "UTF-16LE": "这是一个中文的句子，我们用它来检查文件的编码。他在那里说了很多话。\n",
    "UTF-16BE": "В начале было слово. Это простой русский текст, который мы проверяем.\n",
}


def read(path: Path, column: str = "text") -> list[texts.Document | texts.Null]:
    return list(texts.documents(path, column, Silent()))


def content(path: Path, column: str = "text") -> list[str]:
    found = read(path, column)
    assert all(isinstance(document, texts.Document) for document in found)
    return [document.text for document in found if isinstance(document, texts.Document)]


def remedy(path: Path, column: str = "text") -> str:
    with pytest.raises(StageError) as caught:
        read(path, column)
    assert str(path) in caught.value.what
    return caught.value.remedy


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_of_every_unicode_encoding_and_line_end_is_one_text(tmp_path: Path, encoding: str, end: str) -> None:
    (tmp_path / "a.txt").write_bytes(PROSE.replace("\n", end).encode(encoding))
    rows = [{"text": part} for part in PROSE.split("\n\n")]
    lined = end.join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(lined.encode(encoding))
    (tmp_path / "a.json").write_bytes(
        json.dumps(rows, ensure_ascii=False, indent=1).replace("\n", end).encode(encoding)
    )
    (tmp_path / "lined.json").write_bytes(lined.encode(encoding))
    assert content(tmp_path / "a.txt") == [PROSE]
    for name in ("a.jsonl", "a.json", "lined.json"):
        assert content(tmp_path / name) == PROSE.split("\n\n")


def test_mark_of_big_endian_utf16_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xfe\xff" + SAMPLES["GB18030"].encode("utf-16-be"))
    assert content(tmp_path / "a.txt") == [SAMPLES["GB18030"]]


@pytest.mark.parametrize("name", SAMPLES)
def test_remedy_for_another_encoding_names_it_and_works_word_for_word(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine é.txt"
    path.write_bytes(f"Title\n\n{SAMPLES[name] * 3}".encode(name))
    said = remedy(path)
    assert name in said
    subprocess.run(said.partition("Convert it: ")[2], shell=True, check=True, cwd=tmp_path)
    assert content(tmp_path / "mine é.utf8.txt") == [f"Title\n\n{SAMPLES[name] * 3}"]


def test_text_that_breaks_off_is_refused_by_line_and_the_rest_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\ntwo\r\nthree".encode("utf-16")[:-1])
    with pytest.raises(StageError, match=r"a\.txt line 3 is not UTF-16LE") as caught:
        read(tmp_path / "a.txt")
    subprocess.run(caught.value.remedy.partition("broken: ")[2], shell=True, check=False, cwd=tmp_path)
    assert content(tmp_path / "a.utf8.txt") == ["one\ntwo\nthre"]


def test_encoding_that_cannot_be_told_is_not_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Αυτό είναι ένα ελληνικό κείμενο για να ελέγξουμε.\n".encode("cp1253"))
    assert "Find out in which encoding" in remedy(tmp_path / "a.txt")


def test_line_of_a_broken_character_is_named_and_the_rest_of_the_file_can_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(
        gzip.compress('{"text": "é€"}\r\n{"text": "é"}\r\n{"text": "ü\udcff"}'.encode(errors="surrogateescape"))
    )
    with pytest.raises(StageError, match=r"a\.jsonl\.gz line 3 is not UTF-8; measured byte 0xff") as caught:
        read(path)
    subprocess.run(caught.value.remedy.partition("broken: ")[2], shell=True, check=True, cwd=tmp_path)
    assert content(tmp_path / "a.utf8.jsonl") == ["é€", "é", "ü"]


def test_nul_is_refused_by_line_and_the_remedy_takes_it_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\nth\0ree\r\n")
    with pytest.raises(StageError, match=r"a\.txt line 3 holds a NUL") as caught:
        read(tmp_path / "a.txt")
    subprocess.run(caught.value.remedy.partition("out: ")[2], shell=True, check=True, cwd=tmp_path)
    assert content(tmp_path / "a.utf8.txt") == ["one\ntwo\nthree\n"]


@pytest.mark.parametrize(("escape", "what"), [("\\ud83d", "lone surrogate"), ("\\u0000", "NUL")])
def test_what_is_no_character_is_refused_by_row(tmp_path: Path, escape: str, what: str) -> None:
    good, bad = '{"text": "fine \\ud83d\\ude00"}', f'{{"text": "a{escape}b"}}'
    (tmp_path / "a.jsonl").write_text(f"{good}\n\n{bad}\n")
    with pytest.raises(StageError, match=rf"a\.jsonl line 3: text holds .*{what}.*Leave line 3 out"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(f'[{good}, {{"messages": [{{"role": "user", "content": "{escape}"}}]}}]')
    with pytest.raises(StageError, match=rf"a\.json row 2: message 1 of messages holds .*{what}.*Leave row 2 out"):
        read(tmp_path / "a.json")


def test_file_that_is_no_text_is_told_from_one_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "packed.txt").write_bytes(gzip.compress(PROSE.encode()))
    assert "name it packed.txt.gz" in remedy(tmp_path / "packed.txt")
    (tmp_path / "archive.txt").write_bytes(b"PK\x03\x04\x00\xff\xfe")
    assert "document or an archive" in remedy(tmp_path / "archive.txt")
    (tmp_path / "plain.txt.gz").write_text(PROSE)
    assert "take .gz off its name" in remedy(tmp_path / "plain.txt.gz")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(PROSE.encode())[:-20])
    assert "Fetch the file again" in remedy(tmp_path / "cut.txt.gz")


def test_suffix_counts_in_any_case_and_packed_and_names_no_other_source(tmp_path: Path) -> None:
    for folder, names in (("x", ("a.txt", "b.jsonl.gz")), ("y", ("a.TXT", "b.JsonL.GZ"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / names[0]).write_text(PROSE)
        (tmp_path / folder / names[1]).write_bytes(gzip.compress(b'{"text": "a row"}', mtime=0))
    assert read(tmp_path / "x") == read(tmp_path / "y")
    assert content(tmp_path / "y") == [PROSE, "a row"]
    assert texts.digest_of_files(tmp_path / "x") == texts.digest_of_files(tmp_path / "y")
    single = tmp_path / "y" / "b.JsonL.GZ"
    assert texts.digest_of_files(single) != texts.digest_of_files(tmp_path / "x" / "a.txt")
    wanted = Wanted("text", texts.PATTERNS, texts.REMEDY)
    assert all(wanted.takes(f"data/{name}") for name in ("A.TXT", "b.JsonL.GZ", "c.Parquet", "d.json"))
    assert not any(wanted.takes(name) for name in ("a.tar.gz", "txt", "a.txt.bz2", "b.csv"))


def test_two_files_whose_names_differ_by_case_alone_stay_two(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.TXT").write_text("two")
    if len(list(tmp_path.iterdir())) == 2:
        assert {d.name for d in read(tmp_path) if isinstance(d, texts.Document)} == {"a.txt", "a.TXT"}


def test_description_beside_the_texts_of_a_folder_is_left_out_and_said(tmp_path: Path) -> None:
    class Heard(Silent):
        said: list[str] = []  # noqa: RUF012

        def note(self, text: str) -> None:
            self.said.append(text)

    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "one.json").write_text('{"text": "b"}')
    (tmp_path / "dataset_infos.json").write_text(json.dumps({"default": {"features": {"text": {"dtype": "string"}}}}))
    found = list(texts.documents(tmp_path, "text", Heard()))
    assert [document.text for document in found if isinstance(document, texts.Document)] == ["a", "b"]
    assert len(Heard.said) == 1 and "dataset_infos.json is one object without text" in Heard.said[0]
    with pytest.raises(StageError, match=r"row 1 has no text in 'text'; measured it has default \(object\)"):
        read(tmp_path / "dataset_infos.json")


ASKED = [Message("user", "Why?"), Message("assistant", "Because.")]
CHATS = {
    "messages": {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Because."}]},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
    "completion": {"prompt": "Why?", "completion": "Because.", "id": 3},
    "turns": {
        "prompt": [{"role": "user", "content": "Why?"}],
        "completion": [{"role": "assistant", "content": "Because."}],
    },
    "response": {"prompt": "Why?", "response": "Because."},
    "alpaca": {"instruction": "Why?", "input": "", "output": "Because."},
}


@pytest.mark.parametrize("name", CHATS)
def test_conversation_of_every_shape_is_recognised_in_every_format(tmp_path: Path, name: str) -> None:
    row = CHATS[name]
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "a.json").write_text(json.dumps([row]))
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert read(file) == [texts.Document("1", "Why?\n\nBecause.", tuple(ASKED))], file.name
        first = next(iter(row))
        if isinstance(row[first], list):
            asked = [document.messages for document in read(file, first) if isinstance(document, texts.Document)]
            assert asked == [tuple(ASKED if len(row) == 1 else ASKED[:1])]


def test_roles_of_other_tools_become_those_of_templates(tmp_path: Path) -> None:
    roles = ["system", "human", "gpt", "function_call", "observation", "tool", "developer"]
    turns = [{"from": role, "value": role} for role in roles]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}))
    (found,) = read(tmp_path / "a.jsonl")
    assert isinstance(found, texts.Document)
    wanted = ["system", "user", "assistant", "assistant", "tool", "tool", "developer"]
    assert [message.role for message in found.messages] == wanted


def test_input_of_an_instruction_follows_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "Add.", "input": "1 1", "output": "2"}))
    (found,) = read(tmp_path / "a.jsonl")
    assert isinstance(found, texts.Document) and found.messages[0] == Message("user", "Add.\n\n1 1")


def test_text_is_read_where_a_row_has_both(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "plain", **CHATS["messages"]}))
    assert read(tmp_path / "a.jsonl") == [texts.Document("1", "plain")]


def test_part_without_text_is_refused_by_line(tmp_path: Path) -> None:
    content = [{"type": "image", "url": "x"}, {"type": "text", "text": "What is it?"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
    with pytest.raises(StageError, match=r"line 1: message 1 of messages is not of text alone.*Leave images"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(["a", "b\r\nc"]),
        pyarrow.array(["a", "b\r\nc"], pyarrow.large_string()),
        pyarrow.array(["a", "b\r\nc"], pyarrow.string_view()),
        pyarrow.array(["a", "b\r\nc"]).dictionary_encode(),
        pyarrow.array([["a"], ["b\r\nc"]]),
        pyarrow.array([["a"], ["b\r\nc"]], pyarrow.large_list(pyarrow.large_string())),
    ],
    ids=lambda column: str(column.type),
)
def test_parquet_text_of_every_type_is_read(tmp_path: Path, column: pyarrow.Array) -> None:
    nested = pyarrow.StructArray.from_arrays([column, pyarrow.array([1, 2])], ["text", "n"])
    table = pyarrow.table({"text": column, "meta": nested, "n": [1, 2], "a.b": column})
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    for name in ("a.parquet", "a.parquet.gz"):
        for asked in ("text", "meta.text", "a.b"):
            assert content(tmp_path / name, asked) == ["a", "b\nc"]


def test_list_of_strings_is_joined_by_blank_lines(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [["a", "b"], []]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": ["a", "b"]}\n{"text": []}\n')
    assert content(tmp_path / "a.parquet") == content(tmp_path / "a.jsonl") == ["a\n\nb", ""]


def test_missing_column_names_what_there_is_and_the_remedy_works(tmp_path: Path) -> None:
    row = {
        "n": 1,
        "body": "a text",
        "meta": {"lines": ["a", "b"], "score": 0.5},
        "chosen": CHATS["messages"]["messages"],
    }
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    for file, kinds in (
        ("a.parquet", r"n \(int64\), body \(string\), meta"),
        ("a.jsonl", r"n \(number\), body \(string\)"),
    ):
        with pytest.raises(StageError, match=kinds) as caught:
            read(tmp_path / file)
        assert caught.value.remedy == "Set the step's parameter `column` to one of body, meta.lines, chosen."
        for column in ("body", "meta.lines", "chosen"):
            assert content(tmp_path / file, column)
        with pytest.raises(StageError, match=r"no text in.*'?n'?.*one of body, meta\.lines, chosen"):
            read(tmp_path / file, "n")


def test_null_is_told_from_an_empty_text(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["a", None, "", "b"]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(4)}), tmp_path / "nulls.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": ""}\nnull\n{"text": NaN}\n')
    nothing = [{"role": "user", "content": None}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": nothing}) + "\n" + json.dumps({"messages": None}))
    for name, wanted in (
        ("a.parquet", [2]),
        ("nulls.parquet", [1, 2, 3, 4]),
        ("a.jsonl", [2, 4, 5]),
        ("chat.jsonl", [1, 2]),
    ):
        nulls = [found.where for found in read(tmp_path / name) if isinstance(found, texts.Null)]
        kind = "row" if name.endswith("parquet") else "line"
        assert nulls == [f"{tmp_path / name} {kind} {number}" for number in wanted]


def test_parquet_string_that_is_not_utf8_is_refused_by_row(tmp_path: Path) -> None:
    column = pyarrow.array([b"a", b"b", b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(StageError, match=r"a\.parquet row 3 is not UTF-8"):
        read(tmp_path / "a.parquet")


def test_broken_json_is_refused_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"text": "a"},\n{"text": }\n]')
    with pytest.raises(StageError, match=r"a\.json line 3 is not JSON"):
        read(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"text": "a"}\n{"text": "b"}\n{"text"}\n')
    with pytest.raises(StageError, match=r"b\.json line 3 is not JSON"):
        read(tmp_path / "b.json")
    for name in ("d.json", "d.jsonl"):  # deeper than Python reads
        (tmp_path / name).write_text("[" * 200_000)
        with pytest.raises(StageError, match=r"d\.jsonl? line 1 is not JSON"):
            read(tmp_path / name)
    (tmp_path / "c.json").write_text(" \n")
    assert read(tmp_path / "c.json") == []
