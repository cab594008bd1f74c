"""The identity of work: canonical JSON, digests of code as syntax trees, versions from constraints.txt."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

from stages.runtime.contract import PARTIAL, FileEntry, Image, StageError, Work

ROOT = Path(__file__).resolve().parents[2]

_TORCH = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "onnx", "onnxruntime")
LIBRARIES: Mapping[Image, tuple[str, ...]] = {
    Image.BASE: ("pyarrow",),
    Image.TORCH: _TORCH,
    Image.TENSORRT: ("onnx", "onnxruntime", "tensorrt-rtx", "numpy"),
    # What executes a plan is a fact of where that is, and stands among the work's `executor`.
    Image.GPU: _TORCH,
}
"""The libraries whose version can change a stage's bytes."""

_NOT_CONTENT = ("stages.runtime",)
"""Moving, sealing and reporting code cannot change what a stage computes, so it is left out of `code`."""


def digest_bytes(data: bytes) -> str:
    """sha256 as lowercase hex."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes as lowercase hex, read in constant memory."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_tree(root: Path) -> str:
    """sha256 over the sorted (relative path, sha256) pairs of every file below `root`."""
    entries = sorted((p.relative_to(root).as_posix(), digest_file(p)) for p in root.rglob("*") if p.is_file())
    return digest_bytes(canonical(entries))


def entries(folder: Path) -> dict[str, FileEntry]:
    """The files of a finished draft, hashed; state to resume from is not among them."""
    found: dict[str, FileEntry] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name.split("/")[0] != PARTIAL:
            found[name] = FileEntry(sha256=digest_file(path), size=path.stat().st_size)
    return found


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces; refuses NaN, whose text is not JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def fingerprint(work: Work) -> str:
    """sha256 hex of the work's canonical JSON: the name of the artifact it makes."""
    return digest_bytes(canonical(work.model_dump(mode="json")))


def first_difference(old: Work, new: Work) -> str:
    """The first field in which two works differ, as `field: old -> new`; empty when they are equal."""
    a, b = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    for key in sorted(a.keys() | b.keys(), key=_field_order):
        if a.get(key) != b.get(key):
            return f"{key}: {_short(a.get(key))} -> {_short(b.get(key))}"
    return ""


def differing_fields(one: Work, other: Work) -> int:
    """In how many fields two works of a stage differ, each of the params and inputs for itself."""
    old, new = one.model_dump(mode="json"), other.model_dump(mode="json")
    count = sum(old[field] != new[field] for field in ("code", "requires", "executor"))
    for field in ("params", "inputs"):
        count += sum(old[field].get(key) != new[field].get(key) for key in old[field].keys() | new[field].keys())
    return count


def _field_order(key: str) -> tuple[int, str]:
    order = ("stage", "params", "inputs", "code", "requires", "executor")
    return (order.index(key.split(".")[0]), key)


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        flat: dict[str, Any] = {}
        for key, inner in value.items():
            flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: value}


@cache
def code_digest(*modules: str) -> str:
    """Digest of project modules and the project modules they import, as syntax trees.

    Comments, docstrings and line breaks change nothing; `stages.runtime` is left out, since it moves bytes and does
    not make them.
    """
    seen: dict[str, str] = {}
    pending = list(modules)
    while pending:
        name = pending.pop()
        if name in seen or name.startswith(_NOT_CONTENT):
            continue
        digest, known = _module(name)
        if digest:
            seen[name] = digest
            pending += known
    _read.keep()
    return digest_bytes(canonical(sorted(seen.items())))


@cache
def _module(name: str) -> tuple[str, tuple[str, ...]]:
    """A module's digest and what it may import of the project; nothing where there is no such module."""
    path = _source(name)
    return _read(path) if path else ("", ())


class _Modules:
    """What was read of modules, kept beside their bytecode and, like that, by their time and size.

    So that what is kept of a module is of what runs: Python itself would run the bytecode of an earlier one.
    """

    def __init__(self, root: Path) -> None:
        self._path = Path(cache_from_source(str(root / "digests.py"))).with_suffix(".json")
        self._kept: dict[str, list[Any]] | None = None
        self._changed = False

    def __call__(self, path: Path) -> tuple[str, tuple[str, ...]]:
        """A module's digest and what it may import of the project."""
        if self._kept is None:
            self._kept = self._stored()
        stamp = _stamp(path)
        found = self._kept.get(str(path))
        if not found or found[0] != stamp:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            # `stages` itself is the table of all stages: following it would tie every stage to every other.
            known = [one for one in imported(tree) if one.startswith("stages.")]
            found = [stamp, digest_bytes(ast.dump(_without_docstrings(tree)).encode()), known]
            self._kept[str(path)], self._changed = found, True
        return found[1], tuple(found[2])

    def keep(self) -> None:
        """Write down what is new, where that is allowed."""
        if not self._changed or sys.dont_write_bytecode:
            return
        self._changed = False
        whole = self._path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        try:
            whole.write_bytes(canonical({"by": _stamp(Path(__file__)), "modules": self._kept}))
            whole.replace(self._path)
        except OSError:  # no room, or no right to: it is read again next time
            with suppress(OSError):
                whole.unlink(missing_ok=True)

    def _stored(self) -> dict[str, list[Any]]:
        try:
            kept = json.loads(self._path.read_bytes())
            return dict(kept["modules"]) if kept["by"] == _stamp(Path(__file__)) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


def _stamp(path: Path) -> list[int]:
    known = path.stat()
    return [known.st_mtime_ns, known.st_size]


_read = _Modules(ROOT / "stages")


def stage_digest(name: str, *used: str) -> str:
    """Digest of the code of a stage: of its file, or of `stage` in its folder, of `used`, and of what they import."""
    folder = f"stages.{name}.stage"
    return code_digest(folder if _source(folder) else f"stages.{name}", *used)


def _source(module: str) -> Path | None:
    if module.split(".")[0] not in ("stages", "flows"):
        return None
    path = ROOT.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def imported(tree: ast.AST) -> list[str]:
    """What a module's code may import, wherever the import stands: modules, their packages, and names in them."""
    names: list[str] = []
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names + [name.rpartition(".")[0] for name in names]  # a package's own module runs first


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [
                s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            ] or [ast.Pass()]
    return tree


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """A tree and every statement below it. Most of a tree is expressions, which hold none."""
    yield tree
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        inner = getattr(tree, field, None)
        # Of an expression such as `a if b else c`, of a lambda, `body` is another expression.
        for statement in inner if isinstance(inner, list) else ():
            yield from _statements(statement)


@cache
def constraints() -> Mapping[str, str]:
    """Library, its name normalized -> version, from constraints.txt: beside the packages, or inside them in a wheel."""
    for path in (ROOT / "constraints.txt", ROOT / "stages" / "constraints.txt"):
        if path.is_file():
            pairs = re.findall(r"^([A-Za-z0-9_.\-]+)==([^\s;]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
            return {_normal(name): version for name, version in pairs}
    raise StageError(f"constraints.txt is missing below {ROOT}", remedy="Install enginery again.")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(image: Image) -> dict[str, str]:
    """Library -> version that a stage of this image must run with."""
    known = constraints()
    return {name: known[name] for name in LIBRARIES[image]}


def assert_installed(requires: Mapping[str, str]) -> None:
    """Raise unless each library is installed in the required version.

    Raises:
        StageError: a library is absent or has another version; a local suffix such as `+cpu` is ignored.
    """
    for name, wanted in requires.items():
        try:
            found = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "absent"
        if found != wanted.split("+")[0]:
            raise StageError(
                f"the work requires {name}",
                measured=found,
                limit=wanted,
                remedy="Install the versions of constraints.txt, e.g. with `make install`.",
            )
