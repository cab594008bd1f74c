"""Folders as hubs and trainers lay them out: the hub's cache of links, adapters of peft, sentence-transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from stages.models.checkpoint.json_files import read_given
from stages.runtime.contract import StageError

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""What peft writes: what it trained beside a checkpoint, which it names."""
SENTENCES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
"""What sentence-transformers writes beside a checkpoint: which further modules follow it, in folders of their own."""
_WHOLE = ("model.safetensors", "model.safetensors.index.json")


def located(path: Path) -> Path:
    """The folder of the files: of a repository in the hub's cache (`models--owner--name`), the snapshot it stands at.

    Raises:
        StageError: the cache holds no snapshot, or several and does not say which.
    """
    snapshots = path / "snapshots"
    if not snapshots.is_dir() or (path / "config.json").exists():
        return path
    found = sorted(one for one in snapshots.iterdir() if one.is_dir())
    main = path / "refs" / "main"
    named = snapshots / main.read_text(encoding="utf-8").strip() if main.is_file() else None
    if named in found:
        return named
    if len(found) == 1:
        return found[0]
    raise StageError(
        f"{path} is a cache of the hub, and does not say which snapshot is meant",
        measured=", ".join(one.name for one in found) or "no snapshot",
        limit="refs/main, or one snapshot",
        remedy=f"Give one of them: {found[0]}" if found else "Download it again: hf download owner/name",
    )


def refuse_dangling(folder: Path, patterns: Iterable[str]) -> None:
    """Raise StageError where a file that counts is a link to one that is gone: a cache was cleaned or moved."""
    wanted = tuple(patterns)
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists() and any(fnmatch(path.name, pattern) for pattern in wanted):
            raise StageError(
                f"{path} is a link to a file that is not there",
                measured=path.readlink(),
                limit="files, or links to files",
                remedy="Download the repository again, or copy its cache with what the links mean: cp -rL.",
            )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds what peft trained beside a checkpoint, and no checkpoint."""
    return (folder / ADAPTER).is_file() and not any((folder / name).is_file() for name in _WHOLE)


def adapter_alone(folder: Path) -> StageError:
    """The error for an adapter that is given as if it were a checkpoint."""
    found = read_given(folder / ADAPTER)
    base = str(found.get("base_model_name_or_path") or "a checkpoint that it does not name")
    source = f"hf://{base}" if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else "hf://owner/name"
    return StageError(
        f"{folder} is an adapter for {base}, and no checkpoint",
        measured=f"{found.get('peft_type', 'an adapter')} in {ADAPTER}",
        limit="a whole checkpoint",
        remedy=f"Set `base` in the step's params to that checkpoint (a folder, or {source}): it is merged.",
    )


def gives_vectors(folder: Path) -> bool:
    """Whether modules of sentence-transformers follow the model in a folder: it is asked for the vectors of texts."""
    return (folder / SENTENCES[0]).is_file()


def sentence_files(folder: Path) -> dict[str, Path]:
    """Name -> file of what sentence-transformers adds to a checkpoint, and of its further modules; none elsewhere.

    Raises:
        StageError: a module is stored as a pickle alone, or modules.json is damaged.
    """
    if not gives_vectors(folder):
        return {}
    found = {name: folder / name for name in SENTENCES if (folder / name).is_file()}
    for name in _modules(folder / SENTENCES[0]):
        weights = sorted((folder / name).glob("*.safetensors"))
        if not weights and (pickles := sorted((folder / name).glob("*.bin"))):
            raise StageError(
                f"{pickles[0]} is a pickle, which can run code when it is loaded",
                remedy="Write the model again where you trust it: SentenceTransformer(folder).save(folder).",
            )
        config = folder / name / "config.json"
        found |= {f"{name}/{one.name}": one for one in (config, *weights) if one.is_file()}
    return found


def _modules(path: Path) -> list[str]:
    try:
        listed = [str(one["path"]) for one in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise StageError(
            f"{path} is not a list of modules", measured=str(error), remedy="Fetch or write the file again."
        ) from error
    # A module without a folder of its own is the checkpoint itself; nothing outside the folder is ever read.
    return [name for name in listed if name not in ("", "..") and Path(name).name == name]
