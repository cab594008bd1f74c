"""The folder of `--output`: report, recipe, result and artifacts of one run, whole, in place of an earlier run's.

All of it is written into a hidden folder inside, and comes into place by renames when the run has ended. `result.json`
goes first and comes last: where it stands, the folder is whole, and it names what may be replaced. A kill between two
renames leaves it away; whoever looks next puts back what stood before. Files of others are never touched.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pydantic import ValidationError

from flows.recipe.model import Recipe
from flows.reporting.format import size
from flows.results import RunResult
from stages import stage
from stages.runtime.artifacts import Store
from stages.runtime.contract import DoesNotFit, Kind, StageError

REPORT, RECIPE, RESULT = "report.html", "recipe.yaml", "result.json"
"""Names with a dot, which no step bears."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NEW, _OLD = ".enginery-new", ".enginery-old"


def copied(recipe: Recipe) -> list[str]:
    """The steps whose artifacts lie in the folder: those that are judged, and those that no other step reads."""
    # A report is about what it reads and makes nothing of it.
    making = [step for step in recipe.steps if stage(step.stage).output is not Kind.REPORT]
    given = [sources for step in making for sources in step.inputs.values()]
    read = {one for sources in given for one in ([sources] if isinstance(sources, str) else sources)}
    judged: set[str] = set()
    if recipe.judge is not None:
        judged = set(recipe.judge.artifacts)
        read |= {recipe.judge.baseline, *recipe.judge.corpora}
    return [step.name for step in recipe.steps if step.name in judged or step.name not in read]


def check_output(folder: Path, recipe: Recipe, store: Store) -> None:
    """Refuse before the work what could not be written after it.

    Raises:
        StageError: the folder is a file, may not be written to, lies in the store, or holds files of others by the
            names that the run would give to its own.
        DoesNotFit: its disk is full.
    """
    kept = [store.scratch] if store.objects.remote else [store.scratch, Path(unquote(urlsplit(store.uri).path))]
    if any(folder.resolve().is_relative_to(one.resolve()) for one in kept):
        raise StageError(
            f"--output {folder} lies in the store",
            limit=f"a folder outside {', '.join(map(str, kept))}",
            remedy="What lies there is the store's to keep and to sweep.",
        )
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise StageError(
            f"--output {folder} is no folder", measured=f"{nearest} is a file", remedy="Name another folder."
        )
    try:
        with suppress(FileNotFoundError):
            folder.lstat()  # a name that no folder can have
        with tempfile.TemporaryFile(dir=nearest) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        kind = DoesNotFit if error.errno in _FULL else StageError
        raise kind(
            f"--output {folder} cannot be written to", measured=error.strerror, remedy="Name another folder."
        ) from error
    if nearest == folder:
        with suppress(BlockingIOError), _locked(folder, wait=False):  # another run's end has it in hand
            _restore(folder)
            _refuse_others(folder, [REPORT, RECIPE, RESULT, *copied(recipe)])


def check_room(folder: Path, sizes: Mapping[str, int]) -> None:
    """Refuse what does not fit beside what lies there already.

    Args:
        folder: that of `--output`.
        sizes: what is to be copied -> its bytes, as far as they are known.

    Raises:
        DoesNotFit: the disk has less.
    """
    nearest = next(path for path in (folder, *folder.parents) if path.is_dir())
    free, needed = shutil.disk_usage(nearest).free, sum(sizes.values())
    if needed > free:
        raise DoesNotFit(
            f"--output {folder} has no room for {', '.join(sizes)}",
            measured=f"{size(needed)} to copy",
            limit=f"{size(free)} free",
            remedy="Free space, or name a folder on another disk.",
        )


@dataclass(frozen=True)
class Copies:
    """What will come into the folder at once."""

    folder: Path

    def add(self, path: Path, name: str) -> None:
        """Copy a file, or a folder with all its files; one may move and change the copy."""
        target = self.folder / _NEW / name
        for one in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if one.is_file():
                copy = target / one.relative_to(path) if path.is_dir() else target
                part = copy.with_name(f".{copy.name}.part")
                part.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(one, part)
                part.replace(copy)

    def conclude(self, result: RunResult) -> None:
        """Write the result, which names what lies there."""
        part = self.folder / _NEW / f".{RESULT}.part"
        part.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
        part.replace(part.with_name(RESULT))

    def place(self) -> None:
        """Put what was added in place of what an earlier run left; a break on the way leaves what stood before."""
        new, old = self.folder / _NEW, self.folder / _OLD
        names = sorted(path.name for path in new.iterdir())
        _refuse_others(self.folder, names)
        earlier = _names(self.folder / RESULT) | set(names)
        old.mkdir()
        try:
            for name in sorted(earlier, key=lambda one: one != RESULT):
                if os.path.lexists(self.folder / name):
                    (self.folder / name).rename(old / name)
            for name in sorted(names, key=lambda one: one == RESULT):
                (new / name).rename(self.folder / name)
        finally:
            _restore(self.folder)


@contextmanager
def copies_into(folder: Path) -> Iterator[Copies]:
    """A place for copies; what was not put in place when the block ends is gone."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder):
            _restore(folder)
            (folder / _NEW).mkdir()
            try:
                yield Copies(folder)
            finally:
                _remove(folder / _NEW)
    finally:
        if made:
            with suppress(OSError):  # it holds something: that was the point
                folder.rmdir()


def _restore(folder: Path) -> None:
    """Put back what stood before where a kill came between the renames; clear away what is left of others."""
    new, old = folder / _NEW, folder / _OLD
    if old.is_dir() and not (folder / RESULT).exists():
        for name in _names(new / RESULT):
            if os.path.lexists(folder / name) and not os.path.lexists(new / name):
                (folder / name).rename(new / name)
        for path in sorted(old.iterdir(), key=lambda one: one.name == RESULT):
            path.rename(folder / path.name)
    for path in (old, new):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)


def _names(result: Path) -> set[str]:
    """What the run of a result left beside it; nothing where this is no result."""
    try:
        left = RunResult.model_validate_json(result.read_bytes()).outputs
    except (OSError, ValidationError):
        return set()
    return {RESULT, *(name for name in left if name == Path(name).name)}


def _refuse_others(folder: Path, names: Iterable[str]) -> None:
    own = _names(folder / RESULT)
    others = [name for name in names if name not in own and os.path.lexists(folder / name)]
    if others:
        raise StageError(
            f"--output {folder} holds what no run has left there",
            measured=", ".join(others),
            remedy="Name another folder, or move that away.",
        )


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Two runs that end at once come one after the other.

    Raises:
        BlockingIOError: another has it, and nobody waits.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise
            # Some network file systems lock no folders; there two runs at once are left to the user.
        yield
    finally:
        os.close(descriptor)
