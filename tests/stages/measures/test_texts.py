"""Translations and summaries, held against sacrebleu's and rouge-score's own figures on the same texts."""

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from stages.measures import texts
from stages.measures.item_scores import columns

EN = "The cat sat on the mat, and the dog (who was 3.5 years old) barked at it all day; nobody's café heard.".split()
ZH = "今天天气很好，我们去公园看花。北京是中国的首都，2024年有3.5万人来过这里！他们都说ABC公司的产品不错"


def spoilt(rng, words):
    kept = [one for one in words if rng.random() < 0.8]
    return kept if rng.random() < 0.5 else [*kept[len(kept) // 2 :], *kept[: len(kept) // 2]]


def pairs(language, seed, items=25, references=2):
    """(references, translation) of each item; some translations are empty or a word, some right."""
    rng = np.random.default_rng(seed)
    words, gap = (list(ZH), "") if language == "zh" else (EN, " ")
    found = []
    for number in range(items):
        start, length = rng.integers(0, len(words) - 6), rng.integers(1, 18)
        true = words[start : start + length]
        said = {0: [], 1: true[:1], 2: true}.get(number % 8, spoilt(rng, true))
        others = [gap.join(spoilt(rng, true)) or "x" for _ in range(references - 1)]
        found.append(((gap.join(true), *others), gap.join(said)))
    return found


def drawn(given, row):
    return [pair for pair, times in zip(given, row, strict=True) for _ in range(times)]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("seed", range(4))
def test_bleu_and_chrf_equal_sacrebleus_in_every_resample(language, seed):
    given = pairs(language, seed)
    ours = columns([texts.translation(refs, language, said) for refs, said in given])
    weights = np.random.default_rng(seed + 9).multinomial(len(given), [1 / len(given)] * len(given), size=5)
    for row in (*weights, np.ones(len(given), dtype=int), np.eye(len(given), dtype=int)[1]):
        some = drawn(given, row)
        said, streams = [one for _, one in some], list(zip(*(refs for refs, _ in some), strict=True))
        bleu = BLEU(tokenize="zh" if language == "zh" else "13a").corpus_score(said, streams).score
        each = row[None].astype(float)
        assert texts.bleu(ours, each)[0] == pytest.approx(bleu, rel=1e-9)
        assert texts.chrf(ours, each)[0] == pytest.approx(CHRF().corpus_score(said, streams).score, rel=1e-9)
    assert 5 < texts.bleu(ours, np.ones((1, len(given))))[0] < 95


@pytest.mark.parametrize(
    ("reference", "said"),
    [("a b c d e f", "a x b x c x"), ("a b c d e f", "x y z u v w"), ("a b", "a b"), ("a b c d", "a b x d e f g h")],
)
def test_bleu_of_few_matches_is_smoothed_as_sacrebleu_does(reference, said):
    ours = columns([texts.translation([reference], "en", said)])
    assert texts.bleu(ours, np.ones((1, 1)))[0] == pytest.approx(BLEU().corpus_score([said], [[reference]]).score)


def test_items_may_have_different_numbers_of_references():
    given = [
        (("the cat sat there", "a cat was there now"), "a cat sat there now"),
        (("the dog barked loudly",), "a dog barked loudly"),
    ]
    ours = columns([texts.translation(refs, "en", said) for refs, said in given])
    streams = [["the cat sat there", "the dog barked loudly"], ["a cat was there now", None]]
    assert texts.bleu(ours, np.ones((1, 2)))[0] == pytest.approx(
        BLEU().corpus_score([one for _, one in given], streams).score
    )


class Letters:
    """Chinese of these tests as rouge-score is given it by hand: each character, and runs of what is none."""

    def tokenize(self, text):
        found, run = [], ""
        for one in text.lower():
            if "\u4e00" <= one <= "\u9fff":
                found += [run, one]
                run = ""
            elif one.isalnum() or (one == "." and run.isdigit()):
                run += one
            else:
                found.append(run)
                run = ""
        return [one for one in [*found, run] if one]


@pytest.mark.parametrize(("language", "tokenizer"), [("en", None), ("zh", Letters())])
def test_rouge_equals_rouge_scores_in_every_resample(language, tokenizer):
    given = pairs(language, 7)
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=tokenizer)
    each = [theirs.score_multi(list(refs), said) for refs, said in given]
    ours = columns([texts.summary(refs, language, said) for refs, said in given])
    weights = np.random.default_rng(3).multinomial(len(given), [1 / len(given)] * len(given), size=5).astype(float)
    for name, function in (("rouge1", texts.rouge1), ("rouge2", texts.rouge2), ("rougeL", texts.rougel)):
        wanted = [np.average([one[name].fmeasure for one in each], weights=row) for row in weights]
        assert function(ours, weights) == pytest.approx(wanted)
        assert 0.2 < wanted[0] < 0.99


def test_chinese_summary_is_read_by_rouge():
    assert texts.summary(["今天天气很好"], "zh", "今天天气不好")["rouge1"] == pytest.approx(5 / 6)
    assert RougeScorer(["rouge1"]).score("今天天气很好", "今天天气不好")["rouge1"].fmeasure == 0, "by its own tokenizer"
