"""What a decoder reads while it is compressed or taught, against transformers' own forward."""

import pytest
import torch

from stages.models.text.decoder_answers import LIKELIEST, NOTHING, answered
from tests.stages.models.families import VOCABULARY, family, library


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


def texts():
    return torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))


def logits(model, ids_NS, answers_NS):
    """What transformers says after each token of the answers, -inf in the place of padding."""
    with torch.no_grad():
        return model(input_ids=ids_NS, decoder_input_ids=answers_NS.clamp_min(0)).logits


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_answers_are_drawn_from_what_the_model_finds_likely(root, tmp_path, name):
    model, ids_NS = library(name, family(name, root)), texts()
    state = torch.get_rng_state()
    found_NS = answered(model, ids_NS, tmp_path / "answers.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(answered(model, ids_NS, tmp_path / "again.safetensors"), found_NS)
    assert (found_NS[:, 0] == model.config.decoder_start_token_id).all()
    ranked_NSV = logits(model, ids_NS, found_NS).argsort(-1, descending=True)[:, :-1]
    said_NS = found_NS[:, 1:]
    place_M = (ranked_NSV == said_NS[..., None]).int().argmax(-1)[said_NS != NOTHING]
    assert place_M.max() < LIKELIEST
    # A model of random weights is sure of nothing: an answer of one token for ever would be the likeliest.
    assert (place_M > 0).float().mean() > 0.5
    assert len(said_NS[said_NS != NOTHING].unique()) > 20


def test_what_the_decoder_reads_fills_all_directions_of_its_inputs(root, tmp_path):
    """A moment of rank 1 would let every map be cut to nothing but one direction at no loss."""
    model, ids_NS = library("t5", family("t5", root)), texts()
    found_NS = answered(model, ids_NS, tmp_path / "answers.safetensors")
    with torch.no_grad():
        table_SH = model.get_decoder().embed_tokens(found_NS[found_NS != NOTHING])
    values_H = torch.linalg.svdvals(table_SH).square()
    assert values_H[0] < 0.3 * values_H.sum()


def test_a_model_that_is_sure_says_what_is_likeliest(root, tmp_path):
    model, ids_NS = library("bart", family("bart", root)), texts()
    with torch.no_grad():  # only what stands in the head's place grows: its table is the decoder's, too
        model.final_logits_bias[0] = 500 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2))
    found_NS = answered(model, ids_NS, tmp_path / "answers.safetensors")
    likeliest_NS = logits(model, ids_NS, found_NS).argmax(-1)[:, :-1]
    said_NS = found_NS[:, 1:]
    assert torch.equal(said_NS[said_NS != NOTHING], likeliest_NS[said_NS != NOTHING])
