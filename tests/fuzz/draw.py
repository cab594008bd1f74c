"""A checkpoint that nobody thought of: a family's configuration drawn from a seed, built by transformers and saved.

What transformers itself refuses to build or to run is no checkpoint, and drawn anew.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from tests.fuzz.fields import Drawn, drawn
from tests.stages.models.families import EXPERTS, FAMILIES, WIDER

TABLES = (
    "CausalLM", "Seq2SeqLM", "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "",
)  # fmt: skip
"""transformers' own tables of classes, as AutoModelFor... calls them."""
USUAL = 0.7
"""How often a family has the head that it is known for."""
TRIES = 50
_SPECIAL = ("unk", "pad", "bos", "eos", "mask")


@dataclass(frozen=True)
class Case:
    """What was drawn.

    Attributes:
        config: of the checkpoint.
        made: its class.
        dtype: of its weights.
        tokens: of a window.
        saved: how it is written: `max_shard_size`.
        tokenizer: its special tokens, and the side on which it pads.
        tries: how many configurations transformers refused before.
    """

    config: PreTrainedConfig
    made: type[PreTrainedModel]
    dtype: torch.dtype
    tokens: int
    saved: Drawn
    tokenizer: Drawn
    tries: int = 0

    def told(self) -> str:
        """All of it, to be read by a person."""
        rest = {"class": self.made.__name__, "dtype": str(self.dtype), "tokens": self.tokens, **self.saved}
        return json.dumps({**rest, "tokenizer": self.tokenizer, "config": self.config.to_diff_dict()}, default=str)


def families() -> dict[str, type[PreTrainedConfig]]:
    """Each family of the tests by its configuration's model type."""
    found = {}
    for _, config, _ in (FAMILIES | WIDER | EXPERTS).values():
        one = getattr(transformers, config)
        found[str(one.model_type)] = one
    return found


def case(family: str, seed: int, folder: Path) -> Case:
    """Draw a checkpoint and save it to `folder`.

    Raises:
        LookupError: transformers took none of many configurations.
    """
    rng, why = Random(f"{family} {seed}"), ""
    for tries in range(TRIES):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = dataclasses.replace(_drawn(families()[family], rng), tries=tries)
                _save(found, rng.randrange(2**31), folder)
        # Any error of transformers: such a configuration is none.
        except Exception as error:  # noqa: BLE001
            why = f"{type(error).__name__}: {error}"
            continue
        return found
    raise LookupError(f"transformers takes no configuration of {family} drawn from {seed}: {why}")


def _drawn(config: type[PreTrainedConfig], rng: Random) -> Case:
    fields = frozenset(one.name for one in dataclasses.fields(config))
    rows = rng.choice((17, 31, 50, 96, 127, 200))
    special = dict(zip(_SPECIAL, rng.sample(range(rows), len(_SPECIAL)), strict=True))
    if {"encoder_layers", "type_vocab_size"} & fields or config.model_type in ("opt", "xglm", "biogpt"):
        special["pad"] = rng.choice((0, 1, 2))  # positions are counted from behind it
        rest = [one for one in range(3, rows)]
        special |= dict(zip(("unk", "bos", "eos", "mask"), rng.sample(rest, 4), strict=True))
    values = drawn(fields, rng) | {"vocab_size": rows}
    values |= {f"{name}_token_id": special[name] for name in ("pad", "bos", "eos")}
    if {"decoder_layers", "num_decoder_layers", "decoder_start_token_id"} & fields:
        values |= {"decoder_start_token_id": rng.choice((special["pad"], special["eos"])), "forced_eos_token_id": None}
    if config.model_type == "t5":
        values["tie_word_embeddings"] = rng.choice((True, False))
    if "decoder_vocab_size" in fields:
        values |= {"decoder_vocab_size": rows, "share_encoder_decoder_embeddings": rng.random() < 0.8}
    made = _class(config, rng)
    values["num_labels"] = rng.choice((1, 2, 3, 7))
    if made.__name__.endswith(("LMHeadModel", "ForCausalLM")) and "is_decoder" in fields:
        values["is_decoder"] = True
    if "add_cross_attention" in fields and values.get("is_decoder", True):
        values["add_cross_attention"] = rng.random() < 0.2
    most = int(values.get("max_position_embeddings", values.get("n_positions", 40)))
    ends = rng.choice(((), ("bos",), ("eos",), ("bos", "eos")))
    if made.__name__ in (
        "BartForSequenceClassification",
        "MBartForSequenceClassification",
        "T5ForSequenceClassification",
    ):
        ends = ("eos",)
    dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    return Case(
        config(**values),
        made,
        dtype,
        rng.randint(5, most - 3),
        {"max_shard_size": rng.choice(("5GB", "20KB"))},
        {"special": special, "rows": rows - rng.choice((0, 0, 3)), "ends": ends, "side": rng.choice(("left", "right"))},
    )


def _class(config: type[PreTrainedConfig], rng: Random) -> type[PreTrainedModel]:
    """One of the classes that transformers has for a configuration, most often the first of its tables."""
    known: list[type[PreTrainedModel]] = []
    usual = next(one for one, kind, _ in (FAMILIES | WIDER | EXPERTS).values() if kind == config.__name__)
    for task in TABLES:
        auto = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel")
        found = auto._model_mapping.get(config, ())
        known += [*found] if isinstance(found, tuple) else [found]
    return getattr(transformers, usual) if rng.random() < USUAL else rng.choice(known)


def _save(case: Case, seed: int, folder: Path) -> None:
    """Write it with random weights, once transformers has run it."""
    torch.manual_seed(seed)
    model = case.made(case.config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that are not trivial
            parameter.add_(torch.randn_like(parameter) * 0.1)
        ids = torch.tensor([[*range(case.tokens - 1), case.tokenizer["special"]["eos"]]]) % case.config.vocab_size
        ids[ids == case.tokenizer["special"]["eos"]] = case.tokenizer["special"]["unk"]
        ids[0, -1] = case.tokenizer["special"]["eos"]
        given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        out = model(input_ids=ids, **given, return_dict=True)
        if not all(one.isfinite().all() for one in out.values() if isinstance(one, torch.Tensor)):
            raise ValueError("it answers no numbers")
    model.to(case.dtype).save_pretrained(folder, **case.saved)
    tokenizer(case.tokenizer).save_pretrained(folder)


def tokenizer(drawn: Drawn) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, its special tokens where the configuration wants them."""
    names = {number: f"<{name}>" for name, number in drawn["special"].items()}
    rows = max(drawn["rows"], *(number + 1 for number in names))
    words = {names.get(number, chr(33 + number)): number for number in range(rows)}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = Split(Regex(r"."), "isolated")
    ends = [f"<{name}>" for name in drawn["ends"]]
    first, last = [one for one in ends if one == "<bos>"], [one for one in ends if one == "<eos>"]
    if ends:
        template = [*first, "$A", *last]
        made.post_processor = TemplateProcessing(
            single=" ".join(template),
            pair=" ".join([*template, "$B", *last]),
            special_tokens=[(f"<{name}>", drawn["special"][name]) for name in drawn["ends"]],
        )
    special: dict[str, Any] = {f"{name}_token": f"<{name}>" for name in drawn["special"]}
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side=drawn["side"], **special)
