"""Text that comes token by token: never half a character, never a character of a stop string, and whole in the end."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stages.serving.writing import Writing

TEXTS = ["plain words", "你好，世界", "a 👩‍👩‍👧 family 🎉🎉", "naïve — café", "x\ufffdy", "日本語とemoji🙂"]


def bytes_alone():
    """Each byte a token, as GPT-2 writes bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({one: number for number, one in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    return made


def bytes_beside():
    """Letters, and single bytes for what has none, as SentencePiece falls back."""
    letters = [chr(one) for one in range(32, 127)] + ["好"]
    pieces = [f"<0x{one:02X}>" for one in range(256)] + letters
    made = Tokenizer(models.BPE({one: number for number, one in enumerate(pieces)}, [], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    return made


def told(writing, tokens):
    """The pieces, and how many tokens were read."""
    pieces, read = [], 0
    for read in range(1, len(tokens) + 1):
        pieces.append(writing.piece(tokens[:read]))
        if writing.ends(tokens[:read]):
            break
    return [*pieces, writing.piece(tokens[:read], last=True)], read


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [bytes_alone(), bytes_beside()], ids=["alone", "beside"])
def test_pieces_are_whole_characters_and_make_the_text(tokenizer, text):
    tokens = tokenizer.encode(text).ids
    assert tokenizer.decode(tokens) == text and len(tokens) >= len(text)
    for upto in range(1, len(tokens) + 1):
        whole = tokenizer.decode(tokens[:upto])
        pieces, _ = told(Writing(tokenizer), tokens[:upto])
        assert "".join(pieces) == Writing(tokenizer).text(tokens[:upto]) == whole
        assert all("\ufffd" not in one for one in pieces[:-1]) or "\ufffd" in text
    if text.isascii():
        assert all(len(one) == 1 for one in pieces[: len(text)])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [bytes_alone(), bytes_beside()], ids=["alone", "beside"])
def test_text_ends_before_each_stop_string_that_is_in_it(tokenizer, text):
    tokens = tokenizer.encode(text).ids
    for start in range(len(text)):
        for length in (1, 2, 4):
            stop = text[start : start + length]
            if "\ufffd" in stop:
                continue
            writing = Writing(tokenizer, (stop, "never", text + "x"))
            pieces, read = told(writing, tokens)
            assert "".join(pieces) == text[: text.index(stop)] and writing.stopped
            assert read <= len(tokens)


def test_first_of_two_stop_strings_ends_the_text_and_no_more_is_read_than_it_takes():
    tokenizer = bytes_alone()
    writing = Writing(tokenizer, ("lo w", "wo"))
    pieces, read = told(writing, tokenizer.encode("hello world").ids)
    assert "".join(pieces) == "hel" and read == 7


def test_what_may_begin_a_stop_string_waits_until_it_does_not():
    tokenizer = bytes_alone()
    writing, tokens = Writing(tokenizer, ("abc",)), tokenizer.encode("xabab").ids
    assert [writing.piece(tokens[: at + 1]) for at in range(5)] == ["x", "", "", "ab", ""]
    assert writing.piece(tokens, last=True) == "ab" and not writing.stopped


def test_special_token_may_be_a_stop_string_though_no_text_has_it():
    tokenizer = bytes_alone()
    tokens = tokenizer.encode("hi<|end|>more").ids
    pieces, read = told(Writing(tokenizer, ("<|end|>",)), tokens)
    assert "".join(pieces) == "hi" and read == 3
    assert "".join(told(Writing(tokenizer), tokens)[0]) == "himore"
