"""The files beside an executable that serving reads."""

from __future__ import annotations

from pathlib import Path

from stages.models.checkpoint import layout
from stages.models.checkpoint.hub_folders import sentence_files

TOKENIZER = "tokenizer.json"
CARRIED = (
    layout.CONFIG,
    layout.GENERATION,
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def carry(source: Path, output: Path) -> None:
    """Copy configuration, tokenizer and what pools from one artifact to the next; what the source lacks is left out."""
    layout.carry(source, output, (*CARRIED, *sentence_files(source)))
