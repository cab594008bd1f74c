"""Texts as people have them: what is read is what was written, whatever holds it."""

from __future__ import annotations

import gzip
import json

from tests.cases.checkpoints import INT8, near
from tests.cases.inputs import llama, paragraphs, plain, prose, rows, saved, words
from tests.cases.place import SPLITS, Place, Result, held, judge


def read(place: Place, judged: str, **sources: str) -> Result:
    """Read texts from several sources in one recipe, one of which a rounded model is judged on."""
    saved(llama(), place.folder / "in" / "model")
    texts = "\n".join(f"{name} corpus {{source: {source}, {SPLITS}}}" for name, source in sources.items())
    steps = f"dense fetch {{source: in/model}}\n{texts}\nq quantize model=dense {{{INT8}}}"
    result = place.run(place.recipe("r", steps, judge("q", corpora=judged, windows="windows: 4, window_tokens: 64")))
    assert result.measured("kl_divergence", "q", judged) < 0.01
    return result


def same(result: Result, name: str, as_: str) -> None:
    """Hold that two corpora hold the same text."""
    one, other = (result.step(step)["metrics"] for step in (name, as_))
    assert (one["characters"], one["passages"]) == (other["characters"], other["passages"]), name


def _parts() -> list[dict[str, object]]:
    return [{"text": part, "id": number} for number, part in enumerate(paragraphs())]


def chat_and_windows_lines(place: Place) -> None:
    """Chat as messages; a byte-order mark, CRLF, empty lines: each text is read; a null is passed over, or named."""
    source, parts = place.folder / "in", _parts()
    rows(source / "clean.jsonl", *parts)
    rows(source / "fewer.jsonl", *parts[:20], *parts[21:])
    said = [[{"role": "user", "content": one["text"]}, {"role": "assistant", "content": "ok"}] for one in parts]
    rows(source / "chat.jsonl", *({"messages": one} for one in said))
    lines = [json.dumps(one) for one in parts]
    written = "\r\n".join([*lines[:3], "", *lines[3:9], "   ", *lines[9:]])
    (source / "win.jsonl").write_bytes(b"\xef\xbb\xbf" + written.encode())
    lines[20] = json.dumps({"text": None, "id": 20})
    (source / "empty.jsonl").write_text("\n".join(lines))
    names = ("clean", "win", "chat")
    result = read(place, "chat", **{name: f"in/{name}.jsonl" for name in names})
    same(result, "win", "clean")
    assert result.step("chat")["metrics"]["characters"] >= result.step("clean")["metrics"]["characters"]
    both = f"fewer corpus {{source: in/fewer.jsonl, {SPLITS}}}\nempty corpus {{source: in/empty.jsonl, {SPLITS}}}"
    said = place.enginery("run", place.recipe("null", both), "--json")
    if said.code:
        assert "empty.jsonl line 21" in said.err and "text" in said.err
    else:
        same(held(said), "empty", "fewer")


def encodings(place: Place) -> None:
    """UTF-16, upper-case names, a list in JSON, a packed file, old line ends: the same text as in UTF-8."""
    source, text, parts = place.folder / "in", prose() + "\n\nÉté: 模型, naïve.", _parts()
    plain(source / "text.txt", text)
    rows(source / "rows.jsonl", *parts)
    (source / "utf16.txt").write_bytes(text.encode("utf-16"))
    plain(source / "NOTES.TXT", text)
    (source / "old-mac.txt").write_bytes(text.replace("\n", "\r").encode())
    (source / "list.json").write_text(json.dumps(parts))
    (source / "rows2.jsonl.gz").write_bytes(gzip.compress((source / "rows.jsonl").read_bytes()))
    texts = {"plain": "in/text.txt", "utf16": "in/utf16.txt", "upper": "in/NOTES.TXT", "mac": "in/old-mac.txt"}
    others = {"rows": "in/rows.jsonl", "list": "in/list.json", "gz": "in/rows2.jsonl.gz"}
    result = read(place, "utf16", **texts, **others)
    for name in ("utf16", "upper", "mac"):
        same(result, name, "plain")
    for name in ("list", "gz"):
        same(result, name, "rows")


def parquet_nested(place: Place) -> None:
    """Columns of messages, of a dictionary, of lists: their texts are read, or it is said what the column is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source, parts = place.folder / "in", paragraphs()
    rows(source / "rows.jsonl", *_parts())
    messages = [[{"role": "user", "content": part}] for part in parts]
    pq.write_table(pa.table({"messages": messages}), source / "chat.parquet")
    pq.write_table(
        pa.table({"text": pa.array(parts).dictionary_encode(), "n": range(len(parts))}), source / "d.parquet"
    )
    pq.write_table(pa.table({"text": [[part] for part in parts]}), source / "list.parquet")
    chats = {"chat": "in/chat.parquet", "column": "in/chat.parquet, column: messages"}
    result = read(place, "chat", rows="in/rows.jsonl", dictionary="in/d.parquet", **chats)
    same(result, "dictionary", "rows")
    same(result, "column", "chat")
    assert result.step("chat")["metrics"]["characters"] >= result.step("rows")["metrics"]["characters"]
    both = f"rows corpus {{source: in/rows.jsonl, {SPLITS}}}\nlist corpus {{source: in/list.parquet, {SPLITS}}}"
    said = place.enginery("run", place.recipe("list", both), "--json")
    if said.code:
        assert "list.parquet" in said.err and "text" in said.err and "list" in said.err.split("list.parquet", 1)[1]
    else:
        same(held(said), "list", "rows")


def special_words(place: Place) -> None:
    """Words of special tokens that stand in a text are text: a tokenizer that has none reads the same windows."""
    source = place.folder / "in"
    plain(source / "text.txt", prose().replace(". ", ". <end> <mask> "))
    model = llama()
    saved(model, source / "model")
    saved(model, source / "without")
    words(source / "without", special=False)
    measured = []
    for name in ("model", "without"):
        result = place.quantized(INT8, f"in/{name}", name=name)
        near(result, "q")
        measured.append(result.measured("perplexity", "dense"))
    assert abs(measured[0] / measured[1] - 1) < 1e-6, "words of a text became control tokens"
