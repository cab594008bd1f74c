"""An artifact as its bytes say it is: precisions, zeros, what is stored once and serves several places, what is twice.

Nothing is loaded as a model: safetensors headers and ONNX initializers are read, and the tensors' bytes are mapped.
"""

from __future__ import annotations

import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.results import Inspection, Tensors
from stages.runtime.artifacts import Store
from stages.runtime.contract import Manifest, StageError
from stages.runtime.fingerprint import digest_bytes
from stages.runtime.looking import looked_into

LEAST_DUPLICATE_BYTES = 4096
"""Small equal tensors (norms of ones, zero biases) are no waste worth a line."""

_FLOATS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3": 1, "float8_e5m2": 1}
_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_ONNX = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
    17: "float8_e4m3",
    19: "float8_e5m2",
    21: "uint4",
    22: "int4",
}


@dataclass(frozen=True)
class Stored:
    """One stored tensor: element type, shape, bytes, and the places it serves (its own name when it is one)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    places: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Elements; the halves of a 4-bit pair count each."""
        return math.prod(self.shape)

    def zeros(self) -> int:
        """How many elements are zero; minus zero is."""
        if not self.elements:
            return 0
        if self.dtype in ("int4", "uint4"):
            return self.elements - _nonzero_nibbles(self.data, self.elements)
        width = len(self.data) // self.elements
        words = self.data.view(f"u{width}") if self.data.flags.aligned else self.data.copy().view(f"u{width}")
        if self.dtype in _FLOATS:
            words = words << words.dtype.type(1)
        return int(self.elements - np.count_nonzero(words))


def inspect(store: Store, identity: str) -> Inspection:
    """Read one artifact; every byte is hashed on the way.

    Raises:
        StageError: it is not sealed, its bytes differ from their digests, or a file is not what its name says.
    """
    with looked_into(store, identity) as (folder, manifest):
        return _inspected(store.uri, identity, manifest, folder)


def _inspected(uri: str, identity: str, manifest: Manifest, folder: Path) -> Inspection:
    tensors = list(stored(folder))
    facts = _facts(folder)
    duplicates = _duplicates(tensors)
    matrices = [t for t in tensors if len(t.shape) >= 2 and t.dtype not in ("int64", "int32", "bool")]
    total = sum(t.elements for t in matrices)
    zeros = {t.name: t.zeros() for t in tensors}
    return Inspection(
        fingerprint=identity,
        uri=uri,
        kind=manifest.kind,
        step=manifest.provenance.step,
        size_bytes=manifest.size_bytes,
        files={name: entry.size for name, entry in manifest.files.items()},
        metrics=manifest.metrics,
        parameters=sum(t.elements for t in tensors),
        sparsity=sum(zeros[t.name] for t in matrices) / total if total else 0.0,
        precisions=_precisions(tensors, zeros),
        shared=[
            *_shared(facts),
            *(list(t.places) for t in tensors if len(t.places) > 1 and len(t.data) >= LEAST_DUPLICATE_BYTES),
        ],
        duplicates=[[t.name for t in group] for group in duplicates],
        duplicate_bytes=sum(len(t.data) for group in duplicates for t in group[1:]),
        facts={name: fact for name, fact in facts.items() if _small(fact)},
        work=manifest.work.model_dump(mode="json"),
        provenance=manifest.provenance.model_dump(mode="json"),
    )


def find_artifact(store: Store, text: str) -> str:
    """The fingerprint meant by a step's name (its newest artifact) or by the beginning of a fingerprint.

    Raises:
        StageError: none or several are meant.
    """
    named = [(m.provenance.created, identity) for identity, m in store.manifests() if m.provenance.step == text]
    return max(named)[1] if named else store.resolve(text)


def stored(folder: Path) -> Iterator[Stored]:
    """Every tensor stored in a folder's safetensors and ONNX files."""
    packed = _packed_names(folder)
    for path in sorted(folder.rglob("*.safetensors")):
        for tensor in read_safetensors(path):
            if tensor.name in packed and tensor.dtype == "uint8":
                shape = (*tensor.shape[:-1], tensor.shape[-1] * 2)
                tensor = Stored(tensor.name, "int4", shape, tensor.data)
            yield tensor
    for path in sorted(folder.rglob("*.onnx")):
        yield from read_onnx(path)


def read_safetensors(path: Path) -> Iterator[Stored]:
    """The tensors of one safetensors file, mapped from the disk.

    Raises:
        StageError: it is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = stream.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > size - 8:
            raise StageError(f"{path.name} is no safetensors file", remedy="Run the step that made it again.")
        header = json.loads(stream.read(length))
    data: NDArray[np.uint8] = (
        np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.empty(0, np.uint8)
    )
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            dtype = _SAFETENSORS.get(entry["dtype"], str(entry["dtype"]).lower())
            yield Stored(name, dtype, tuple(entry["shape"]), data[begin:end])


def read_onnx(path: Path) -> Iterator[Stored]:
    """The initializers of one ONNX model, each with the nodes that read it."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    readers: dict[str, list[str]] = defaultdict(list)
    for node in model.graph.node:
        for name in dict.fromkeys(node.input):
            readers[name].append(node.name or node.op_type)
    for tensor in model.graph.initializer:
        places = readers[tensor.name]
        yield Stored(
            tensor.name,
            _ONNX.get(tensor.data_type, f"onnx type {tensor.data_type}"),
            tuple(tensor.dims),
            _onnx_bytes(tensor, path.parent),
            tuple(places) if len(places) > 1 and math.prod(tensor.dims) > 1 else (),
        )


def _onnx_bytes(tensor: Any, folder: Path) -> NDArray[np.uint8]:
    import onnx

    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        where = {entry.key: entry.value for entry in tensor.external_data}
        location = Path(where["location"])
        if location.is_absolute() or ".." in location.parts:
            raise StageError(f"{tensor.name} points out of its artifact", measured=where["location"])
        offset, length = int(where.get("offset", 0)), int(where.get("length", 0))
        if length == 0:
            return np.empty(0, np.uint8)
        return np.memmap(folder / location, np.uint8, "r", offset=offset, shape=(length,))
    if tensor.HasField("raw_data"):
        return np.frombuffer(tensor.raw_data, np.uint8)
    return np.frombuffer(onnx.numpy_helper.to_array(tensor).tobytes(), np.uint8)


def _nonzero_nibbles(data: NDArray[np.uint8], elements: int) -> int:
    low, high = np.count_nonzero(data & 0x0F), np.count_nonzero(data >> 4)
    # An odd count leaves half a byte over, which holds nothing.
    spare = int(bool(data[-1] >> 4)) if elements % 2 else 0
    return int(low + high - spare)


def _precisions(tensors: Iterable[Stored], zeros: Mapping[str, int]) -> list[Tensors]:
    groups: dict[str, list[Stored]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype].append(tensor)
    made = []
    for dtype, group in groups.items():
        elements = sum(t.elements for t in group)
        share = sum(zeros[t.name] for t in group) / elements if elements else 0.0
        held = sum(len(t.data) for t in group)
        made.append(Tensors(dtype=dtype, count=len(group), elements=elements, bytes=held, zeros=share))
    return sorted(made, key=lambda one: -one.bytes)


def _duplicates(tensors: Iterable[Stored]) -> list[list[Stored]]:
    sizes: dict[int, list[Stored]] = defaultdict(list)
    for tensor in tensors:
        if len(tensor.data) >= LEAST_DUPLICATE_BYTES:
            sizes[len(tensor.data)].append(tensor)
    found: dict[str, list[Stored]] = defaultdict(list)
    for group in sizes.values():
        for tensor in group if len(group) > 1 else ():
            found[digest_bytes(tensor.data.tobytes())].append(tensor)
    return [group for group in found.values() if len(group) > 1]


def _facts(folder: Path) -> dict[str, Any]:
    names = ("config.json", "structure.json", "quantization.json", "corpus.json", "graph.json", "engine.json")
    paths = [folder / name for name in names]
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()}


def _small(fact: Any) -> bool:
    return len(json.dumps(fact)) <= 100_000


def _packed_names(folder: Path) -> set[str]:
    layers = _facts(folder).get("quantization.json", {}).get("layers", {})
    return {f"{name}.weight" for name, layer in layers.items() if layer.get("bits") == 4}


def _shared(facts: Mapping[str, Any]) -> list[list[str]]:
    """Places that share a tensor in a checkpoint: groups on one basis, tied tensors, the tied head."""
    structure = facts.get("structure.json", {})
    groups = [list(group["modules"]) for group in structure.get("shared", [])]
    groups += [list(names) for names in structure.get("tied", [])]
    for name, layer in facts.get("quantization.json", {}).get("layers", {}).items():
        if layer.get("tied_to"):
            groups.append([layer["tied_to"], name])
    checkpoint = "engine.json" not in facts and "graph.json" not in facts
    named = any("lm_head" in place for group in groups for place in group)
    if checkpoint and facts.get("config.json", {}).get("tie_word_embeddings") and not named:
        groups.append(["embedding", "head"])
    return groups
