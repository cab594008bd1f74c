"""Tiny checkpoints with random weights, laid out as transformers and others lay them out, and texts to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.tiny import reference_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TOKENS = 768
END, BEGIN, PAD, MASK = range(4)
SPECIAL = ["<end>", "<bos>", "<pad>", "<mask>"]


def prose(characters: int = 70_000) -> str:
    """English that every Python has."""
    return reference_text()[:characters]


def paragraphs() -> list[str]:
    """Its paragraphs, none empty."""
    return [one for one in prose().split("\n\n") if one.strip()]


def small(kind: str, head: str = "ForCausalLM", *, seed: int = 0, settings: str = "", **config: Any) -> PreTrainedModel:
    """A random model of an architecture, whose weights are so wide that rounding shows; `settings` is its
    configuration's kind where that is another."""
    import torch
    import transformers

    common = {
        "vocab_size": TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "initializer_range": 0.12, "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}{head}")(
        getattr(transformers, f"{settings or kind}Config")(**common | config)
    )
    return model.eval()


def llama(head: str = "ForCausalLM", kind: str = "Llama", **config: Any) -> PreTrainedModel:
    """A Llama, or a relative of it."""
    common = {
        "intermediate_size": 192, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    return small(kind, head, **common | config)


def saved(model: PreTrainedModel, folder: Path, dtype: str = "float32", **config: Any) -> Path:
    """As transformers saves it, with a tokenizer; `config` changes its config.json, None takes a key away."""
    import torch

    model.to(getattr(torch, dtype)).save_pretrained(folder)
    told(folder, **config)
    words(folder)
    return folder


def told(folder: Path, **config: Any) -> None:
    """Change a config.json; None takes a key away."""
    path = folder / "config.json"
    known = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in known.items() if value is not None}, indent=1))


def stored(folder: Path, tensors: Mapping[str, Tensor], name: str = "model.safetensors", bare: bool = False) -> None:
    """Write tensors in place of a folder's; `bare` leaves out what transformers writes into the header."""
    from safetensors.torch import save_file

    apart = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    save_file(apart, folder / name, metadata=None if bare else {"format": "pt"})


def words(folder: Path, *, special: bool = True, **config: Any) -> None:
    """A tokenizer; without `special` nothing in a text means more than its letters."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = json.loads(_tokenizer())
    if not special:
        trained["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(trained), encoding="utf-8")
    named = {"eos_token": "<end>", "pad_token": "<pad>", "mask_token": "<mask>"} if special else {}
    told_ = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512} | named | config
    known = {key: value for key, value in told_.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(known))


def plain(path: Path, text: str | None = None) -> None:
    """A text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(prose() if text is None else text, encoding="utf-8")


def rows(path: Path, *of: Mapping[str, Any]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(one)}\n" for one in of), encoding="utf-8")


@cache
def _tokenizer() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False
    )
    made.train_from_iterator(prose().split("\n\n"), trainer)
    return str(made.to_str())
