"""What is noted of a model that an engine of it will not do."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig

from stages.models.anatomy.tasks import places, turned_alike
from stages.models.checkpoint.json_files import read_json
from stages.models.checkpoint.layout import CONFIG
from stages.runtime.contract import Progress
from stages.serving.artifact_files import settings_of, unfollowed


def longest(most: int, config: PreTrainedConfig, progress: Progress) -> int:
    """`most`, the tokens that engines read, which is noted where there are positions for more."""
    if most == turned_alike(config) != places(config):
        progress.note(f"engines read {most} tokens: longer texts have all their positions turned otherwise (longrope)")
    return most


def settings(folder: Path, task: str, progress: Progress) -> None:
    """Note what the settings of generation in a folder ask for in vain."""
    told = settings_of(folder, read_json(folder / CONFIG))
    if task in ("generate", "translate") and (names := unfollowed(told)):
        progress.note(f"answers do not follow all that the settings of generation ask for: {', '.join(names)}")
