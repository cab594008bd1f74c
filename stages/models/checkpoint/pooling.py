"""One vector of a text from those of its tokens, as the modules beside a checkpoint say.

Shapes: T tokens, H hidden, E of the vector.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stages.models.checkpoint.hub_folders import SENTENCES
from stages.models.checkpoint.json_files import read_json
from stages.runtime.contract import StageError

_KINDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda hidden_TH: hidden_TH[0],
    "mean": lambda hidden_TH: hidden_TH.mean(0),
    "max": lambda hidden_TH: hidden_TH.amax(0),
    "lasttoken": lambda hidden_TH: hidden_TH[-1],
    # Over the root of the tokens instead of their number: the same direction as the mean.
    "mean_sqrt_len": lambda hidden_TH: hidden_TH.sum(0) / len(hidden_TH) ** 0.5,
}
_SPELLED = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "mean_sqrt_len_tokens": "mean_sqrt_len"}
"""How sentence-transformers calls kinds, behind `pooling_mode_`, where it is not by their names."""
_HARMLESS = ("Transformer", "Pooling", "Normalize")
"""Modules that are understood; the length of a vector changes no cosine."""


@dataclass(frozen=True)
class Pooling:
    """How a text's vector comes about.

    Attributes:
        kinds: one after the other, each of H.
        most: tokens that are read of a text, None where nothing beside the checkpoint says it.
    """

    kinds: tuple[str, ...] = ("mean",)
    most: int | None = None

    def vector(self, hidden_TH: Tensor) -> Tensor:
        """vector_E of a text's tokens, float64."""
        return torch.cat([_KINDS[kind](hidden_TH.double()) for kind in self.kinds])


def pooling(*folders: Path) -> Pooling:
    """What the first of some folders says that says anything; the mean over all tokens where none does.

    Raises:
        StageError: modules that are not applied here, or a pooling that is not known.
    """
    for folder in folders:
        if not (folder / SENTENCES[0]).is_file():
            continue
        modules = json.loads((folder / SENTENCES[0]).read_text(encoding="utf-8"))
        names = [str(one.get("type", one["path"].partition("_")[2])).rpartition(".")[2] for one in modules]
        if strange := [name for name in names if name and name not in _HARMLESS]:
            raise StageError(
                "the vectors of texts go through a module that is not applied here",
                measured=", ".join(strange),
                limit=", ".join(_HARMLESS),
                remedy="Judge the model on text, where its tokens' vectors are compared with the baseline's.",
            )
        at = next((str(one["path"]) for one, name in zip(modules, names, strict=True) if name == "Pooling"), None)
        most = read_json(folder / SENTENCES[2], optional=True).get("max_seq_length")
        kinds = ("mean",) if at is None else _kinds(folder / at / "config.json")
        return Pooling(kinds, most if isinstance(most, int) else None)
    return Pooling()


def _kinds(path: Path) -> tuple[str, ...]:
    said = read_json(path, optional=True)
    named = said.get("pooling_mode")
    modes = {key.removeprefix("pooling_mode_") for key, on in said.items() if key.startswith("pooling_mode_") and on}
    chosen = [named] if isinstance(named, str) else list(named or sorted(modes))
    kinds = {_SPELLED.get(one, one) for one in chosen}
    if strange := sorted(kinds - _KINDS.keys()):
        raise StageError(
            f"{path} asks for a pooling that is not known",
            measured=", ".join(strange),
            limit=", ".join(_KINDS),
            remedy="Write the model anew with one of these.",
        )
    return tuple(kind for kind in _KINDS if kind in kinds) or ("mean",)
