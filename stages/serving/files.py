"""The files beside an executable that serving reads."""

from __future__ import annotations

import shutil
from pathlib import Path

TOKENIZER = "tokenizer.json"
CARRIED = (
    "config.json",
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def carry(source: Path, output: Path) -> None:
    """Copy configuration and tokenizer from one artifact to the next; what the source lacks is left out."""
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
