import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from stages.measures.documents import score_documents, summary
from stages.measures.predictions import Asking
from stages.runtime.contract import StageError

IDS_NT = torch.randint(0, 20, (4, 33), generator=torch.Generator().manual_seed(0))


def predictor(seed, vocabulary=20):
    table = np.random.default_rng(seed).normal(0, 2, (20, vocabulary)).astype(np.float32)
    return lambda ids_NT: table[ids_NT]


def test_scores_of_each_document_equal_scipys():
    model, baseline = predictor(1), predictor(2)
    found = list(score_documents(IDS_NT, model, baseline, Asking(), "test"))
    assert len(found) == 4
    for ids_T, document in zip(IDS_NT.numpy(), found, strict=True):
        q_TV, p_TV = model(ids_T[:-1]).astype(float), baseline(ids_T[:-1]).astype(float)
        assert document["tokens"] == 32
        assert document["nll"] == pytest.approx(-log_softmax(q_TV, 1)[np.arange(32), ids_T[1:]].sum())
        assert document["kl"] == pytest.approx(rel_entr(softmax(p_TV, 1), softmax(q_TV, 1)).sum())
        assert document["agree"] == int((p_TV.argmax(1) == q_TV.argmax(1)).sum())


def test_ids_name_the_tokens_and_stay_the_same_for_another_model():
    first = [document["id"] for document in score_documents(IDS_NT, predictor(1), None, Asking(), "test")]
    second = [document["id"] for document in score_documents(IDS_NT, predictor(2), None, Asking(), "test")]
    other = [document["id"] for document in score_documents((IDS_NT + 1) % 20, predictor(1), None, Asking(), "test")]
    assert first == second
    assert not set(first) & set(other)
    assert len(set(first)) == 4


def test_no_more_than_one_window_is_predicted_at_a_time():
    shapes = []
    model = predictor(1)
    list(score_documents(IDS_NT, lambda ids: shapes.append(ids.shape) or model(ids), None, Asking(), "test"))
    assert set(shapes) == {(1, 33)}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_distribution_are_refused_naming_the_document(bad):
    def spoiled(ids_NT):
        logits_NTV = predictor(1)(ids_NT)
        if (ids_NT == IDS_NT[2].numpy()).all():
            logits_NTV[0, 7, 3] = bad
        return logits_NTV

    name = list(score_documents(IDS_NT, predictor(1), None, Asking(), "test"))[2]["id"]
    with pytest.raises(StageError, match=f"the model gave logits on document {name}"):
        list(score_documents(IDS_NT, spoiled, None, Asking(), "test"))
    with pytest.raises(StageError, match=f"its baseline gave logits on document {name}"):
        list(score_documents(IDS_NT, predictor(1), spoiled, Asking(), "test"))


def test_a_baseline_with_more_tokens_is_refused():
    with pytest.raises(StageError, match="another vocabulary") as caught:
        list(score_documents(IDS_NT, predictor(1), predictor(2, vocabulary=21), Asking(), "test"))
    assert caught.value.measured == "21 tokens"


def test_summary_weights_documents_by_their_tokens():
    documents = [
        {"id": "a", "tokens": 10, "nll": 10.0, "kl": 1.0, "agree": 9},
        {"id": "b", "tokens": 30, "nll": 60.0, "kl": 7.0, "agree": 11},
    ]
    assert summary(documents) == {
        "perplexity": pytest.approx(math.exp(70 / 40)),
        "kl_divergence": pytest.approx(8 / 40),
        "top1_agreement": pytest.approx(20 / 40),
    }


def test_summary_without_a_baseline_has_perplexity_alone():
    assert summary([{"id": "a", "tokens": 2, "nll": 2.0}]) == {"perplexity": pytest.approx(math.e)}


def test_summary_beyond_float64_is_refused():
    with pytest.raises(StageError, match="beyond float64"):
        summary([{"id": "a", "tokens": 1, "nll": 1e5}])
