"""The files of a checkpoint: which count, whether they are whole, and what of them is refused. No weight is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from stages.models.checkpoint.hub_folders import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    SENTENCES,
    adapter_alone,
    is_adapter,
    located,
    refuse_dangling,
    sentence_files,
)
from stages.models.checkpoint.json_files import read_given
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import canonical, digest_bytes, digest_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "sentencepiece.bpe.model",
    "spm.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "chat_template.jinja",
)
"""Files of a tokenizer: they travel from each checkpoint to the next."""
TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("tiktoken.model",),
    ("tekken.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("spm.model",),
    ("vocab.json", "source.spm", "target.spm"),
)
"""Of which any suffices."""
CONFIG, GENERATION = "config.json", "generation_config.json"
STRUCTURE, QUANTIZATION = "structure.json", "quantization.json"
ZEROS = "zeros.json"
"""What `prune` puts beside the weights where single ones went: how many of which."""
SIDE_FILES = (CONFIG, GENERATION, STRUCTURE, QUANTIZATION, ZEROS, *TOKENIZER_FILES, "chat_template.json")
TOKENIZER = "tokenizer.json"
SERVED = (CONFIG, GENERATION, TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What serving reads beside an executable."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PATTERNS = (*SIDE_FILES, *SENTENCES, ADAPTER, "*.safetensors", INDEX, "*.gguf")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SAFE = "Give a folder with config.json, *.safetensors and tokenizer files, or one *.gguf file."
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class Chosen:
    """A checkpoint's files: name in the layout -> where it lies. A GGUF file is the only file of its own."""

    files: Mapping[str, Path]
    gguf: Path | None = None

    @property
    def weights(self) -> dict[str, Path]:
        """The safetensors files of the checkpoint among them; those of modules that follow it lie in folders."""
        return {name: path for name, path in self.files.items() if name.endswith(".safetensors") and "/" not in name}

    def digest(self) -> str:
        """The identity of the content: of a single file its bytes, of a folder the names and bytes that count."""
        if self.gguf:
            return digest_file(self.gguf)
        return digest_bytes(canonical(sorted((name, digest_file(path)) for name, path in self.files.items())))


def choose(path: Path) -> Chosen:
    """The one checkpoint at a path.

    Raises:
        StageError: there is none, there are several, it is a pickle, or an adapter.
    """
    if path.is_file():
        return _single(path)
    path = located(path)
    refuse_dangling(path, PATTERNS)
    if is_adapter(path):
        raise adapter_alone(path)
    ggufs = sorted(path.glob("*.gguf"))
    safe = sorted(path.glob("*.safetensors"))
    pickles = sorted(p for p in path.iterdir() if p.name.endswith(PICKLES))
    if len(ggufs) > 1 or (ggufs and safe):
        names = ", ".join(p.name for p in (*ggufs, *safe))
        raise StageError(f"{path} holds more than one checkpoint", measured=names, limit=1, remedy="Name one file.")
    if ggufs:
        return Chosen({}, gguf=ggufs[0])
    if not safe and pickles:
        raise _pickle(pickles[0])
    if not safe:
        raise StageError(f"{path} holds no checkpoint", remedy=_SAFE)
    return Chosen(_sides(path) | _weights(path, safe) | sentence_files(path))


def _single(path: Path) -> Chosen:
    if path.suffix == ".gguf":
        return Chosen({}, gguf=path)
    if path.name.endswith(PICKLES):
        raise _pickle(path)
    if path.suffix == ".safetensors":
        return Chosen(_sides(path.parent) | {WEIGHTS: path})
    raise StageError(f"{path} is no checkpoint", remedy=_SAFE)


def choose_adapter(path: Path) -> Chosen:
    """The adapter at a path.

    Raises:
        StageError: there is none, or a pickle.
    """
    path = located(path)
    refuse_dangling(path, PATTERNS)
    if not is_adapter(path):
        raise StageError(
            f"{path} is no adapter, and a `base` is given for it",
            limit=f"a folder with {ADAPTER} and {ADAPTER_WEIGHTS}",
            remedy="Leave `base` out, or give the folder that peft wrote as `source`.",
        )
    if not (path / ADAPTER_WEIGHTS).is_file():
        pickles = sorted(p for p in path.iterdir() if p.name.endswith(PICKLES))
        raise (
            _pickle(pickles[0])
            if pickles
            else StageError(f"{path} has no {ADAPTER_WEIGHTS}", remedy="Write it again: model.save_pretrained(folder).")
        )
    sides = {name: one for name, one in _sides(path).items() if name not in (CONFIG, STRUCTURE, QUANTIZATION, ZEROS)}
    return Chosen(sides | {name: path / name for name in (ADAPTER, ADAPTER_WEIGHTS)})


def carry(source: Path, output: Path, names: Iterable[str]) -> None:
    """Copy side files from one artifact to the next; what the source lacks is left out."""
    for name in names:
        if (source / name).is_file():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, output / name)


def carry_served(source: Path, output: Path) -> None:
    """Copy configuration, tokenizer and what pools from one artifact to the next; what the source lacks is left out."""
    carry(source, output, (*SERVED, *sentence_files(source)))


def travelling(source: Path) -> list[str]:
    """Names of the files that go from each checkpoint to the next: tokenizer, generation, what pools its vectors."""
    return [*TOKENIZER_FILES, GENERATION, *sentence_files(source)]


def _sides(path: Path) -> dict[str, Path]:
    return {name: path / name for name in SIDE_FILES if (path / name).is_file()}


def _weights(path: Path, safe: list[Path]) -> dict[str, Path]:
    index = path / INDEX
    whole = path / WEIGHTS
    if index.is_file() and whole.is_file():
        raise StageError(
            f"{path} holds more than one checkpoint", measured=f"{WEIGHTS} and {INDEX}", limit=1, remedy="Remove one."
        )
    if index.is_file():
        shards = sorted(set(_weight_map(index).values()))
        for name in shards:
            if not (path / name).is_file() or "/" in name:
                raise StageError(f"{INDEX} names {name}, which is not in {path}", remedy="Fetch the missing shard.")
        return {INDEX: index} | {name: path / name for name in shards}
    if whole.is_file():
        return {WEIGHTS: whole}
    if len(safe) > 1:
        names = ", ".join(p.name for p in safe[:4])
        raise StageError(
            f"{path} holds more than one checkpoint",
            measured=names,
            limit=1,
            remedy=f"Keep one, or add the {INDEX} that joins them.",
        )
    return {WEIGHTS: safe[0]}


def _weight_map(index: Path) -> dict[str, str]:
    found = read_given(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise StageError(f"{index} has no weight_map", remedy="Write the checkpoint again with save_pretrained.")
    return found


def _pickle(path: Path) -> StageError:
    return StageError(
        f"{path} is a pickle checkpoint, which can run code when it is loaded",
        remedy="Convert it to safetensors where you trust it: model.save_pretrained(folder).",
    )


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors that a safetensors file declares, each checked to lie inside the file.

    Returns:
        tensor name -> {"dtype", "shape", "data_offsets"}.

    Raises:
        StageError: the file is cut short or its header is damaged.
    """
    size = path.stat().st_size
    remedy = "Fetch the file again; it was probably cut short while it was copied."
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise StageError(
                f"{path} is cut short or no safetensors file",
                measured=f"{size} bytes",
                limit=f"{8 + length} bytes for its header",
                remedy=remedy,
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise StageError(f"the header of {path} is damaged", remedy=remedy) from error
    if 8 + length + end != size:
        raise StageError(
            f"{path} is cut short or has bytes too many",
            measured=f"{size} bytes",
            limit=f"{8 + length + end} bytes",
            remedy=remedy,
        )
    return tensors


def check_headers(folder: Path, weights: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """All tensors of a checkpoint's files, each declared once and where the index says."""
    headers: dict[str, dict[str, Any]] = {}
    placed: dict[str, str] = {}
    for name, path in weights.items():
        for tensor, entry in read_header(path).items():
            if tensor in headers:
                raise StageError(f"tensor {tensor} stands in {placed[tensor]} and {name}", remedy="Keep one of them.")
            headers[tensor], placed[tensor] = entry, name
    index = folder / INDEX
    if index.is_file():
        for tensor, name in _weight_map(index).items():
            if placed.get(tensor) != name:
                raise StageError(f"{INDEX} places tensor {tensor} in {name}, which does not hold it", remedy=_SAFE)
    return headers


def check_tokenizer(folder: Path) -> None:
    """Raise StageError unless tokenizer files stand in the folder."""
    if not has_tokenizer(folder):
        raise StageError(
            f"{folder} has no tokenizer",
            limit="; ".join(" with ".join(names) for names in TOKENIZERS),
            remedy=f"Add the tokenizer's files: tokenizer.save_pretrained({str(folder)!r}).",
        )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer: transformers makes one up where there are none."""
    return any(all((folder / name).is_file() for name in names) for names in TOKENIZERS)


def parameters(tensors: Mapping[str, Mapping[str, Any]]) -> int:
    """The number of elements in declared tensors."""
    return sum(prod(entry["shape"]) for entry in tensors.values())
