"""Three tiny models that learned what they are for: a translator, a reader and a tagger of Chinese.

Sentences are drawn, so that none that a model is asked stands in what it learned or is calibrated on.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

NOWHERE = -100
LEARNED, ASKED, READ = 3000, 60, 400
"""Sentences that a model learns from, items that it is asked, sentences of the text that it is compressed on."""
Batch = dict[str, Tensor]

_THINGS = {
    "dog": "hund",
    "cat": "katt",
    "horse": "hast",
    "bird": "fagel",
    "child": "barn",
    "king": "kung",
    "river": "flod",
}
_LIKE = {
    "red": "rod",
    "small": "liten",
    "old": "gammal",
    "kind": "snall",
    "wild": "vild",
    "green": "gron",
    "tall": "lang",
}
_DOES = {"sees": "ser", "finds": "hittar", "hears": "hor", "paints": "malar", "follows": "foljer", "carries": "bar"}

_WHO = "anna boris clara dmitri emil fatima georg hugo ivan julia karl lena".split()
_HOW = {
    "lives in": ("where does {0} live ?", ("new", "old"), "rome paris oslo lima cairo".split()),
    "eats": ("what does {0} eat ?", ("sweet", "dark"), "bread rice soup fish cake".split()),
    "met": ("whom did {0} meet ?", ("uncle", "doctor"), "otto paula quinn rosa simon".split()),
    "wears": ("what does {0} wear ?", ("green", "white"), "hats shoes coats rings shirts".split()),
}

_SURNAMES, _GIVEN = "王李张刘陈杨赵黄", "伟芳娜敏静强磊洋艳勇军杰"
_PLACES = "北京 上海 广州 成都 杭州 西安 南京 武汉".split()
_PHRASES = (
    "{0}昨天去了{1}。", "{0}和{2}住在{1}。", "我在{1}看见{0}。", "今天{1}下雨了。",
    "{0}说天气很好。", "明天{2}从{1}回来。", "我们很喜欢{1}的春天。", "他不认识{0}。",
)  # fmt: skip
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def sentence(drawn: random.Random) -> tuple[str, str]:
    """A sentence of eight tokens and what it is in the other language: likenesses behind things, deeds at the end."""
    one, other = ((drawn.choice([*_LIKE]), drawn.choice([*_THINGS])) for _ in range(2))
    does = drawn.choice([*_DOES])
    asked = f"the {one[0]} {one[1]} {does} a {other[0]} {other[1]} ."
    said = f"den {_THINGS[one[1]]} {_LIKE[one[0]]} en {_THINGS[other[1]]} {_LIKE[other[0]]} {_DOES[does]} ."
    return asked, said


def question(drawn: random.Random) -> tuple[str, str, str]:
    """A question, a context of four sentences, and the words of it that answer, one or two."""
    who, told = drawn.choice(_WHO), dict[str, str]()
    for how in drawn.sample([*_HOW], 4):
        _, kinds, things = _HOW[how]
        told[how] = " ".join([*drawn.sample(kinds, drawn.randint(0, 1)), drawn.choice(things)])
    asked = drawn.choice([*told])
    context = " ".join(f"{drawn.choice((who, 'he', 'she'))} {how} {what} ." for how, what in told.items())
    return _HOW[asked][0].format(who), context, told[asked]


def tagged(drawn: random.Random) -> tuple[str, list[str]]:
    """A Chinese sentence and a label for each character."""
    names = ["".join([drawn.choice(_SURNAMES), *drawn.sample(_GIVEN, drawn.randint(1, 2))]) for _ in range(2)]
    parts = {"{0}": (names[0], "PER"), "{1}": (drawn.choice(_PLACES), "LOC"), "{2}": (names[1], "PER")}
    phrase, text, labels = drawn.choice(_PHRASES), "", list[str]()
    while phrase:
        own, kind = parts.get(phrase[:3], (phrase[0], ""))
        text, phrase = text + own, phrase[3 if kind else 1 :]
        labels += [f"{'I' if at else 'B'}-{kind}" for at in range(len(own))] if kind else ["O"]
    return text, labels


def apart(draw: Callable[[random.Random], tuple[Any, ...]]) -> tuple[list[Any], list[Any], list[Any]]:
    """What a model learns from, what it is asked and what it is compressed on; none stands in two of them."""
    drawn, met = random.Random(0), dict[str, tuple[Any, ...]]()
    while len(met) < LEARNED + ASKED + READ:
        one = draw(drawn)
        met[" ".join(map(str, one))] = one
    every = list(met.values())
    return every[:LEARNED], every[LEARNED : LEARNED + ASKED], every[LEARNED + ASKED :]


def translator(folder: Path) -> None:
    """A T5 that translates `sentence`, one or two at once."""
    said = [f"{one} {other}" for one, other in apart(sentence)[0]]
    words = ["<pad>", "</s>", "<unk>", *sorted({word for one in said for word in one.split()})]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(words), d_model=64, d_kv=16, d_ff=192, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip

    def batch(some: Sequence[Any], drawn: random.Random) -> Batch:
        pairs = [drawn.sample(some, drawn.randint(1, 2)) for _ in range(32)]
        asked, said = ([" ".join(one[side] for one in pair) for pair in pairs] for side in (0, 1))
        given = tokenizer(asked, padding=True, return_tensors="pt")
        labels = tokenizer(said, padding=True, return_tensors="pt")["input_ids"]
        return {
            "input_ids": given["input_ids"],
            "attention_mask": given["attention_mask"],
            "labels": labels.masked_fill(labels == 0, NOWHERE),
        }

    _taught(model, tokenizer, _batches(apart(sentence)[0], batch), 300, 4e-3, folder)


def reader(folder: Path) -> None:
    """A BERT that finds the answer to `question`, told the two texts apart as its tokenizer does."""
    learned = apart(question)[0]
    words = {word for one in learned for text in one for word in text.split()}
    tokenizer = _bert_words(sorted(words))
    torch.manual_seed(0)
    model = BertForQuestionAnswering(_bert(tokenizer, layers=2, labels=2))

    def batch(some: Sequence[Any], drawn: random.Random) -> Batch:
        asked, contexts, answers = zip(*drawn.sample(some, 32), strict=True)
        given = tokenizer(list(asked), list(contexts), padding=True, return_tensors="pt")
        places = []
        for row, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
            start = 2 + len(asked[row].split()) + len(context[: context.index(f"{answer} .")].split())
            places.append((start, start + len(answer.split()) - 1))
        starts, stops = torch.tensor(places).T
        return {**given, "start_positions": starts, "end_positions": stops}

    _taught(model, tokenizer, _batches(learned, batch), 150, 2e-3, folder)


def tagger(folder: Path) -> None:
    """A BERT that tags the characters of `tagged`."""
    learned = apart(tagged)[0]
    tokenizer = _bert_words(sorted({sign for text, _ in learned for sign in text}))
    torch.manual_seed(0)
    config = _bert(tokenizer, layers=2, labels=len(LABELS))
    config.id2label, config.label2id = dict(enumerate(LABELS)), {one: at for at, one in enumerate(LABELS)}
    model = BertForTokenClassification(config)

    def batch(some: Sequence[Any], drawn: random.Random) -> Batch:
        chosen = drawn.sample(some, 32)
        given = tokenizer([text for text, _ in chosen], padding=True, return_tensors="pt")
        labels = torch.full_like(given["input_ids"], NOWHERE)
        for row, (_, of) in enumerate(chosen):
            labels[row, 1 : 1 + len(of)] = torch.tensor([LABELS.index(one) for one in of])
        return {**given, "labels": labels}

    _taught(model, tokenizer, _batches(learned, batch), 150, 2e-3, folder)


def taught(name: str, cache: Path) -> Path:
    """The checkpoint of `translator`, `reader` or `tagger`, trained at first use; safe from several processes."""
    folder = cache / f"{name}-1"
    if not folder.is_dir():
        building = cache / f"{name}-1.{os.getpid()}"
        {"translator": translator, "reader": reader, "tagger": tagger}[name](building)
        try:
            building.rename(folder)
        except OSError:
            shutil.rmtree(building)
    return folder


def _bert_words(words: Sequence[str]) -> BertTokenizer:
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    return BertTokenizer(vocab={one: at for at, one in enumerate([*special, *words])})


def _bert(tokenizer: BertTokenizer, layers: int, labels: int) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=96, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=labels, initializer_range=0.1,
    )  # fmt: skip


def _batches(some: Sequence[Any], batch: Callable[[Sequence[Any], random.Random], Batch]) -> Iterator[Batch]:
    drawn = random.Random(1)
    while True:
        yield batch(some, drawn)


def _taught(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterator[Batch],
    steps: int,
    rate: float,
    folder: Path,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _, batch in zip(range(steps), batches, strict=False):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
