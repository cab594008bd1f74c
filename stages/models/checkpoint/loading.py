"""The one loader and the one saver of checkpoints. Tensors come from safetensors; no file can bring code along."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from stages.adapters.backends import TYPES
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy import classes, tasks
from stages.models.checkpoint import (
    adapter,
    compressed_tensors,
    conversions,
    files,
    filling,
    foreign,
    same_answers,
    stored_types,
    uneven_sizes,
)
from stages.models.checkpoint.hub_folders import gives_vectors
from stages.models.checkpoint.json_files import read_json, write_json
from stages.models.checkpoint.layout import (
    CONFIG,
    GENERATION,
    QUANTIZATION,
    STRUCTURE,
    TOKENIZER_FILES,
    WEIGHTS,
    carry,
    has_tokenizer,
    travelling,
)
from stages.models.layers import low_rank_linear, quantization_spec, rounded_cache, sparse_linear
from stages.models.memory.lean_import import without_compiler
from stages.models.text import segments
from stages.runtime.contract import PARTIAL, Progress, StageError
from stages.runtime.progress import Silent

_SILENT = Silent()
_READERS = ("sentencepiece", "tiktoken")
"""What transformers reads a tokenizer's *.model and *.spm with, whose formats their names do not tell."""


def load_model(
    folder: Path, *, dtype: torch.dtype | None = torch.float32, scratch: Path | None = None
) -> PreTrainedModel:
    """A checkpoint as a model in eval mode, with its surgery and its quantized layers.

    The class is the one that the configuration names. One that learned to tell two texts apart is told which is which
    (`segments`). The files are mapped, not copied: at `dtype` equal to the stored one, a weight takes memory when it is
    read, and `pages.release` gives it back. Nothing that it does reaches the file. All linear maps are nn.Linear.

    Args:
        folder: a CHECKPOINT artifact, or any folder in Hugging Face layout; compressed-tensors is understood.
        dtype: of the parameters, None for the one that each is stored in; quantized layers keep their stored types.
        scratch: folder for a file of the parameters that are stored in another type, which is mapped, too, and goes
            with the model; without one they are copied into memory.

    Raises:
        StageError: a file is missing, cut short or a pickle, the architecture is not understood, tensors are missing,
            left over, misshapen or not finite.
    """
    model, stored = _built(folder, read_json(folder / CONFIG), files.read(folder), dtype or torch.float32)
    filling.fill(model, stored, None if scratch else dtype, folder)
    if scratch and dtype:
        stored_types.widen(model, dtype, scratch)
    sparse_linear.check(model)
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_dict(read_json(folder / GENERATION))
    with suppress(StageError):
        if has_tokenizer(folder) and tasks.tells_segments(model.config, (TYPES,)):
            segments.tell(model, load_tokenizer(folder))
    return model.eval()


def outlined(folder: Path, weights: Iterable[Path]) -> tuple[PreTrainedModel, list[str]]:
    """Prove that a checkpoint's names and shapes are those of its architecture, and that copies of a tensor are equal.

    Args:
        folder: where its configuration lies.
        weights: its safetensors files.

    Returns:
        The model on the meta device, and the names of the tensors that the architecture does not read.

    Raises:
        StageError: as `load_model`, but for the values.
    """
    read, stored = read_json(folder / CONFIG), files.read_files(weights)
    outlines = {name: one.to("meta") for name, one in stored.items()}
    if tool := foreign.method(read, str(folder / CONFIG)):
        outlines = {name: one for name, one, _ in foreign.floats(read, tool, stored)}
        read = foreign.plain(read)
    # On the meta device torch computes some tables by functions that are marked for its compiler.
    with without_compiler(), torch.device("meta"):
        model, outlines = _built(folder, read, outlines, torch.float32)
        filling.refuse_unequal(model, stored, folder)
        left = filling.fill(model, outlines, torch.float32, folder)
    return model.eval(), left


def merged(base: Path, folder: Path, output: Path, progress: Progress) -> None:
    """Write a base checkpoint with an adapter that peft trained merged into it, in the base's type.

    Args:
        base: a float checkpoint in Hugging Face layout, as `outlined` takes it.
        folder: of the adapter; its tokenizer, where it has one, is that of the whole.
        output: where to.
        progress: told what is untied.

    Raises:
        StageError: the base is quantized, or see `load_model` and `adapter.merge`.
    """
    read = read_json(base / CONFIG)
    named = getattr(torch, str(read.get("dtype") or read.get("torch_dtype")).removeprefix("torch."), None)
    model = load_model(base, dtype=named if isinstance(named, torch.dtype) else torch.float32)
    adapter.merge(model, base, folder, output / PARTIAL, progress)
    save_model(model, output, like=base)
    if has_tokenizer(folder):
        for name in TOKENIZER_FILES:
            (output / name).unlink(missing_ok=True)
        carry(folder, output, TOKENIZER_FILES)


def _built(
    folder: Path, read: dict[str, Any], stored: dict[str, Tensor], dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The model of a folder without its weights, and the tensors under the names that its layers have."""
    compressed = _compressed(read)
    model = classes.empty(classes.configuration(read, str(folder / CONFIG), bare=gives_vectors(folder)), dtype)
    if gives_vectors(folder) and getattr(model, "pooler", None) and not any("pooler." in name for name in stored):
        model.pooler = None  # what pools stands in the modules beside the checkpoint
    with no_init_weights():
        if structure := read_json(folder / STRUCTURE, optional=True):
            with _following(STRUCTURE):
                uneven_sizes.install(model, structure.get("sizes", {}))
                low_rank_linear.install(model, structure)
        if quantization := read_json(folder / QUANTIZATION, optional=True):
            with _following(QUANTIZATION):
                quantization_spec.install(model, quantization)
                if "kv_cache" in quantization:
                    rounded_cache.install(model, quantization["kv_cache"])
        elif compressed:
            stored = compressed_tensors.install(model, compressed, stored)
    return model, stored


@contextmanager
def _following(name: str) -> Iterator[None]:
    """Raise StageError naming the file where a description cannot be followed: a field is missing, or is nonsense."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # no RuntimeError: memory that ran out is one
        raise StageError(
            f"{name} cannot be followed: it is damaged, or of another model",
            measured=f"{type(error).__name__}: {error}",
            remedy="Make the checkpoint again, or put the file back that was written with it.",
        ) from error


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a checkpoint that `load_model` reads.

    Raises:
        StageError: it is missing, no JSON, of an architecture that is not understood, or of a foreign quantization.
    """
    read = read_json(folder / CONFIG)
    _compressed(read)
    return classes.configuration(read, str(folder / CONFIG), bare=gives_vectors(folder))


def _compressed(read: dict[str, Any]) -> dict[str, Any] | None:
    """Take what compressed-tensors says out of a configuration; None where it says nothing."""
    if (read.get("quantization_config") or {}).get("quant_method") != compressed_tensors.METHOD:
        return None
    found: dict[str, Any] = read.pop("quantization_config")
    return found


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        StageError: the folder has none, or only one that brings code along.
    """
    _refuse_unreadable(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of a damaged tokenizer.json the library raises no other class
        raise StageError(
            f"{folder} has no tokenizer that can be read",
            measured=next((line for line in str(error).splitlines() if line), type(error).__name__),
            remedy="Put tokenizer.json beside the weights, and a tokenizer_config.json that names no code (auto_map).",
        ) from error
    return tokenizer


def _refuse_unreadable(folder: Path) -> None:
    """Raise StageError where a tokenizer is there in a format whose reader is not installed."""
    given = sorted(path.name for path in folder.iterdir() if path.suffix in (".model", ".spm"))
    absent = [name for name in _READERS if find_spec(name) is None]
    if given and absent and not (folder / "tokenizer.json").is_file():
        raise StageError(
            f"the tokenizer of {folder} needs a library that is not installed",
            measured=f"{given[0]}, without {' and '.join(absent)}",
            limit="tokenizer.json, or " + " and ".join(_READERS),
            remedy=f"Run: pip install {' '.join(absent)}",
        )


def save_model(
    model: PreTrainedModel, folder: Path, *, like: Path, layout: str = "enginery", progress: Progress = _SILENT
) -> PreTrainedModel:
    """Write a checkpoint: weights, configuration, structure, quantization; the same model gives the same bytes.

    Weights are written one by one. Those that are still views of a mapped file are given back to it. What `like` holds
    in 16 bits is written in 16 bits. What was written is opened again and asked what the model answers.

    Args:
        model: as from `load_model`; each distinct tensor is stored once.
        folder: where to; made if absent.
        like: the checkpoint that the model was made from; its tokenizer and generation files are copied.
        layout: `compressed-tensors` writes quantized layers as other engines read them.
        progress: told where a model cannot be asked.

    Returns:
        The written checkpoint as a model, each parameter mapped in the type that it is stored in.

    Raises:
        StageError: the layout cannot hold the model, values do not fit into 16 bits, or what was written does not open
            or answers something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reference = classes.plain(model)
    types = stored_types.kept(model, like)
    config, structure = _configured(model, types), _structure(model, reference)
    quantization = quantization_spec.describe(model)
    turned = classes.transposed(model, reference)
    once = {names[0]: tensor.detach() for names, tensor in anatomy.distinct_tensors(model)}
    once = {name: tensor for name, tensor in once.items() if not classes.left_out(model, name, tensor)}
    if layout == compressed_tensors.METHOD:
        once, config["quantization_config"] = compressed_tensors.write(model, once, structure)
        quantization = None
    laid_out = {name: tensor.t() if name in turned else tensor for name, tensor in once.items()}
    tensors = conversions.file_tensors(model, reference, laid_out)
    files.write(folder / WEIGHTS, tensors, stored_types.of_files(laid_out, tensors, types))
    for name, spec in ((CONFIG, config), (STRUCTURE, structure), (QUANTIZATION, quantization)):
        if spec:
            write_json(folder / name, spec)
    carry(like, folder, travelling(like))
    written = reopened(folder)
    same_answers.check(model, written, types, progress, lambda: load_model(like, dtype=None))
    return written


def reopened(folder: Path) -> PreTrainedModel:
    """What a stage has written, opened by the one loader, each parameter mapped in the type that it is stored in.

    Raises:
        StageError: it does not open.
    """
    try:
        return load_model(folder, dtype=None)
    except StageError as error:
        raise StageError(
            "the written checkpoint does not open",
            measured=str(error),
            remedy="This is a defect: please report it with the recipe.",
        ) from error


def _configured(model: PreTrainedModel, types: Mapping[str, torch.dtype]) -> dict[str, Any]:
    config: dict[str, Any] = model.config.to_diff_dict()
    config.pop("_name_or_path", None)
    dtype = stored_types.usual(model, types)
    return config | {"architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch.")}


def _structure(model: PreTrainedModel, reference: PreTrainedModel) -> dict[str, Any]:
    structure = low_rank_linear.describe(model) or {}
    resized = uneven_sizes.describe(model, reference)
    return structure | ({"sizes": resized} if resized else {})
