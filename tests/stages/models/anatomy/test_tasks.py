"""What a model is for, and how much it reads, against what transformers itself takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from stages.models.anatomy import tasks
from stages.models.checkpoint.loading import load_config
from tests.stages.models.families import FAMILIES, VOCABULARY, WIDER, family, library

ENDLESS = {"t5", "t5_plain", "bloom", "mamba"}
BY_TABLE = ("gpt2", "opt", "bert_masked", "roberta", "distilbert", "albert", "electra")


@pytest.mark.parametrize("name", FAMILIES | WIDER)
def test_how_much_a_model_reads(name: str, tmp_path: Path) -> None:
    config = load_config(family(name, tmp_path))
    most = tasks.longest(config)
    assert (most is None) == (name in ENDLESS)
    assert name == "falcon" or most in (None, 64, 62)


@pytest.mark.parametrize("name", BY_TABLE)
def test_a_table_of_positions_holds_so_many_and_not_one_more(name: str, tmp_path: Path) -> None:
    folder = family(name, tmp_path)
    most = tasks.longest(load_config(folder))
    assert most
    model = library(name, folder)
    ids_NT = torch.arange(most + 1)[None] % (VOCABULARY - 5) + 4
    with torch.no_grad():
        model(input_ids=ids_NT[:, :-1])
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids_NT)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama", "generate"), ("bert_decoder", "generate"), ("bert_masked", "fill"), ("bert_classes", "classify"),
        ("bert_tokens", "tag"), ("bert_answers", "answer"), ("bert_choices", "choose"),
        ("bert_bare", "embed"), ("t5", "translate"),
        ("marian", "translate"), ("mamba", "generate"),
    ],
)  # fmt: skip
def test_task(name: str, wanted: str, tmp_path: Path) -> None:
    assert tasks.task(load_config(family(name, tmp_path))) == wanted


def test_a_classifier_with_one_class_gives_a_number() -> None:
    config = transformers.LlamaConfig(num_labels=1, architectures=["LlamaForSequenceClassification"])
    assert tasks.task(config) == "score"


@pytest.mark.parametrize(
    ("name", "changes", "given", "tells"),
    [
        ("bert_answers", {}, True, True),
        ("bert_classes", {}, True, True),
        ("bert_choices", {}, True, True),
        ("bert_bare", {}, True, True),
        ("electra", {}, True, True),
        ("albert", {}, True, True),
        ("bert_answers", {}, False, False),
        ("bert_answers", {"type_vocab_size": 1}, True, False),
        ("deberta", {}, True, False),
        ("distilbert", {}, True, False),
        ("bert_decoder", {}, True, False),
        ("gpt2", {}, True, False),
    ],
)
def test_segments_are_told_to_those_that_have_more_than_one_where_tokenizers_do(name, changes, given, tells, tmp_path):
    config = load_config(family(name, tmp_path))
    for key, value in changes.items():
        setattr(config, key, value)
    assert tasks.tells_segments(config, ("input_ids", *(("token_type_ids",) if given else ()))) == tells


def test_biases_of_distances_that_end_are_an_end_of_what_is_read():
    config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=24)
    config.architectures = ["MptForCausalLM"]
    assert tasks.longest(config) == 24
    model = transformers.MptForCausalLM(config).eval()
    ids_NT = torch.arange(25)[None]
    assert model(ids_NT[:, :24]).logits.shape[1] == 24
    with pytest.raises(RuntimeError, match="must match the size"):
        model(ids_NT)
