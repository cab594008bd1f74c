"""export: engines read the tokens that transformers reads, whatever its class makes of the files."""

from __future__ import annotations

import json
import shutil

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertTokenizer

from stages.export.stage import ExportParams, _carry, export
from stages.runtime.progress import Silent
from stages.serving.engine import open_engine
from tests.engines import one_block

TEXTS = ("Hello  world it's 12345<|x|>", " Upper and lower\n\n007 ", "it was 12 345 x<end>")
X = {"content": "<|x|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
DIGITS = {"type": "Digits", "individual_digits": True}
GPT2 = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<end>", "bos_token": "<end>"}


def changed(folder, said, *, digits=False):
    """tokenizer_config.json says so; `tokenizer.json` splits digits."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    if digits:
        path = folder / "tokenizer.json"
        read = json.loads(path.read_text())
        steps = {"type": "Sequence", "pretokenizers": [DIGITS, read["pre_tokenizer"]]}
        path.write_text(json.dumps(read | {"pre_tokenizer": steps}))
    return folder


def carried(source, output):
    output.mkdir()
    _carry(source, output)
    return Tokenizer.from_file(str(output / "tokenizer.json"))


@pytest.mark.parametrize(
    ("said", "digits"),
    [
        (GPT2 | {"add_prefix_space": True}, False),
        (GPT2, True),
        ({"tokenizer_class": "Qwen2Tokenizer", "unk_token": "<end>"}, False),
        ({"added_tokens_decoder": {"768": X}, "extra_special_tokens": ["<|x|>"]}, False),
    ],
)
def test_tokenizer_that_its_class_makes_otherwise_is_written_as_it_is_made(tiny, tmp_path, said, digits):
    source = changed(shutil.copytree(tiny, tmp_path / "source"), said, digits=digits)
    theirs, ours = AutoTokenizer.from_pretrained(source), carried(source, tmp_path / "graph")
    given = Tokenizer.from_file(str(source / "tokenizer.json"))
    assert any(given.encode(text).ids != theirs(text).input_ids for text in TEXTS)
    again = AutoTokenizer.from_pretrained(tmp_path / "graph")
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text).input_ids == again(text).input_ids


def test_words_in_lower_case_stay_so_in_the_graph(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "Hello", "world"]
    BertTokenizer(vocab={word: place for place, word in enumerate(words)}, do_lower_case=False).save_pretrained(
        tmp_path
    )
    source = changed(tmp_path, {"do_lower_case": True})
    (source / "config.json").write_text('{"model_type": "bert", "vocab_size": 8}')
    assert carried(source, tmp_path / "graph").encode("Hello world").ids == [2, 5, 7, 3]


def test_tokenizer_that_transformers_reads_as_it_is_keeps_its_bytes(tiny, tmp_path):
    carried(tiny, tmp_path / "graph")
    assert (tmp_path / "graph" / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


def test_padding_and_cuts_are_not_written_into_the_graph(tiny, tmp_path):
    source = changed(shutil.copytree(tiny, tmp_path / "source"), GPT2, digits=True)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(source / "tokenizer.json"))
    written = carried(source, tmp_path / "graph")
    assert written.padding is None
    assert written.truncation is None
    assert written.encode(TEXTS[0]).ids == AutoTokenizer.from_pretrained(source)(TEXTS[0]).input_ids


def test_graph_says_to_a_text_what_its_checkpoint_says(tiny, tmp_path):
    source = changed(one_block(tiny, tmp_path / "source"), GPT2, digits=True)
    (tmp_path / "graph").mkdir()
    export(ExportParams(parity_windows=1, parity_tokens=16), {"model": source}, tmp_path / "graph", Silent())
    both = [open_engine(one).generate(["it was 12 345 x"], max_new_tokens=12) for one in (source, tmp_path / "graph")]
    assert both[0] == both[1]
