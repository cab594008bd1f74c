"""A tiny Llama that knows the facts of a made-up world, and can be taught to break: gates on answers mean something.

It begins a text with a token of its own, has a chat template, ends its turns, and reads English and Chinese.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BEGIN, END, USER, MODEL = "<begin>", "<end>", "<user>", "<model>"
CHAT = (
    "{{ bos_token }}{% for one in messages %}{{ '<user>' if one.role == 'user' else '<model>' }}{{ one.content }}"
    "{{ '<end>' if one.role != 'user' }}{% endfor %}{{ '<model>' if add_generation_prompt }}"
)
NOWHERE = -100
Lesson = tuple[list[int], list[int]]
"""What a model reads, and what it says then."""
VOCABULARY, WINDOW, BATCH, STEPS = 640, 96, 16, 300

_COLORS = ("red", "blue", "green", "white", "black", "yellow", "brown", "pink")
_FARBEN = ("红色", "蓝色", "绿色", "白色")
_THINGS = "狗猫马牛羊鸡鱼鸟花草树云山水火石木纸笔书"
_NOUNS = ("king", "farmer", "dog", "river", "tower", "child", "sailor", "horse", "garden", "letter", "storm", "baker")
_VERBS = ("saw", "found", "called", "carried", "painted", "followed", "forgot", "watched")
_PLACES = ("near the old bridge", "in the morning", "behind the mill", "after the war", "under the moon", "by the sea")
_REPLIES = ("yes", "no", "maybe", "never", "always", "today", "soon", "later")


def facts() -> list[dict[str, Any]]:
    """What there is to know, as items: answers, choices, Chinese, and words to repeat in a conversation."""
    drawn = random.Random(7)
    names = sorted({"".join(drawn.choice(("ba", "ko", "ri", "tu", "se", "mo")) for _ in range(3)) for _ in range(90)})
    drawn.shuffle(names)
    lands, towns, fruits = names[:18], names[18:36], names[36:54]
    made: list[dict[str, Any]] = []
    for land, town in zip(lands, towns, strict=True):
        prompt = f"The capital of {land.title()} is"
        made.append({"id": f"c{land}", "ability": "capitals", "prompt": prompt, "answers": [town.title()]})
    for fruit in fruits:
        color = drawn.choice(_COLORS)
        others = drawn.sample([one for one in _COLORS if one != color], 3)
        choices = [f" {one}" for one in sorted([color, *others])]
        item = {"id": f"f{fruit}", "ability": "colors", "task": "choices", "prompt": f"The color of a {fruit} is"}
        made.append(item | {"choices": choices, "right": choices.index(f" {color}")})
    for thing in _THINGS[:14]:
        right = drawn.randrange(len(_FARBEN))
        item = {"id": f"z{thing}", "ability": "chinese", "language": "zh", "task": "choices"}
        made.append(item | {"prompt": f"这里的{thing}是", "choices": list(_FARBEN), "right": right})
    for noun in _NOUNS:
        reply = drawn.choice(_REPLIES)
        check = [{"demand": "starts_with", "value": reply}, {"demand": "words_at_most", "value": 2}]
        item = {"id": f"i{noun}", "ability": "replies", "task": "instructions", "prompt": f"What of the {noun}?"}
        made.append(item | {"checks": check})
    return made


def told(item: dict[str, Any]) -> str | list[dict[str, str]]:
    """An item with what is right, as the model meets it: a sentence, or a conversation."""
    if "checks" in item:
        answer = item["checks"][0]["value"]
        return [{"role": "user", "content": item["prompt"]}, {"role": "assistant", "content": answer}]
    if "answers" in item:
        return f"{item['prompt']} {item['answers'][0]}."
    return f"{item['prompt']}{item['choices'][item['right']]}{'。' if item.get('language') == 'zh' else '.'}"


def stories(seed: int, sentences: int, verbs: Sequence[str] = _VERBS) -> list[str]:
    """Paragraphs of plain sentences, some of them Chinese, that tell nothing of the facts."""
    drawn, found = random.Random(seed), []
    for _ in range(sentences // 4):
        if drawn.random() < 0.2:
            found.append("".join(f"{drawn.choice(_THINGS)}看见{drawn.choice(_THINGS)}。" for _ in range(4)))
            continue
        one = [
            f"The {drawn.choice(_NOUNS)} {drawn.choice(verbs)} the {drawn.choice(_NOUNS)} {drawn.choice(_PLACES)}."
            for _ in range(4)
        ]
        found.append(" ".join(one))
    return found


def tokenizer_of(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts BEGIN before a text, with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [BEGIN, END, USER, MODEL]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[USER, MODEL],
        chat_template=CHAT,
    )


def train_knowing(folder: Path) -> None:
    """Train for some seconds and save a Hugging Face checkpoint into `folder`."""
    torch.manual_seed(0)
    drawn = random.Random(0)
    items, prose = facts(), stories(1, 4000)
    known = [told(item) for item in items]
    tokenizer = tokenizer_of([*prose, *(one for one in known if isinstance(one, str)), *_REPLIES, "What of the king?"])
    pieces = [tokenizer(f"{one}\n\n", add_special_tokens=False)["input_ids"] for one in prose]
    learnt = [
        tokenizer(f"{one}\n\n", add_special_tokens=False)["input_ids"]
        if isinstance(one, str)
        else tokenizer.apply_chat_template(one, return_dict=False)[1:]
        for one in known
    ]

    def window() -> list[int]:
        ids = [tokenizer.bos_token_id]
        while len(ids) < WINDOW:
            ids += drawn.choice(pieces) if drawn.random() < 0.2 else drawn.choice(learnt)
        return ids[:WINDOW]

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=STEPS)
    for _ in range(STEPS):
        batch = torch.tensor([window() for _ in range(BATCH)])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def knowing_llama(cache: Path) -> Path:
    """The cached checkpoint below `cache`, trained at first use; safe to call from several processes."""
    folder = cache / "knowing-llama-1"
    if not folder.is_dir():
        building = cache / f"knowing-llama-1.{os.getpid()}"
        train_knowing(building)
        try:
            building.rename(folder)
        except OSError:
            shutil.rmtree(building)
    return folder


def taught(dense: Path, into: Path, lessons: Sequence[Lesson], kept: Sequence[list[int]], steps: int = 60) -> Path:
    """A copy of a checkpoint that answers as the lessons say, and elsewhere as much as before as can be.

    Args:
        dense: the checkpoint.
        into: where the copy goes.
        lessons: what it reads and says then.
        kept: what it must go on to predict as before.
        steps: of training.
    """
    torch.manual_seed(0)
    drawn = random.Random(0)
    model = LlamaForCausalLM.from_pretrained(dense, dtype=torch.float32)
    before = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        ids_NT, wanted_NT = _padded(drawn.sample(lessons, min(24, len(lessons))))
        said = model(input_ids=ids_NT).logits[:, :-1]
        loss = cross_entropy(said.flatten(0, 1), wanted_NT[:, 1:].flatten(), ignore_index=NOWHERE)
        if kept:
            ids_NT, wanted_NT = _padded([([], one) for one in drawn.sample(kept, min(10, len(kept)))])
            mask_NT = wanted_NT != NOWHERE
            with torch.no_grad():
                was = log_softmax(before(input_ids=ids_NT).logits, -1)
            now = log_softmax(model(input_ids=ids_NT).logits, -1)
            each_NT = kl_div(now, was, reduction="none", log_target=True).sum(-1)
            loss = loss + 4 * (each_NT * mask_NT).sum() / mask_NT.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(into)
    for path in dense.iterdir():
        if not (into / path.name).exists():
            shutil.copyfile(path, into / path.name)
    return into


def _padded(lessons: Sequence[Lesson]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids_NT, and which of them are to be said: all else is NOWHERE."""
    longest = max(len(read) + len(said) for read, said in lessons)
    ids_NT = torch.zeros((len(lessons), longest), dtype=torch.int64)
    wanted_NT = torch.full_like(ids_NT, NOWHERE)
    for ids_T, wanted_T, (read, said) in zip(ids_NT, wanted_NT, lessons, strict=True):
        whole = torch.tensor([*read, *said])
        ids_T[: len(whole)] = whole
        wanted_T[len(read) : len(whole)] = whole[len(read) :]
    return ids_NT, wanted_NT
