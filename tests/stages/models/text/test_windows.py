"""windows: text stays text, conversations are the template's, and each begins and ends as the tokenizer would."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from stages.models.text.text_ends import pair_ends, special_ends
from stages.models.text.windows import QUESTION_TOKENS, windows
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.tiny import tiny_tokenizer

PROSE = "The statement is executed when a class is defined. A name may be bound in a block, or in the module."
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no critic') }}{% endif %}"
    "{{ m.role }}: {{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
)


def byte_level(reference: str) -> PreTrainedTokenizerBase:
    return tiny_tokenizer(reference[:60_000])


def word_piece(reference: str) -> PreTrainedTokenizerBase:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=words, show_progress=False)
    made.train_from_iterator(reference[:60_000].split("\n\n"), trainer)
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    made.decoder = decoders.WordPiece()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), words, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def unigram(reference: str) -> PreTrainedTokenizerBase:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = ["<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=words, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(reference[:60_000].split("\n\n"), trainer)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>"
    )


def with_bos(reference: str) -> PreTrainedTokenizerBase:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Replace("▁", " ")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False, max_token_length=8
    )
    made.train_from_iterator(reference[:20_000].split("\n"), trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def in_python(reference: str) -> PreTrainedTokenizerBase:
    return ByT5Tokenizer()


KINDS: dict[Callable[[str], PreTrainedTokenizerBase], tuple[list[int], list[int]]] = {
    byte_level: ([], []),
    word_piece: ([2], [3]),
    unigram: ([], [1]),
    with_bos: ([0], []),
    in_python: ([], [1]),
}


def corpus(folder: Path, rows: Sequence[str | list[dict[str, str]]], **record: Any) -> Path:
    named = [("text" if isinstance(row, str) else "messages", row) for row in rows]
    lines = [json.dumps({"id": f"{number}#0", name: row}) for number, (name, row) in enumerate(named)]
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "corpus.json").write_text(json.dumps(record))
    return folder


def control(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    found = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return found - {tokenizer.unk_token_id}


def text_of(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[int]:
    """What stands between the ends."""
    before, after = special_ends(tokenizer)
    return [token for row in rows for token in row[len(before) : len(row) - len(after)]]


def test_windows_of_a_tokenizer_that_adds_nothing_are_those_of_its_ids_in_a_row(tmp_path: Path, reference: str) -> None:
    tokenizer, rows = byte_level(reference), reference[:8000].split("\n\n")
    ids = [token for row in rows for token in tokenizer(f"{row}\n\n", add_special_tokens=False)["input_ids"]]
    wanted = [ids[start : start + 50] for start in range(0, len(ids) - 49, 50)]
    folder = corpus(tmp_path, rows)
    assert len(wanted) > 20 and windows(folder, "test", tokenizer, 50).tolist() == wanted
    assert windows(folder, "test", tokenizer, 50, most=7).tolist() == wanted[:7]
    assert special_ends(tokenizer) == ([], [])


@pytest.mark.parametrize("kind", KINDS)
def test_window_begins_and_ends_as_the_tokenizer_and_holds_text_between(
    tmp_path: Path, reference: str, kind: Callable[[str], PreTrainedTokenizerBase]
) -> None:
    tokenizer = kind(reference)
    before, after = special_ends(tokenizer)
    assert (before, after) == KINDS[kind]
    found = windows(corpus(tmp_path, [PROSE] * 20), "test", tokenizer, 24).tolist()
    assert all(row[: len(before)] == before and row[24 - len(after) :] == after for row in found)
    ids = tokenizer(f"{PROSE}\n\n", add_special_tokens=False)["input_ids"] * 20
    inside = text_of(tokenizer, found)
    assert len(inside) > 200 and inside == ids[: len(inside)] and len(ids) - len(inside) < 24
    room = len(before) + len(after)
    assert windows(tmp_path, "test", tokenizer, room + 1, most=1).shape == (1, room + 1)
    if room:
        with pytest.raises(StageError, match=f"no room for text.*measured {room} tokens; limit {room + 1}"):
            windows(tmp_path, "test", tokenizer, room)


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_control_tokens_stay_text_unless_they_are_to_be_parsed(
    tmp_path: Path, reference: str, kind: Callable[[str], PreTrainedTokenizerBase]
) -> None:
    tokenizer = kind(reference)
    words = [
        str(added.content) for token, added in tokenizer.added_tokens_decoder.items() if token in control(tokenizer)
    ]
    rows = [f"The {word} of a class{word} is" for word in words[:8]] * 20
    found = text_of(tokenizer, windows(corpus(tmp_path, rows), "test", tokenizer, 16).tolist())
    assert len(found) > 100 and control(tokenizer).isdisjoint(found)
    said = "".join(tokenizer.decode(found).lower().split())
    assert said.startswith("".join("".join(rows).lower().split())[:100]), "not a character is lost"
    folder = corpus(tmp_path, rows, control_tokens="parse")
    parsed = text_of(tokenizer, windows(folder, "test", tokenizer, 16).tolist())
    whole = [token for row in rows for token in tokenizer(f"{row}\n\n", add_special_tokens=False)["input_ids"]]
    # One that a window begins with anyway is not put there twice.
    parsed, whole = ([token for token in ids if token not in special_ends(tokenizer)[0]] for ids in (parsed, whole))
    assert parsed == whole[: len(parsed)]
    assert sum(token in control(tokenizer) for token in parsed) > len(rows) / 2


def chat(number: int, *, word: str = "") -> list[dict[str, str]]:
    asked = f" What is statement {number}?{word} "
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": f"{PROSE}{word}"}]


@pytest.mark.parametrize("kind", [byte_level, with_bos])
def test_conversation_is_written_by_the_template(
    tmp_path: Path, reference: str, kind: Callable[[str], PreTrainedTokenizerBase]
) -> None:
    tokenizer = kind(reference)
    tokenizer.chat_template = TEMPLATE
    rows = [chat(number) for number in range(12)]
    found = windows(corpus(tmp_path, rows), "test", tokenizer, 32).tolist()
    whole = [tokenizer.apply_chat_template(row, return_dict=False) for row in rows]
    before, _ = special_ends(tokenizer)
    assert found[0] == whole[0][:32], "what begins a window is not put there twice"
    if not before:
        ids = [token for row in whole for token in row]
        assert [token for row in found for token in row] == ids[: 32 * len(found)]
    # A conversation within a window begins by the template's own token.
    assert sum(row[1:].count(before[0]) for row in found if before) > (5 if before else -1)


def test_words_of_a_conversation_stay_text_beside_the_template_s_tokens(tmp_path: Path, reference: str) -> None:
    tokenizer = byte_level(reference)
    tokenizer.chat_template = TEMPLATE
    end = tokenizer.eos_token_id
    rows = [chat(number, word=" <end> or<end>") for number in range(12)]
    found = [token for row in windows(corpus(tmp_path, rows), "test", tokenizer, 8).tolist() for token in row]
    bare = [tokenizer.apply_chat_template(chat(number), return_dict=False).count(end) for number in range(12)]
    assert bare == [2] * 12 and found.count(end) == 24
    wanted = "".join(tokenizer.apply_chat_template(row, tokenize=False) for row in rows)
    assert wanted.startswith(tokenizer.decode(found)) and len(wanted) - len(tokenizer.decode(found)) < 40
    parsed = windows(corpus(tmp_path, rows, control_tokens="parse"), "test", tokenizer, 8)
    assert int((parsed == end).sum()) == 24 + 12 * 4


class Heard(Silent):
    """What is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_conversation_without_a_template_is_plain_text_and_it_is_said_once(tmp_path: Path, reference: str) -> None:
    tokenizer, rows, heard = byte_level(reference), [chat(number) for number in range(5)], Heard()
    found = windows(corpus(tmp_path, rows), "test", tokenizer, 16, progress=heard)
    plain = [f"{asked['content']}\n\n{answered['content']}" for asked, answered in rows]
    assert found.equal(windows(corpus(tmp_path, plain), "test", tokenizer, 16, progress=heard))
    assert heard.said == ["the tokenizer has no chat template: conversations are read as plain text"]
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "no"}  # type: ignore[assignment]
    assert (
        windows(corpus(tmp_path, rows), "test", tokenizer, 16, progress=heard)[0].tolist()
        == (tokenizer.apply_chat_template(rows[0], chat_template=TEMPLATE, return_dict=False)[:16])
    )
    assert len(heard.said) == 1


def test_conversation_that_the_template_refuses_is_named(tmp_path: Path, reference: str) -> None:
    tokenizer = byte_level(reference)
    tokenizer.chat_template = TEMPLATE
    folder = corpus(tmp_path, [chat(0), [{"role": "critic", "content": "Bad."}]])
    with pytest.raises(StageError, match=r"refuses conversation 1#0 of the corpus: no critic; measured roles critic"):
        windows(folder, "test", tokenizer, 16)


def test_word_that_a_tokenizer_cannot_spell_within_a_template_is_refused_with_a_way_out(
    tmp_path: Path, reference: str
) -> None:
    tokenizer = unigram(reference)
    tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    rows = [chat(number, word="</s>") for number in range(12)]
    with pytest.raises(StageError, match=r"cannot write conversation 0#0.*`control_tokens` to parse"):
        windows(corpus(tmp_path, rows), "test", tokenizer, 16)
    assert len(windows(corpus(tmp_path, rows, control_tokens="parse"), "test", tokenizer, 16)) > 5


def test_template_that_writes_today_s_date_gives_the_same_windows_every_day(tmp_path: Path, reference: str) -> None:
    tokenizer = byte_level(reference)
    dated = "\n{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}\n"
    tokenizer.chat_template = dated + " / {{ strftime_now('%Y-%m-%d') }}" + TEMPLATE
    found = windows(corpus(tmp_path, [chat(0)]), "test", tokenizer, 30)
    assert tokenizer.decode(found[0]).startswith("\n26 Jul 2024 / 2024-07-26user: Wh")


def test_split_that_is_not_there_is_refused(tmp_path: Path, reference: str) -> None:
    with pytest.raises(StageError, match="no split 'train'; measured test"):
        windows(corpus(tmp_path, [PROSE]), "train", byte_level(reference), 8)
    with pytest.raises(StageError, match=r"shorter than one window; measured \d+ tokens; limit 500 tokens"):
        windows(tmp_path, "test", byte_level(reference), 500)


def test_ends_of_a_vocabulary_that_knows_no_latin_letter_are_found_by_its_own_words():
    made = Tokenizer(
        models.BPE({"<b>": 0, "<e>": 1, "語": 2, "文": 3}, [])
    )  # without <unk> it drops what it does not know
    made.post_processor = processors.TemplateProcessing(
        single="<b> $A <e>", pair="<b> $A <e> $B <e>", special_tokens=[("<b>", 0), ("<e>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<b>", eos_token="<e>")
    assert special_ends(tokenizer) == ([0], [1])


def test_windows_of_a_reader_are_questions_with_their_contexts(tmp_path: Path) -> None:
    words = "who where is lives anna boris rome oslo in and plain words of a text that asks nothing at all".split()
    tokenizer = BertTokenizer(vocab={one: at for at, one in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])})
    rows = [
        [{"role": "user", "content": f"where is {who}"}, {"role": "assistant", "content": f"{who} lives in {town}"}]
        for who, town in (("anna", "rome"), ("boris", "oslo"), ("anna", "oslo"))
    ]
    found = windows(corpus(tmp_path, rows), "test", tokenizer, 12, task="answer")
    assert tokenizer.batch_decode(found) == [
        # What follows fills a window; what it then has no room for stands whole in the next.
        "[CLS] where is anna [SEP] anna lives in rome where is [SEP]",
        "[CLS] where is boris [SEP] boris lives in oslo where is [SEP]",
    ]
    plain = windows(corpus(tmp_path, [" ".join(words * 3)]), "test", tokenizer, 30, task="answer")
    for row, start in zip(plain.tolist(), range(0, 54, 27), strict=True):
        ids = [4 + at % len(words) for at in range(start, start + 27)]
        assert row == [2, *ids[:QUESTION_TOKENS], 3, *ids[QUESTION_TOKENS:], 3]
    # Half of a short window is left to the context.
    assert windows(tmp_path, "test", tokenizer, 9, task="answer")[0].tolist() == [2, 4, 5, 6, 3, 7, 8, 9, 3]
    with pytest.raises(StageError, match=r"no room for text between .* measured 4 tokens; limit 5 tokens"):
        windows(tmp_path, "test", tokenizer, 4, task="answer")


def test_an_encoder_reads_what_is_asked_and_not_what_is_answered(tmp_path: Path, reference: str) -> None:
    tokenizer = byte_level(reference)
    rows = [[{"role": "user", "content": "one two"}, {"role": "assistant", "content": "eins zwei"}]] * 6
    said = tokenizer.decode(windows(corpus(tmp_path, rows), "test", tokenizer, 16, task="translate")[0])
    assert "one two" in said and "eins" not in said and "zwei" not in said


def test_tokenizer_that_puts_nothing_between_two_texts_has_no_ends_there(reference: str) -> None:
    assert pair_ends(byte_level(reference)) == ([], [], [])
    assert pair_ends(BertTokenizer(vocab={"[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4})) == ([2], [3], [3])
