"""Every case by its number and name, with the function that makes it, runs it and knows what is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tests.cases import checkpoints, runs, shapes, texts
from tests.cases.place import Place

CASES: Mapping[str, Callable[[Place], None]] = {
    "01-gpt2-hub-layout": checkpoints.gpt2_hub_layout,
    "02-bert-hub-layout": checkpoints.bert_hub_layout,
    "04-opt-hub-names": checkpoints.opt_hub_names,
    "05-phi3-auto-map": checkpoints.phi3_auto_map,
    "06-compressed-tensors-in": checkpoints.compressed_tensors_in,
    "07-fp8-block-in": checkpoints.fp8_block_in,
    "09-adapter-without-base": checkpoints.adapter_without_base,
    "10-gemma3-text": checkpoints.gemma3_text,
    "13-vocabulary-padded": shapes.vocabulary_padded,
    "14-tied-but-differs": checkpoints.tied_but_differs,
    "15-spurious-equal-head": checkpoints.spurious_equal_head,
    "16-odd-shards": checkpoints.odd_shards,
    "18-generation-config": checkpoints.generation_config,
    "20-dead-channels": shapes.dead_channels,
    "21-group-does-not-divide": shapes.group_does_not_divide,
    "22-sliding-window": shapes.sliding_window,
    "23-classifiers": shapes.classifiers,
    "25-position-limit": shapes.position_limit,
    "26-chat-and-windows-lines": texts.chat_and_windows_lines,
    "27-encodings": texts.encodings,
    "28-parquet-nested": texts.parquet_nested,
    "31-odd-paths": runs.odd_paths,
    "32-two-at-once": runs.two_at_once,
    "33-reserved-alias": runs.reserved_alias,
    "34-killed-and-again": runs.killed_and_again,
    "35-no-position-limit": checkpoints.no_position_limit,
    "36-mixture-of-experts": checkpoints.mixture_of_experts,
    "39-sixteen-bits-grow": shapes.sixteen_bits_grow,
    "41-special-words": texts.special_words,
    "44-grouped-heads": shapes.grouped_heads,
    "45-long-ropes": shapes.long_ropes,
}
