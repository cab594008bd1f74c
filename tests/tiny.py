"""A tiny Llama trained on real text, made once and cached: quality assertions on it mean something."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, WINDOW, BATCH, STEPS = 768, 128, 8, 320


def reference_text() -> str:
    """English reference prose that every CPython carries."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def tiny_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 768 tokens trained on `text`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        text.split("\n\n"),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")


def train_tiny(folder: Path) -> None:
    """Train for about half a minute and save a Hugging Face checkpoint into `folder`."""
    torch.manual_seed(0)
    text = reference_text()
    tokenizer = tiny_tokenizer(text)
    ids = torch.tensor(tokenizer(text).input_ids)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in range(STEPS):
        starts = torch.randint(0, len(ids) - WINDOW, (BATCH,)).tolist()
        batch = torch.stack([ids[s : s + WINDOW] for s in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_llama(cache: Path) -> Path:
    """The cached checkpoint below `cache`, trained at first use; safe to call from several processes."""
    folder = cache / "tiny-llama-1"
    if not folder.is_dir():
        building = cache / f"tiny-llama-1.{os.getpid()}"
        train_tiny(building)
        try:
            building.rename(folder)
        except OSError:
            shutil.rmtree(building)
    return folder
