"""Measures of items that other packages bring: functions under the entry point `enginery.measures`.

A function takes what was answered and the item, as a mapping of the fields of `stages.measures.items.Item`, and gives a
number. Which package it comes from, in which version and with which code, is a part of what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.measures.items import Item
from stages.measures.table import OWN
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import canonical, digest_bytes, digest_file

GROUP = "enginery.measures"


def installed() -> dict[str, list[EntryPoint]]:
    """Name -> what registers a measure of it; more than one where packages differ about it."""
    found: dict[str, list[EntryPoint]] = {}
    for one in entry_points(group=GROUP):
        found.setdefault(one.name, []).append(one)
    return dict(sorted(found.items()))


def identity(name: str) -> str:
    """The package, its version and a digest of its code.

    Raises:
        StageError: no package registers the measure, or several do.
    """
    point = _point(name)
    assert point.dist is not None
    return f"{point.dist.name} {point.dist.version} {_code(point)[:12]}"


def _code(point: EntryPoint) -> str:
    """Digest of every module of the package: its version may stay while it is worked on."""
    top = point.module.partition(".")[0]
    found = find_spec(top)
    if found is None or found.origin is None:
        raise StageError(
            f"the measure {point.name!r} cannot be imported",
            measured=f"no module {top}",
            remedy="Install its package again.",
        )
    own = Path(found.origin)
    root = own.parent
    files = sorted(root.rglob("*.py")) if found.submodule_search_locations else [own]
    return digest_bytes(canonical([[one.relative_to(root).as_posix(), digest_file(one)] for one in files]))


def _point(name: str) -> EntryPoint:
    known = installed()
    points = known.get(name, [])
    if len(points) == 1:
        return points[0]
    if points:
        raise StageError(
            f"several packages register a measure {name!r}",
            measured=", ".join(sorted(str(one.dist and one.dist.name) for one in points)),
            limit="one",
            remedy="Uninstall all but one of them.",
        )
    raise StageError(
        f"no package that is installed registers a measure {name!r}",
        measured=f"under the entry point {GROUP}: {', '.join(known) or 'nothing'}",
        remedy="Install the package where steps run, or name one that is there.",
    )


def check_installed(names: Iterable[str]) -> None:
    """Raise StageError where a measure is not registered by exactly one package."""
    for name in names:
        _point(name)


@cache
def _function(name: str) -> Callable[[str, Mapping[str, Any]], object]:
    point = _point(name)
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise StageError(
            f"the measure {name!r} cannot be imported", measured=error, remedy="Install its package again."
        ) from error
    if not callable(found):
        raise StageError(f"the measure {name!r} is no function", measured=point.value, remedy="Name one there.")
    function: Callable[[str, Mapping[str, Any]], object] = found
    return function


def scored(names: Sequence[str], answer: str, item: Item) -> dict[str, float]:
    """Key of a document -> what one's own measures say of an answer.

    Raises:
        StageError: a function breaks, or gives no finite number.
    """
    found: dict[str, float] = {}
    for name in names:
        function = _function(name)
        try:
            value = function(answer, item.model_dump(mode="json"))
        except Exception as error:
            raise _broken(name, item, f"{type(error).__name__}: {error}") from error
        if not isinstance(value, bool | int | float) or not math.isfinite(value):
            raise _broken(name, item, repr(value))
        found[f"{OWN}{name}"] = float(value)
    return found


def _broken(name: str, item: Item, measured: str) -> StageError:
    return StageError(
        f"the measure {name!r} gives no finite number for item {item.id}",
        measured=measured,
        limit="a finite number",
        remedy=f"Correct the function, or take {name!r} out of `own`.",
    )
