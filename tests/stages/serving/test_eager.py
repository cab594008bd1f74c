"""A row that stands padded beside a longer one is answered as transformers answers it alone."""

from functools import partial

import numpy as np
import pytest
import torch
import transformers

from stages.runtime.contract import StageError
from stages.serving.eager import eager
from stages.serving.generate import greedy
from stages.serving.proven_steps import Anew, Proven
from tests.stages.models.families import family

SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40,
    "max_position_embeddings": 20, "is_decoder": True, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("made", "config"), [("RobertaForCausalLM", "RobertaConfig"), ("BertLMHeadModel", "BertConfig")]
)
def test_row_padded_on_its_left_has_the_answers_of_the_row_alone(made, config, tmp_path):
    torch.manual_seed(0)
    model = getattr(transformers, made)(getattr(transformers, config)(**SHAPE)).eval()
    with torch.no_grad():
        for one in model.parameters():
            one.add_(torch.randn_like(one) * 0.1)
    model.save_pretrained(tmp_path)
    ids = torch.arange(4, 14).view(2, 5)
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 1, 0
    found = torch.from_numpy(eager(tmp_path).forward(ids.numpy(), mask.numpy()))
    with torch.no_grad():
        alone = [model(row[kept.bool()][None]).logits[0] for row, kept in zip(ids, mask, strict=True)]
    torch.testing.assert_close(found[0], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1, 2:], alone[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_row_that_has_ended_is_led_on_beyond_the_last_position(name, tmp_path):
    model = eager(family(name, tmp_path))
    most, draw = model.longest, np.random.default_rng(1)
    ids, mask = draw.integers(4, 90, (2, most - 1)), np.ones((2, most - 1), np.int64)
    mask[1, :-5] = 0
    steps, short = model.steps(), ids[1:, -5:]
    found = [steps.begin(ids, mask)]
    for token in (7, 8, 9, 10):
        found.append(steps.next(np.array([token, token])))
        short = np.append(short, [[token]], axis=1)
    wanted = model.forward(short, np.ones_like(short))[0, 4:]
    np.testing.assert_allclose(np.stack([one[1] for one in found]), wanted, atol=1e-4 * wanted.std())
    whole = model.forward(np.append(ids[:1], [[7]], axis=1), np.ones((1, most), np.int64))[0, -1]
    np.testing.assert_allclose(found[1][0], whole, atol=1e-4 * whole.std())


def test_token_beyond_the_table_is_told_by_steps_too(tmp_path):
    model = eager(family("gpt2", tmp_path))
    with pytest.raises(StageError, match="no such token; measured tokens up to 5000; limit below"):
        model.steps().begin(np.array([[1, 5000]]), np.ones((1, 2), np.int64))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mistral"])
def test_text_is_gone_on_from_an_earlier_token_or_it_is_told_that_it_cannot(name, tmp_path):
    model = eager(family(name, tmp_path))
    draw = np.random.default_rng(2)
    ids, other = draw.integers(4, 90, 14), draw.integers(4, 90, 6)
    steps, parted = model.steps(), np.concatenate([ids[:9], other])
    steps.begin(ids[None], np.ones((1, 14), np.int64))
    wanted = model.forward(parted[None], np.ones((1, 15), np.int64))[0]
    try:
        steps.truncate(9)
    except StageError as error:  # a window that is full has forgotten what it would have to know
        assert "cannot go on from an earlier token" in str(error) and name in ("gemma2", "mistral")
        return
    np.testing.assert_allclose(steps.more(other[:4]), wanted[12], atol=1e-4 * wanted.std())
    np.testing.assert_allclose(steps.next(other[4:5])[0], wanted[13], atol=1e-4 * wanted.std())


_COUNTED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
            "max_position_embeddings": 48, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip
_BESIDE = {
    "xlm-roberta": ("XLMRobertaForCausalLM", "XLMRobertaConfig", _COUNTED | {"is_decoder": True}),
    "pegasus": (
        "PegasusForCausalLM",
        "PegasusConfig",
        {"d_model": 32, "decoder_layers": 2, "bos_token_id": 0, "decoder_ffn_dim": 48, "decoder_attention_heads": 4,
         "max_position_embeddings": 48, "pad_token_id": 0, "eos_token_id": [2, 3]},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        _COUNTED | {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 16},
    ),
}  # fmt: skip
"""Whose positions move where a row is padded on its left, and one that keeps nothing that can be seen."""


@pytest.mark.parametrize("name", _BESIDE)
@torch.no_grad()
def test_prompt_is_continued_beside_a_longer_one_as_the_whole_text_says_alone(name, tmp_path):
    made, config, settings = _BESIDE[name]
    torch.manual_seed(3)
    model = getattr(transformers, made)(getattr(transformers, config)(vocab_size=96, **settings)).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    prompts, wanted = [[5, 9, 40], [7, 60, 11, 30, 21, 8]], []
    for prompt in prompts:
        row = [*prompt]
        for _ in range(5):
            row.append(int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        wanted.append(row[len(prompt) :])
    opened = eager(tmp_path)
    for some in ([0], [1], [0, 1]):
        asked = [prompts[one] for one in some]
        found = greedy(opened.steps(), asked, ends=frozenset(), max_new_tokens=5, maximum_tokens=48)
        assert found == [wanted[one] for one in some]


def test_model_that_is_told_its_positions_keeps_what_it_read_however_its_rounding_answers(tmp_path):
    """Rounded activations answer two ways to read one text unlike: read anew, each token would cost the whole text."""
    opened = eager(family("llama", tmp_path))
    noise = np.random.default_rng(0)

    def rounded(ids_NT, mask_NT):
        logits_NTV = opened.forward(ids_NT, mask_NT)
        return logits_NTV + noise.normal(0, logits_NTV.std(), logits_NTV.shape)

    kept, _, tokens, _ = opened.steps.args
    for placed in (True, False):
        steps = Proven(kept, partial(Anew, rounded, None), tokens, {}, placed=placed)
        steps.begin(np.array([[5, 9, 6, 7], [0, 0, 5, 9]]), np.array([[1, 1, 1, 1], [0, 0, 1, 1]]))
        assert bool(steps.kept_bytes) == placed
    assert opened.steps.keywords == {"placed": True}
