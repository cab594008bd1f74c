"""writing: a model's own text, against transformers' forward of whole texts, and how it begins."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from stages.models.text import writing
from stages.models.text.openings import Opening, ends, openings
from stages.models.text.writing import Manner, Written, together, write
from stages.runtime.contract import StageError
from tests.stages.models.families import family, library
from tests.stages.models.text.test_windows import TEMPLATE, with_bos
from tests.tiny import tiny_tokenizer

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Whole:
    """A model that keeps no cache: it reads all that it is given, and remembers how much that was."""

    def __init__(self, model):
        self.model, self.read = model, []

    def __call__(self, input_ids, past_key_values, use_cache):
        assert past_key_values is None
        self.read.append(input_ids.shape[1])
        return SimpleNamespace(logits=self.model(input_ids=input_ids, use_cache=False).logits)


@pytest.fixture(scope="module")
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def manner(tokenizer, **given):
    said = {"tokens": 40, "temperature": 1.0, "nucleus": 0.9, "seed": 0, "ends": frozenset({tokenizer.eos_token_id})}
    return Manner(**(said | given))


def chat(tokenizer):
    tokenizer.chat_template = CHAT
    return tokenizer


def test_text_with_a_cache_is_the_one_without(model, tokenizer):
    # Many ends, so that texts leave the cache at different times.
    how = manner(tokenizer, ends=frozenset(range(0, 700, 23)))
    for opening in (Opening((0,)), Opening((5, 6, 7), (9, 10))):
        whole = Whole(model)
        cached, plain = write(model, opening, range(24), how), write(whole, opening, range(24), how)
        assert [one.parts for one in cached] == [one.parts for one in plain]
        assert [one.log_p for one in cached] == pytest.approx([one.log_p for one in plain], rel=1e-4)
        assert len({len(one.parts[0]) for one in cached}) > 3
        assert whole.read[:3] == [len(opening.first) + n for n in range(3)]


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mistral", "mamba"])
def test_families_write_with_their_own_caches(name, tmp_path):
    """Sliding windows, tables of positions, caps on logits: whatever the cache, the text is that of whole reads."""
    model = library(name, family(name, tmp_path))
    how = Manner(tokens=24, temperature=1.0, nucleus=0.9, seed=1, ends=frozenset(range(0, 60, 11)))
    cached, plain = (write(one, Opening((1, 2)), range(6), how) for one in (model, Whole(model)))
    assert [one.parts for one in cached] == [one.parts for one in plain]


def test_log_likelihood_is_that_of_the_whole_text_under_the_model_whatever_the_temperature(model, tokenizer):
    opening = Opening((5, 6, 7), (9, 10))
    for one in write(model, opening, range(6), manner(tokenizer, temperature=0.7, nucleus=0.8)):
        answer = one.parts[1] if len(one.parts) == 2 else []
        ids = [*opening.first, *one.parts[0], *(opening.turn if len(one.parts) == 2 else ()), *answer]
        assert len(ids) <= 40
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        places = [*range(3, 3 + len(one.parts[0])), *range(len(ids) - len(answer), len(ids))]
        wanted = [float(log_p[place - 1, ids[place]]) for place in places]
        assert one.mean_log_p == pytest.approx(sum(wanted) / len(wanted), rel=1e-3)


def test_next_token_comes_as_often_as_the_cut_distribution_says(model, tokenizer):
    how = manner(tokenizer, tokens=2, temperature=1.3, nucleus=0.5)
    drawn = [one.parts[0][0] for one in write(model, Opening((17,)), range(4000), how) if one.parts[0]]
    with torch.no_grad():
        p_V = (model(input_ids=torch.tensor([[17]])).logits[0, -1].double() / 1.3).softmax(-1)
    order = p_V.argsort(descending=True).tolist()
    inside = next(n for n in range(1, len(order)) if float(p_V[order[:n]].sum()) >= 0.5)
    assert set(drawn) <= set(order[:inside])
    assert inside > 5 and len(set(drawn)) > inside / 2
    for token in order[:3]:
        share = float(p_V[token] / p_V[order[:inside]].sum())
        assert drawn.count(token) / len(drawn) == pytest.approx(share, abs=4 * (share / len(drawn)) ** 0.5)


def test_text_of_a_number_is_the_same_whatever_is_written_beside_it(model, tokenizer):
    how = manner(tokenizer)
    many, few = write(model, Opening((0,)), range(10), how), write(model, Opening((0,)), [7, 2], how)
    assert [many[7].parts, many[2].parts] == [one.parts for one in few]
    other = write(model, Opening((0,)), range(10), manner(tokenizer, seed=1))
    assert all(one.parts != two.parts for one, two in zip(many, other, strict=True))
    assert [Written(**json.loads(json.dumps(one.record()))) for one in many] == many


def test_question_ends_at_half_and_an_answer_follows(model, tokenizer):
    how = manner(tokenizer, ends=frozenset())
    for one in write(model, Opening((5, 6), (9, 10, 11)), range(4), how):
        assert [len(part) for part in one.parts] == [17, 40 - 2 - 17 - 3]


def test_number_of_texts_side_by_side_is_what_their_cache_allows(model, tokenizer, monkeypatch):
    a_token = 2 * 6 * 2 * 16 * 4  # keys and values, blocks, heads, their size, bytes
    monkeypatch.setattr(writing, "CACHE_BYTES", 3.5 * 40 * a_token)
    assert together(model, Opening((0, 1)), manner(tokenizer)) == 3
    monkeypatch.setattr(writing, "CACHE_BYTES", 1)
    assert together(model, Opening((0, 1)), manner(tokenizer)) == 1
    monkeypatch.setattr(writing, "CACHE_BYTES", 10**12)
    assert together(model, Opening((0, 1)), manner(tokenizer)) == writing.MOST_TOGETHER


def test_model_whose_logits_are_no_numbers_is_refused(tiny, tokenizer):
    broken = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    with pytest.raises(StageError, match="logits that are no distribution while it wrote"):
        write(broken, Opening((0,)), range(2), manner(tokenizer))


def test_text_begins_as_the_tokenizer_begins_it_or_with_what_ends_one(reference, tiny, tokenizer):
    config = LlamaConfig(vocab_size=800, bos_token_id=None, eos_token_id=0)
    assert openings(with_bos(reference), config) == [Opening((0,))]
    assert openings(tokenizer, config) == [Opening((tokenizer.eos_token_id,))]
    bare = tiny_tokenizer(reference[:20_000])
    bare.eos_token = bare.pad_token = None
    config = LlamaConfig(vocab_size=800, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with pytest.raises(StageError, match=r"no token begins a text.*bos_token_id"):
        openings(bare, config)


def test_conversation_begins_as_the_template_and_what_the_template_writes_begins_no_text(reference):
    made = tiny_tokenizer(reference[:20_000])
    made.add_special_tokens({"bos_token": "<|user|>", "unk_token": "<|text|>"})
    chat(made)
    config = LlamaConfig(vocab_size=len(made), bos_token_id=made.bos_token_id, eos_token_id=made.eos_token_id)
    text, conversation = openings(made, config)
    assert made.decode(text.first) == "<|text|>", "neither <|user|> nor <end>, which the template writes"
    assert made.decode(conversation.first) == "<|user|>"
    assert made.decode(conversation.turn) == "<end>\n<|assistant|>"
    assert ends(made, config) == {made.bos_token_id, made.eos_token_id, made.unk_token_id}


@pytest.mark.parametrize("template", [TEMPLATE, "{{ raise_exception('never') }}", "fixed"])
def test_template_that_takes_no_user_alone_begins_no_conversation(reference, template):
    made = tiny_tokenizer(reference[:20_000])
    made.chat_template = template
    found = openings(made, LlamaConfig(vocab_size=800))
    assert len(found) == (2 if template == TEMPLATE else 1)


def wordy(words):
    """A tokenizer of whole words, of which most are capitalized."""
    vocabulary = {word: n for n, word in enumerate(["<end>", "?", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="?")


CAPITALIZED = [f"{one}{two}{end}" for one in ("Ba", "Ko", "Ri", "Tu", "Se") for two in "aeiou" for end in "nlmd"]
OTHERS = ["the", "of", "A", "It", "USA", "abC", "x1", "Don't", "狗", "东京", "12", "Ёлка", "ёлка"]


def test_texts_begin_with_the_vocabulary_s_words_where_it_has_enough():
    tokenizer = wordy([*CAPITALIZED, *OTHERS])
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0)
    plain, drawn = openings(tokenizer, config)
    assert plain == Opening((0,)) and drawn.first == (0,)
    assert {tokenizer.decode(word) for word in drawn.words} == {*CAPITALIZED, "东京", "Ёлка"}
    few = wordy([*CAPITALIZED[:99], *OTHERS[:6]])
    assert openings(few, LlamaConfig(vocab_size=len(few), bos_token_id=None, eos_token_id=0)) == [Opening((0,))]


def test_text_behind_a_word_goes_on_from_it_as_the_model_says(model, tokenizer):
    words = ((5, 6), (7,), (8, 9, 10))
    opening, how = Opening((0,), words=words), manner(tokenizer, ends=frozenset())
    texts = write(model, opening, range(30), how)
    assert {tuple(one.parts[0][: one.given]) for one in texts} == set(words) and opening.longest == 4
    assert [one.parts for one in write(model, opening, [9, 4], how)] == [texts[9].parts, texts[4].parts]
    other = write(model, opening, range(30), manner(tokenizer, seed=1, ends=frozenset()))
    assert [one.given for one in other] != [one.given for one in texts]
    for one in texts[:6]:
        ids = [0, *one.parts[0]]
        assert len(ids) == 40 and one.given == len(opening.word(0, one.number))
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = [float(log_p[place - 1, ids[place]]) for place in range(1 + one.given, len(ids))]
        assert one.mean_log_p == pytest.approx(sum(wanted) / len(wanted), rel=1e-3)
    whole = write(Whole(model), opening, range(6), how)
    assert [one.parts for one in whole] == [one.parts for one in texts[:6]]
