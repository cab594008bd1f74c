"""How large a model is: the bytes of the files that hold its weights and graph."""

from __future__ import annotations

from collections.abc import Mapping

MODEL_FILES = (".safetensors", ".onnx", ".onnx.data", ".plan")


def size_bytes(files: Mapping[str, int]) -> int:
    """Bytes of the model's own files, tokenizer and configuration left out.

    Args:
        files: relative path -> bytes, e.g. from a manifest.

    Raises:
        ValueError: none of them is a model's file.
    """
    sizes = [size for name, size in files.items() if name.endswith(MODEL_FILES)]
    if not sizes:
        raise ValueError(f"no model among {', '.join(sorted(files)) or 'no files'}")
    return sum(sizes)
