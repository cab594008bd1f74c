"""Segments are the tokenizer's own: found from the tokens alone, told to whoever learned them, and in the graph."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import AutoModelForQuestionAnswering, BertTokenizer, PreTrainedTokenizerFast

from stages.models.checkpoint.loading import load_model
from stages.models.text.segments import segments, separator
from tests.stages.models.families import family

LETTERS = [*"abcdef"]
BERT = BertTokenizer(vocab={one: at for at, one in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS])})


def test_segments_are_the_tokenizers_whatever_side_is_padded() -> None:
    for side in ("left", "right"):
        BERT.padding_side = side
        given = BERT(["a b c", "d"], ["e f", "a a a b"], padding=True, return_tensors="pt")
        found = segments(given["input_ids"], given["attention_mask"], separator(BERT) or 0)
        counted = given["attention_mask"] > 0
        assert torch.equal(found[counted], given["token_type_ids"][counted])
        assert not segments(BERT("a b", return_tensors="pt")["input_ids"], None, 3).any()


def test_a_separator_among_padding_ends_no_text() -> None:
    ids_NT, mask_NT = torch.tensor([[3, 3, 2, 5, 3, 6, 3]]), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    assert segments(ids_NT, mask_NT, 3)[0, 2:].tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("pair", "names", "known"),
    [
        ("<s> $A:0 <e> $B:1 <e>:1", ["input_ids", "token_type_ids"], True),
        ("<s> $A:0 <e> $B:1 <e>:1", ["input_ids", "attention_mask"], False),  # as RoBERTa's: its model has one segment
        ("<s> $A:0 <e> <e> $B:0 <e>:0", ["input_ids", "token_type_ids"], False),
        ("$A:0 $B:1", ["input_ids", "token_type_ids"], False),  # nothing stands between
        ("<s>:1 $A:0 <e> $B:1 <e>:1", ["input_ids", "token_type_ids"], False),  # by another rule
    ],
)
def test_tokenizers_that_tell_texts_apart_otherwise_are_left_alone(pair: str, names: list[str], known: bool) -> None:
    made = Tokenizer(
        models.WordLevel({one: at for at, one in enumerate(["<u>", "<s>", "<e>", "the"])}, unk_token="<u>")
    )
    special = [("<s>", 1), ("<e>", 2)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A <e>", pair=pair, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<u>", model_input_names=names)
    assert separator(tokenizer) == (2 if known else None)


@torch.no_grad()
def test_loaded_model_answers_as_transformers_does_with_segments(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(family("bert_answers", tmp_path / "families"), folder)
    given = BERT("a b", "c d e f a", return_tensors="pt")
    bare = load_model(folder)(input_ids=given["input_ids"]).start_logits
    BERT.save_pretrained(folder)
    theirs = AutoModelForQuestionAnswering.from_pretrained(folder, dtype=torch.float32).eval()(**given).start_logits
    ours = load_model(folder)(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).start_logits
    torch.testing.assert_close(ours, theirs)
    assert (bare - theirs).abs().max() > 1e-3  # without a tokenizer nothing is told, and that shows
    none = torch.zeros_like(given["input_ids"])
    said = load_model(folder)(input_ids=given["input_ids"], token_type_ids=none).start_logits
    torch.testing.assert_close(said, bare)  # who says it himself is heard
