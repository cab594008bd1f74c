"""Tiny models of the families that know words, so that items can be put to them."""

import shutil

import torch
from transformers import AutoModelForSeq2SeqLM, BertTokenizer

from tests.stages.models.families import family

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "dog",
    "in",
    "rome",
    "paris",
    "who",
    "where",
    "is",
    "it",
    "was",
    "big",
    "small",
)
PIECES = ("##s", "##ly", "##an", ",", ".", "?", ":", "2", "0", "4")
HAN = tuple("今天气很好北京是中国的首都公园年")


def model(name, folder, *, draw=0):
    """A family's checkpoint with a tokenizer of these words."""
    made = folder / f"{name}-{draw}-words"
    if not made.is_dir():
        shutil.copytree(family(name, folder, draw), made)
        vocabulary = [*SPECIAL, *WORDS, *PIECES, *HAN]
        BertTokenizer(vocab={one: place for place, one in enumerate(vocabulary)}).save_pretrained(made)
    return made


def lively(name, folder):
    """Such a model with an encoder and a decoder, whose weights are so large that it says various things."""
    made = folder / f"{name}-lively"
    if not made.is_dir():
        shutil.copytree(model(name, folder), made)
        louder = AutoModelForSeq2SeqLM.from_pretrained(made, dtype=torch.float32)
        with torch.no_grad():
            for path, parameter in louder.named_parameters():
                if parameter.dim() > 1 and any(one in path for one in ("layers", "block")):
                    parameter.mul_(4)
        louder.save_pretrained(made)
    return made
