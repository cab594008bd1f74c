"""What a step will read, as far as it is known before anything is made: the model without its weights.

It stands on the meta device: shapes, names and classes are the model's own, and it takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.adapters.gguf import outline
from stages.models.anatomy import tasks
from stages.models.checkpoint import layout
from stages.models.checkpoint.json_files import read_json
from stages.models.checkpoint.loading import load_tokenizer
from stages.models.checkpoint.pooling import reads
from stages.models.layers import low_rank_linear
from stages.models.layers.quantization_spec import describe
from stages.models.memory.lean_import import without_compiler
from stages.runtime.contract import StageError

_PRECISIONS = {
    "int8_w8a8": ("int8", "float32"),
    "int8_weight_only": ("int8", "float32"),
    "fp8_e4m3": ("fp8", "float32"),
    "int4_weight_only": ("int4", "float32"),
    "auto": ("int4", "int8", "float32"),
    "nvfp4": ("fp4", "fp8", "float32"),
    "mxfp4": ("fp4", "float32"),
}
"""Scheme -> formats that are always in a graph of it."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint, or what will be made of one.

    Attributes:
        folder: where its configuration and tokenizer lie: of the checkpoint that all begins with; or a GGUF file.
        model: on the meta device; admission gives it the shapes that the steps will.
        task: what it is for.
        reads: tokens at once; None for any number.
        built: the same of its graph or engine; None for a checkpoint.
        scheme: how it is quantized, empty for a float one.
        dtype: in which its graph computes.
        layout: another tool's layout in which it is, empty for our own.
        masked: single weights are zeros that must stay.
        loose: what the widths of bases that are yet to be made are multiples of; 0 where every shape is known.
        facts: what a person wants to know of it, in words.
    """

    folder: Path
    model: PreTrainedModel
    task: str
    reads: int | None = None
    built: int | None = None
    scheme: str = ""
    dtype: str = "float32"
    layout: str = ""
    masked: bool = False
    loose: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def precisions(self) -> tuple[str, ...]:
        """Formats in its graph, as far as they are always there."""
        return (*_PRECISIONS.get(self.scheme, ()), self.dtype)

    @property
    def structured(self) -> bool:
        """Whether it bears surgery that its configuration does not tell: maps on bases, tensors that are one."""
        return bool(self.loose or low_rank_linear.describe(self.model))

    def inputs(self, names: Sequence[str]) -> dict[str, int]:
        """Path -> inputs of these linear maps, and of the parts that each has if it comes to stand on a basis."""
        found = {name: int(self.model.get_submodule(name).in_features) for name in names}
        if self.loose:
            for name in names:
                found |= {f"{name}.{part}": found[name] for part in low_rank_linear.READ}
                found |= {f"{name}.{part}": self.loose for part in low_rank_linear.WRITTEN}
        return found

    def require_float(self, verb: str) -> None:
        """Raise StageError where it is quantized."""
        if self.scheme:
            raise StageError(
                "the checkpoint is quantized",
                measured=self.scheme,
                remedy=f"{verb.capitalize()} first, quantize afterwards.",
            )


def subject(
    folder: Path, model: PreTrainedModel, tensors: Mapping[str, Mapping[str, Any]], left: Sequence[str]
) -> Subject:
    """A checkpoint that lies there.

    Args:
        folder: where.
        model: its outline.
        tensors: its tensors' headers, without those that the architecture does not read.
        left: the names of those.
    """
    task, most = tasks.task(model.config), reads(folder, model.config)
    spec = describe(model)
    scheme = str(spec.get("scheme") or "few bits") if spec else ""
    foreign = str((read_json(folder / layout.CONFIG).get("quantization_config") or {}).get("quant_method", ""))
    kinds = sorted({str(one["dtype"]) for one in tensors.values()})
    facts = {
        "architecture": f"{type(model).__name__} ({model.config.model_type})",
        "task": task,
        "parameters": f"{layout.parameters(tensors):,} in {', '.join(kinds)}",
        "reads": _read(most),
        "vocabulary": f"{model.config.get_text_config().vocab_size:,}",
    }
    if scheme:
        facts["quantized"] = f"{scheme} ({foreign})" if foreign else scheme
    if left:
        facts["not read"] = f"{len(left)} tensors like {left[0]}"
    return Subject(
        folder,
        model,
        task,
        most,
        scheme=scheme,
        layout=foreign if scheme else "",
        masked=(folder / layout.ZEROS).is_file(),
        facts=facts,
    )


def _read(most: int | None) -> str:
    return "any number of tokens" if most is None else f"{most:,} tokens"


def of_gguf(path: Path) -> Subject:
    """The checkpoint that a GGUF file becomes.

    Raises:
        StageError: its architecture is not understood.
    """
    with without_compiler():
        model, config = outline(path)
    count, most = sum(one.numel() for one in model.parameters()), tasks.longest(config)
    facts = {
        "architecture": f"{type(model).__name__} ({config.model_type}), as GGUF",
        "task": "generate",
        "parameters": f"{count:,}, written as F32",
        "reads": _read(most),
        "vocabulary": f"{config.vocab_size:,}",
    }
    return Subject(path, model.eval(), "generate", most, facts=facts)


def vocabularies(one: Subject, other: Subject) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Token -> id of both; nothing where both come from one checkpoint, or one from a GGUF file, not read so far."""
    if one.folder == other.folder or one.folder.is_file() or other.folder.is_file():
        return {}, {}
    return load_tokenizer(one.folder).get_vocab(), load_tokenizer(other.folder).get_vocab()


def reshape(one: nn.Module, *, inputs: int | None = None, outputs: int | None = None) -> None:
    """Give a linear map on the meta device another shape; one that stands on a basis reads by that."""
    if isinstance(one, low_rank_linear.SharedLinear):
        reshape(one.basis, inputs=inputs)
        reshape(one.coefficient, outputs=outputs)
    if isinstance(one, low_rank_linear.ResidualLinear):
        reshape(one.dense, inputs=inputs, outputs=outputs)
        reshape(one.low, inputs=inputs, outputs=outputs)
    if not isinstance(one, nn.Linear):
        return
    one.in_features, one.out_features = inputs or one.in_features, outputs or one.out_features
    one.weight = nn.Parameter(torch.empty(one.out_features, one.in_features, device="meta"))
    if one.bias is not None:
        one.bias = nn.Parameter(torch.empty(one.out_features, device="meta"))
