"""YAML that remembers its lines: plain JSON values and, for each, where it was written.

The scalars are those of YAML 1.2's core schema, so that `no` is text and `200e6` a number. Tags are refused, since a
tag can name code; a key that stands twice is refused, since one of the two would be ignored in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

Path = tuple[str | int, ...]

MOST_NODES = 20_000
"""Aliases of aliases can make a small file enormous; no recipe comes near this."""

_PLAIN: tuple[tuple[re.Pattern[str], Callable[[str], Any]], ...] = (
    (re.compile(r"(?:~|null|Null|NULL|)"), lambda text: None),
    (re.compile(r"true|True|TRUE"), lambda text: True),
    (re.compile(r"false|False|FALSE"), lambda text: False),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"), lambda text: _number(text)),
)


@dataclass(frozen=True)
class Fault:
    """One mistake: the path of the field, and what is wrong with it together with what is allowed."""

    path: Path
    text: str
    line: int | None = None


@dataclass(frozen=True)
class Located:
    """A document: its value, the line of each path, and what was wrong with it as YAML."""

    value: Any
    lines: dict[Path, int]
    faults: tuple[Fault, ...]

    def line(self, path: Path) -> int:
        """The line of a path, or of the nearest thing around it that was written."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_yaml(text: str) -> Located:
    """Parse one YAML document.

    Returns:
        Its value and lines. A document that cannot be parsed has the value None and one fault.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(part for part in (error.context, error.problem) if part)
        return Located(None, {}, (Fault((), f"this is not YAML ({said})", mark.line + 1 if mark else 1),))
    except yaml.YAMLError as error:
        return Located(None, {}, (Fault((), f"this is not YAML ({str(error).splitlines()[0]})", 1),))
    walk = _Walk()
    value = None if root is None else walk.value(root, (), ())
    return Located(value, walk.lines, tuple(walk.faults))


def scalar(text: str) -> Any:
    """One value as a recipe would hold it: `4`, `true`, `[a, b]`, `{x: 1}`, text.

    Raises:
        ValueError: it is not YAML, or holds a tag or a key twice.
    """
    found = read_yaml(text)
    if found.faults:
        raise ValueError(found.faults[0].text)
    return found.value


class _Walk:
    """One pass over the nodes of a document."""

    def __init__(self) -> None:
        self.lines: dict[Path, int] = {}
        self.faults: list[Fault] = []
        self._seen = 0

    def value(self, node: yaml.Node, path: Path, above: tuple[int, ...]) -> Any:
        self.lines[path] = node.start_mark.line + 1
        self._seen += 1
        if id(node) in above or self._seen > MOST_NODES:
            return self._fault(path, "an alias that holds itself, or aliases that grow without end; write it out")
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
            return self._fault(path, f"the tag {_shown(node.tag)} is refused; allowed: plain values without tags")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, (*above, id(node)))
        if isinstance(node, yaml.SequenceNode):
            return [self.value(inner, (*path, i), (*above, id(node))) for i, inner in enumerate(node.value)]
        return _scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path, above: tuple[int, ...]) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, inner in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self.faults.append(Fault(path, "a key must be text", line))
                continue
            if key.tag == "tag:yaml.org,2002:merge":
                merged = self._merged(inner, path, above) | merged
                continue
            if key.value in own:
                first = self.lines[(*path, key.value)]
                self.faults.append(Fault((*path, key.value), f"the key stands twice, first on line {first}", line))
                continue
            own[key.value] = self.value(inner, (*path, key.value), above)
            self.lines[(*path, key.value)] = line
        return merged | own

    def _merged(self, node: yaml.Node, path: Path, above: tuple[int, ...]) -> dict[str, Any]:
        line = self.lines.get(path, 1)
        found = self.value(node, path, above)
        self.lines[path] = line
        parts = found if isinstance(found, list) else [found]
        if not all(isinstance(part, dict) for part in parts):
            return self._fault(path, "`<<` takes a mapping or a list of mappings") or {}
        return {key: value for part in reversed(parts) for key, value in part.items()}

    def _fault(self, path: Path, text: str) -> Any:
        self.faults.append(Fault(path, text, self.lines[path]))
        return None


def _scalar(node: yaml.Node) -> Any:
    text: str = node.value
    if getattr(node, "style", None) is None:
        for pattern, made in _PLAIN:
            if pattern.fullmatch(text):
                return made(text)
    return text


def _number(text: str) -> int | float:
    # 200e6 is a count, and a field that wants an integer refuses a float.
    whole = re.fullmatch(r"([-+]?[0-9]+)[eE]\+?([0-9]{1,2})", text)
    exact = int(whole[1]) * 10 ** int(whole[2]) if whole else None
    # Where a float holds the number exactly: 1e30 is one that it does not hold, and stays the float next to it.
    return exact if exact is not None and exact == float(text) else float(text)


def _shown(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")
