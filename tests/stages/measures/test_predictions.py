"""What is scored of a model of each task, against transformers' own forward and loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from scipy.special import log_softmax
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from torch.nn.functional import cosine_similarity

from stages.measures.documents import read_documents, score_documents, summary
from stages.measures.predictions import Asking
from stages.runtime.contract import StageError
from stages.serving.eager import eager
from stages.serving.engine import Answerer
from tests.stages.models.families import FAMILIES, VOCABULARY, WIDER, family, library

EVERY = FAMILIES | WIDER
IDS_NT = torch.randint(5, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
MASK = 4


def scored(name: str, root: Path, asking: Asking | None = None) -> tuple[list[dict[str, float]], Asking]:
    opened = eager(family(name, root))
    asking = asking or Asking(opened.task, mask=MASK)

    def answer(ids_NT):
        return opened.forward(ids_NT, (ids_NT >= 0).astype("int64"))

    return list(score_documents(IDS_NT, answer, answer, asking, "test")), asking


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_every_model_is_scored_by_what_it_is(name: str, tmp_path: Path) -> None:
    found, asking = scored(name, tmp_path)
    model = library(name, tmp_path / name)
    wanted = [_wanted(asking.task, model, ids_T[None]) for ids_T in IDS_NT]
    for document, (score, value, rows) in zip(found, wanted, strict=True):
        assert document["tokens"] == rows == asking.rows(IDS_NT.shape[1])
        assert document[score] / rows == pytest.approx(value, abs=1e-4)
    assert read_documents(_json(found), IDS_NT, asking, "test", first=0, paired=True) == found
    _same_as_itself(summary(found))


def _json(found: object) -> bytes:
    return json.dumps(found).encode()


def _same_as_itself(measures: dict[str, float]) -> None:
    for name, value in {
        "kl_divergence": 0,
        "top1_agreement": 1,
        "cosine": 1,
        "contrast": 1,
        "relative_error": 0,
    }.items():
        if name in measures:
            assert measures[name] == pytest.approx(value, abs=1e-6)


def _wanted(task: str, model: torch.nn.Module, ids_1T: Tensor) -> tuple[str, float, int]:
    if task == "generate":
        logits_TV = model(input_ids=ids_1T).logits[0, :-1].double().numpy()
        ids_T = ids_1T[0, 1:].numpy()
        return "nll", -float(log_softmax(logits_TV, 1)[range(len(ids_T)), ids_T].mean()), len(ids_T)
    if task == "translate":
        return "nll", float(model(input_ids=ids_1T, labels=ids_1T).loss), ids_1T.shape[1]
    if task == "fill":
        return "masked_nll", _hidden_one_by_one(model, ids_1T), ids_1T.shape[1]
    if task == "choose":  # a number has no direction
        return "error", 0.0, 1
    rows = {"classify": 1, "answer": 2}.get(task, ids_1T.shape[1])
    return "cosine", 1.0, rows


def _hidden_one_by_one(model: torch.nn.Module, ids_1T: Tensor) -> float:
    losses = []
    for place, token in enumerate(ids_1T[0].tolist()):
        hidden = ids_1T.clone()
        hidden[0, place] = MASK
        labels = torch.full_like(ids_1T, -100)
        labels[0, place] = token
        losses.append(float(model(input_ids=hidden, labels=labels).loss))
    return math.fsum(losses) / len(losses)


@torch.no_grad()
def test_what_the_tokenizer_adds_is_read_and_not_scored(tmp_path: Path) -> None:
    plain, _ = scored("llama", tmp_path)
    begun, _ = scored("llama", tmp_path, Asking(before=1))
    assert [one["nll"] for one in begun] == [one["nll"] for one in plain]  # the first token is never predicted
    ended, asking = scored("llama", tmp_path, Asking(before=3, after=2))
    logits_TV = library("llama", tmp_path / "llama")(input_ids=IDS_NT[:1]).logits[0, 2:-3].double().numpy()
    ids_T = IDS_NT[0, 3:-2].numpy()
    assert ended[0]["tokens"] == len(ids_T) == asking.rows(IDS_NT.shape[1])
    assert ended[0]["nll"] == pytest.approx(-log_softmax(logits_TV, 1)[range(len(ids_T)), ids_T].sum(), abs=1e-3)
    filled, asking = scored("bert_masked", tmp_path, Asking("fill", 1, 1, MASK))
    assert filled[0]["tokens"] == IDS_NT.shape[1] - 2 == asking.rows(IDS_NT.shape[1])


def test_classes_and_vectors_differ_as_they_do(tmp_path: Path) -> None:
    for name in ("bert_classes", "bert_tokens", "bert_answers", "bert_choices", "bert_bare"):
        opened = eager(family(name, tmp_path))

        def answer(ids_NT, opened=opened):
            return opened.forward(ids_NT, (ids_NT >= 0).astype("int64"))

        def other(ids_NT, answer=answer):
            return answer(ids_NT) * 2 + 1

        [first, _] = score_documents(IDS_NT, other, answer, Asking(opened.task), "test")
        a_RV = torch.from_numpy(answer(IDS_NT[:1].numpy())[0]).double()
        a_RV = a_RV.view(-1, a_RV.shape[-1])
        wanted = cosine_similarity(a_RV, a_RV * 2 + 1, dim=-1)
        assert ("cosine" in first) == (name != "bert_choices")  # a number has no direction
        assert first.get("cosine", wanted.sum()) == pytest.approx(float(wanted.sum()), abs=1e-5)
        error = ((a_RV + 1).norm(dim=-1) / a_RV.norm(dim=-1)).sum()
        assert first["error"] == pytest.approx(float(error), rel=1e-5)


def test_vector_of_a_window_is_told_from_that_of_its_first_half() -> None:
    table = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).numpy()
    read = []

    def near(ids_NT):
        read.append(ids_NT[0].tolist())
        return (table[ids_NT].mean(1) + 30).astype("float32")

    def one(ids_NT):
        return (0 * table[ids_NT].mean(1) + 30).astype("float32")

    asking, ids_NT = Asking("embed", 1, 1, pooled=True), torch.tensor([[1, 7, 8, 9, 10, 11, 2]])
    [alike], [lost] = (score_documents(ids_NT, model, near, asking, "test") for model in (near, one))
    assert read[:2] == [[1, 7, 8, 9, 10, 11, 2], [1, 7, 8, 2]]
    assert alike["tokens"] == lost["tokens"] == asking.rows(7) == 2
    assert alike["contrast"] == pytest.approx(2) and lost["contrast"] == pytest.approx(0)
    assert lost["cosine"] / 2 > 0.999  # which sees nothing of it
    [alone] = score_documents(torch.tensor([[1, 7, 2]]), one, near, asking, "test")
    assert alone["contrast"] == pytest.approx(2)  # one token is its own half: nothing is to be told apart


def test_a_left_padded_row_answers_as_it_does_alone(tmp_path: Path) -> None:
    for name in ("llama", "gpt2", "opt", "bloom", "falcon", "gemma3", "xglm", "mamba"):
        forward = eager(family(name, tmp_path)).forward
        ids, mask = IDS_NT[:, :10].numpy(), (IDS_NT[:, :10] >= 0).long().numpy()
        mask[1, :4] = 0
        alone = forward(ids[1:, 4:], mask[1:, 4:])
        padded = forward(ids, mask)[1:, 4:]
        assert abs(alone - padded).max() < 1e-4, name


def test_nobody_continues_a_text_with_a_model_that_fills_gaps(tmp_path: Path) -> None:
    opened = eager(family("bert_masked", tmp_path))
    answerer = Answerer("torch:cpu", opened.task, 64, Tokenizer(BPE()), frozenset(), opened.forward)
    with pytest.raises(StageError, match="continues no text"):
        answerer.generate(["a"])
