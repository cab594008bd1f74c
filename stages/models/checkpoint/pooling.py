"""One vector of a text from those of its tokens, as the modules beside a checkpoint say.

Shapes: N texts, T tokens, H hidden, E of the vector.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from stages.models.anatomy import tasks
from stages.models.checkpoint.hub_folders import SENTENCES, gives_vectors
from stages.models.checkpoint.json_files import read_json
from stages.runtime.contract import StageError


def _at(hidden_NTH: Tensor, place_N: Tensor) -> Tensor:
    return hidden_NTH.gather(1, place_N[:, None, None].expand(-1, 1, hidden_NTH.shape[-1])).squeeze(1)


def _sum(hidden_NTH: Tensor, mask_NT: Tensor) -> Tensor:
    return (hidden_NTH * mask_NT[..., None].to(hidden_NTH.dtype)).sum(1)


def _count(hidden_NTH: Tensor, mask_NT: Tensor) -> Tensor:
    return mask_NT.sum(1, keepdim=True).to(hidden_NTH.dtype).clamp(min=1)


def _last(mask_NT: Tensor) -> Tensor:
    return (mask_NT * torch.arange(1, mask_NT.shape[1] + 1, device=mask_NT.device)).argmax(1)


_KINDS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda hidden_NTH, mask_NT: _at(hidden_NTH, mask_NT.argmax(1)),
    "max": lambda hidden_NTH, mask_NT: torch.where(
        mask_NT[..., None] > 0, hidden_NTH, torch.finfo(hidden_NTH.dtype).min
    ).amax(1),
    "mean": lambda hidden_NTH, mask_NT: _sum(hidden_NTH, mask_NT) / _count(hidden_NTH, mask_NT),
    "mean_sqrt_len": lambda hidden_NTH, mask_NT: _sum(hidden_NTH, mask_NT) / _count(hidden_NTH, mask_NT).sqrt(),
    "lasttoken": lambda hidden_NTH, mask_NT: _at(hidden_NTH, _last(mask_NT)),
}
"""In the order in which sentence-transformers joins them. The mask, not the place, says which token is the first."""
_SPELLED = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "mean_sqrt_len_tokens": "mean_sqrt_len"}
"""How sentence-transformers calls kinds, behind `pooling_mode_`, where it is not by their names."""
_APPLIED = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class Pooling:
    """How a text's vector comes about.

    Attributes:
        kinds: one after the other, each of H.
        most: tokens that are read of a text, None where nothing beside the checkpoint says it.
        normalize: the vector's length is 1.
    """

    kinds: tuple[str, ...] = ("mean",)
    most: int | None = None
    normalize: bool = False

    def vectors(self, hidden_NTH: Tensor, mask_NT: Tensor) -> Tensor:
        """vector_NE of texts, whichever side they are padded on.

        Source: Reimers and Gurevych, Sentence-BERT, 2019, section 3.
        """
        vector_NE = torch.cat([_KINDS[kind](hidden_NTH, mask_NT) for kind in self.kinds], dim=-1)
        return torch.nn.functional.normalize(vector_NE, dim=-1) if self.normalize else vector_NE

    def vector(self, hidden_TH: Tensor) -> Tensor:
        """vector_E of one text's tokens, float64."""
        return self.vectors(hidden_TH[None].double(), torch.ones(1, len(hidden_TH), dtype=torch.int64))[0]

    def described(self) -> dict[str, Any]:
        """What a graph's description says of it."""
        return {"kinds": list(self.kinds), "normalize": self.normalize}


def pooling(*folders: Path) -> Pooling:
    """What the first of some folders says that says anything; the mean over all tokens where none does.

    Raises:
        StageError: modules or settings that are not applied here, or a pooling that is not known.
    """
    return next((found for folder in folders if (found := pooled(folder)) is not None), Pooling())


def pooled(folder: Path) -> Pooling | None:
    """What the modules beside a checkpoint, a graph or an engine say; None where there are none.

    Raises:
        StageError: see `pooling`.
    """
    if not gives_vectors(folder):
        return None
    modules = json.loads((folder / SENTENCES[0]).read_text(encoding="utf-8"))
    names = [str(one.get("type", one["path"].partition("_")[2])).rpartition(".")[2] for one in modules]
    strange = [name for name in names if name and name not in _APPLIED]
    # Behind a vector of length 1 nothing else may come that is applied before it.
    if strange or ("Normalize" in names and names[-1] != "Normalize"):
        raise StageError(
            "the vectors of texts go through a module that is not applied here",
            measured=", ".join(strange or names),
            limit=", ".join(_APPLIED),
            remedy="Take the module out of modules.json, where vectors serve you as they are without it.",
        )
    _refuse_changed_texts(folder)
    at = next((str(one["path"]) for one, name in zip(modules, names, strict=True) if name == "Pooling"), None)
    kinds = ("mean",) if at is None else _kinds(folder / at / "config.json")
    return Pooling(kinds, _most(folder), "Normalize" in names)


def reads(folder: Path, config: PreTrainedConfig) -> int | None:
    """Tokens that are read at once by the model and by what stands beside it; None for any number."""
    both = (tasks.longest(config), _most(folder))
    return min((one for one in both if one is not None), default=None)


def _most(folder: Path) -> int | None:
    most = read_json(folder / SENTENCES[2], optional=True).get("max_seq_length") if gives_vectors(folder) else None
    return most if isinstance(most, int) else None


def _refuse_changed_texts(folder: Path) -> None:
    """Raise StageError where sentence-transformers would read another text than the one that is given."""
    said = read_json(folder / SENTENCES[1], optional=True)
    prompt = (said.get("prompts") or {}).get(said.get("default_prompt_name") or "")
    if prompt or read_json(folder / SENTENCES[2], optional=True).get("do_lower_case"):
        raise StageError(
            "texts are to be changed before they are read, which is not done here",
            measured=f"the prompt {prompt!r} before each" if prompt else "do_lower_case",
            limit="texts as they are",
            remedy=f"Do it yourself, and take default_prompt_name out of {SENTENCES[1]}, do_lower_case out of "
            f"{SENTENCES[2]}.",
        )


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
