"""The files beside an executable that serving reads."""

from __future__ import annotations

from pathlib import Path

from stages.models.checkpoint import layout

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
    """Copy configuration and tokenizer from one artifact to the next; what the source lacks is left out."""
    layout.carry(source, output, CARRIED)
