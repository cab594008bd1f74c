"""GGUF to Hugging Face layout in fp32, one tensor at a time, so that memory holds one tensor and not the model.

Names, configuration and tokenizer are transformers' own readings of the file; block formats are decoded by `gguf`.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import modeling_gguf_pytorch_utils as reading
from transformers.initialization import no_init_weights

from stages.runtime.contract import Progress, StageError

_DAMAGED = "Fetch the file again; it was probably cut short while it was copied."
_ARRAY = gguf.GGUFValueType.ARRAY
_OTHER = "Use a dense decoder, or the same checkpoint as safetensors."


class Reader(gguf.GGUFReader):
    """Reads an array at once: a vocabulary word by word, as its parent does, takes seconds."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        item = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0])) if raw_type == _ARRAY else _ARRAY
        # Arrays of arrays, and files of a machine with the other order of bytes, are rare.
        if item == _ARRAY or self.byte_order == "S":
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        count, start = int(head[1][0]), orig_offs + 12
        values: list[Any]
        if item == gguf.GGUFValueType.STRING:
            values, end = self._words(start, count)
        else:
            read = np.asarray(self._get(start, self.gguf_scalar_to_np[item], count))
            values, end = list(read.reshape(count, 1)), start + read.nbytes
        return end - orig_offs, [*head, *values], list(range(2, 2 + count)), [_ARRAY, item][: 1 + bool(count)]

    def _words(self, start: int, count: int) -> tuple[list[NDArray[np.uint8]], int]:
        """So many strings, each after its length, and where they end."""
        held, found = np.asarray(self.data), list[NDArray[np.uint8]]()  # slices of a mapped array are made slowly
        for _ in range(count):
            end = start + 8 + int.from_bytes(held[start : start + 8].tobytes(), "little")
            if end > len(held):
                raise ValueError(f"a string ends at byte {end} of {len(held)}")
            found.append(held[start + 8 : end])
            start = end
        return found, start


def dequantize(path: Path, output: Path, progress: Progress) -> None:
    """Write config.json, model.safetensors (fp32, tied tensors once) and the tokenizer of a GGUF file.

    Raises:
        StageError: the file is damaged, or its architecture or a tensor is not understood.
    """
    reader = _opened(path)
    model, config = outline(path)
    plan = _plan(path, reader, model, config)
    _write(output / "model.safetensors", plan, config, _architecture(reader), progress)
    config.dtype = "float32"
    _strip(config)
    config.save_pretrained(output)
    settings = GenerationConfig.from_model_config(config)
    settings.eos_token_id = _ends(reader, settings.eos_token_id)
    settings.save_pretrained(output)
    _write_tokenizer(path, output)


def outline(path: Path) -> tuple[Any, Any]:
    """The model of a GGUF file on the meta device, and its configuration.

    Raises:
        StageError: its architecture is not understood.
    """
    try:
        with patch.object(gguf, "GGUFReader", Reader):
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
            model.tie_weights()
    # What transformers raises for an architecture or a field of it that it does not know; its text is passed on.
    except (ValueError, KeyError, NotImplementedError) as error:
        raise StageError(f"{path} has an architecture that is not understood ({error})", remedy=_OTHER) from error
    config.architectures = [type(model).__name__]
    return model, config


def _opened(path: Path) -> gguf.GGUFReader:
    # The reader maps the file: sizes that lie outside it surface as ValueError, IndexError or a short reshape.
    try:
        return Reader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise StageError(f"{path} is cut short or no GGUF file ({error})", remedy=_DAMAGED) from error


def _architecture(reader: gguf.GGUFReader) -> str:
    return str(reading.read_field(reader, "general.architecture")[0])


def _ends(reader: gguf.GGUFReader, told: int | list[int] | None) -> int | list[int] | None:
    """Tokens that end an answer: of a turn and of a message beside that of a text."""
    ends = told if isinstance(told, list) else [] if told is None else [told]
    more = [reading.read_field(reader, key) for key in (gguf.Keys.Tokenizer.EOT_ID, gguf.Keys.Tokenizer.EOM_ID)]
    found = list(dict.fromkeys([*ends, *(int(one[0]) for one in more if one)]))
    return found if len(found) > 1 else next(iter(found), None)


def _plan(path: Path, reader: gguf.GGUFReader, model: Any, config: Any) -> list[tuple[str, tuple[int, ...], Any]]:
    """(name, shape, GGUF tensor) of each tensor to write, in name order."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[_architecture(reader)], config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    plan = []
    for name, meta in sorted(model.state_dict().items()):
        if name in tied:
            continue
        stem, _, suffix = name.rpartition(".")
        tensor = stored.pop(f"{names.get_name(stem)}.{suffix}", None)
        if tensor is None:
            raise StageError(f"{path} lacks a tensor for {name}", remedy=_OTHER)
        plan.append((name, tuple(meta.shape), tensor))
    unread = sorted(stored)
    if unread:
        raise StageError(f"{path} holds tensors of no known place", measured=", ".join(unread[:3]), remedy=_OTHER)
    return plan


def _write(target: Path, plan: Iterable[Any], config: Any, architecture: str, progress: Progress) -> None:
    plan = list(plan)
    processor = reading.TENSOR_PROCESSORS.get(architecture, reading.TensorProcessor)(config=config.to_dict())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, _ in plan:
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with target.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        for done, (name, shape, tensor) in enumerate(plan, 1):
            out.write(_decoded(name, shape, tensor, processor).data)
            progress.advanced(done, len(plan))


def _decoded(name: str, shape: tuple[int, ...], tensor: Any, processor: Any) -> NDArray[np.float32]:
    made = processor.process(
        weights=gguf.dequantize(tensor.data, tensor.tensor_type), name=tensor.name, tensor_key_mapping={}
    )
    if made.name != tensor.name or made.weights.shape != shape:
        raise StageError(
            f"tensor {tensor.name} of the GGUF file does not fit {name}",
            measured=made.weights.shape,
            limit=shape,
            remedy=_OTHER,
        )
    whole: NDArray[np.float32] = np.ascontiguousarray(made.weights, dtype="<f4")
    return whole


def _strip(config: Any) -> None:
    # What the weights were stored as is past, and the folder they came from is no part of the content.
    for name in ("quantization_config", "_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)


def _write_tokenizer(path: Path, output: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(output)
    # Whether the network was allowed when it was made is no property of a tokenizer.
    settings = output / "tokenizer_config.json"
    kept = json.loads(settings.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only"):
        kept.pop(name, None)
    settings.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
