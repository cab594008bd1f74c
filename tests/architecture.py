"""The map of the house, held against the code: python -m tests.architecture.

Prints each room with its lines and its arrows to other rooms, then every breach: a file outside the map, an arrow that
points up, a circle of files, a room, file or function that has grown too large. Ends with 1 where there is a breach.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stages import STAGES
from stages.runtime.fingerprint import ROOT, imported

FLOWS = (
    ("flows.__main__",),
    ("flows.cli",),
    ("flows.commands",),
    ("flows.triggers", "flows.production", "flows.pages", "flows.endpoint"),
    ("flows.pipeline",),
    ("flows.registry", "flows.running", "flows.judging"),
    ("flows.reporting", "flows.tracking", "flows.recipe", "flows.prefect_api"),
    ("flows.results", "flows.settings", "flows.names"),
)
"""From top to bottom; rooms of one line do not know each other. the last line is of files."""

VERBS = tuple(sorted(f"stages.{name}" for name in STAGES))
STAGES_SIDE = (
    ("stages.__main__", "stages.admission"),
    VERBS,
    ("stages.graphs", "stages.serving"),
    ("stages.models.low_rank", "stages.measures"),
    ("stages.models.blockwise",),
    ("stages.models.checkpoint",),
    ("stages.models.layers",),
    ("stages.models.anatomy", "stages.models.text"),
    ("stages.models.memory",),
    ("stages.algorithms",),
    ("stages.adapters.lm_eval_harness",),
    ("stages.adapters",),
    ("stages.adapters.s3", "stages.adapters.tensorrt"),
    ("stages.runtime",),
)
LAYERS = (*FLOWS, *STAGES_SIDE)

MOST_FILES, MOST_LINES = 20, 300
MOST_FUNCTION_LINES, MOST_PARAMETERS = 60, 7
ONE_A_TECHNIQUE = "stages.algorithms"
"""As many files as there are techniques."""
OPTIONS = "flows.commands"
"""A command has as many parameters as a person has options."""
TESTS_APART = ("benchmarks", "cases", "fuzz", "infra", "production", "real", "services")
"""Folders of tests that mirror no room: they try the whole."""


@dataclass(frozen=True)
class File:
    """A module of the project: its dotted name, its path below the root, its tree, the modules of ours it imports."""

    name: str
    path: Path
    lines: int
    tree: ast.Module
    imports: frozenset[str]


@cache
def files(root: Path = ROOT) -> Mapping[str, File]:
    """Every module of `flows` and `stages` by its dotted name."""
    paths = {
        _dotted(path.relative_to(root)): path for top in ("flows", "stages") for path in (root / top).rglob("*.py")
    }
    found = {}
    for name, path in sorted(paths.items()):
        text = path.read_text(encoding="utf-8")
        tree, imports = _read(text)
        ours = frozenset(one for one in imports if one in paths and one != name)
        found[name] = File(name, path.relative_to(root), text.count("\n"), tree, _without_packages(ours, paths))
    return found


@cache
def _read(text: str) -> tuple[ast.Module, frozenset[str]]:
    tree = ast.parse(text)
    return tree, frozenset(imported(tree))


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _without_packages(names: frozenset[str], paths: Mapping[str, Path]) -> frozenset[str]:
    """`from room import file` names the room, too; an arrow goes to the file alone."""
    inner = {name.rpartition(".")[0] for name in names}
    return frozenset(one for one in names if not (paths[one].name == "__init__.py" and one in inner))


def room(name: str) -> str | None:
    """The room of a module: the longest name of the map that it begins with; None outside the map."""
    known = [one for line in LAYERS for one in line if name == one or name.startswith(f"{one}.")]
    return max(known, key=len, default=None)


PACKAGES = ("flows", "stages", "stages.models")
"""Houses of rooms: their own module is a docstring, or the table of stages."""


def outside(found: Mapping[str, File]) -> Iterator[str]:
    """Files that no room of the map holds, and tests that mirror none."""
    for name, file in found.items():
        if name not in PACKAGES and room(name) is None:
            yield f"{file.path} lies in no room of the map"
    tests = ROOT / "tests"
    for path in sorted(tests.rglob("test_*.py")):
        here = path.relative_to(tests)
        if len(here.parts) == 1 or here.parts[0] in TESTS_APART:
            continue
        if not (ROOT / here.parent).is_dir():
            yield f"tests/{here} mirrors no folder"


def upward(found: Mapping[str, File]) -> Iterator[str]:
    """Imports that go up, or from a room to another of its line."""
    height = {name: number for number, line in enumerate(LAYERS) for name in line}
    for file in found.values():
        mine = room(file.name)
        for target in sorted(file.imports):
            theirs = room(target)
            if mine is None or theirs is None or mine == theirs:
                continue
            if height[theirs] <= height[mine]:
                yield f"{file.name} imports {target}: {mine} may not know {theirs}"


def in_disguise(found: Mapping[str, File]) -> Iterator[str]:
    """Imports that neither this map nor the digests of code follow."""
    for file in found.values():
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                yield f"{file.path}:{node.lineno} imports relatively: write the whole name"
            table = (isinstance(node, ast.ImportFrom) and node.module == "stages" and not node.level) or (
                isinstance(node, ast.Import) and "stages" in (alias.name for alias in node.names)
            )
            if table and file.name.startswith("stages") and file.name not in ("stages.__main__", "stages.admission"):
                yield f"{file.path}:{node.lineno} imports the table of stages: a stage knows no other"


def circles(found: Mapping[str, File]) -> list[list[str]]:
    """Sets of files that import each other, by Tarjan's algorithm (1972)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for target in found[name].imports:
            if target not in number:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], number[target])
        if low[name] == number[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                circles.append(sorted(stack[at:]))
            del stack[at:]

    for name in found:
        if name not in number:
            visit(name)
    return circles


def functions(file: File) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many a caller may give; a method's own object is not given."""
    taken = function.args
    every = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs, *filter(None, (taken.vararg, taken.kwarg))]
    return len(every) - (bool(every) and every[0].arg in ("self", "cls"))


def too_large(found: Mapping[str, File]) -> Iterator[str]:
    """Rooms, files and functions beyond the house's limits."""
    for name, count in sorted(_sizes(found).items()):
        if count > MOST_FILES and name != ONE_A_TECHNIQUE:
            yield f"{name} has {count} files; {MOST_FILES} at most"
    for file in found.values():
        if file.lines > MOST_LINES:
            yield f"{file.path} has {file.lines} lines; {MOST_LINES} at most"
        for function in functions(file):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > MOST_FUNCTION_LINES:
                yield f"{file.path}:{function.lineno} {function.name} has {lines} lines; {MOST_FUNCTION_LINES} at most"
            many = parameters(function)
            if many > MOST_PARAMETERS and not file.name.startswith(OPTIONS):
                yield f"{file.path}:{function.lineno} {function.name} takes {many}; {MOST_PARAMETERS} at most"


def _sizes(found: Mapping[str, File]) -> Counter[str]:
    return Counter(mine for file in found.values() if (mine := room(file.name)) and file.path.name != "__init__.py")


def rooms_without_a_word(found: Mapping[str, File]) -> Iterator[str]:
    """Rooms whose module is not one docstring that says what lives there, what may be imported, what never comes in."""
    for file in found.values():
        if file.path.name != "__init__.py" or file.name == "stages":
            continue
        said = " ".join((ast.get_docstring(file.tree) or "").split())
        if len(file.tree.body) != 1 or not said:
            yield f"{file.path} is not one docstring"
        elif file.name not in PACKAGES and not ("May be imported from here:" in said and "Never comes in:" in said):
            yield f"{file.path} does not say what may be imported and what never comes in"


def breaches(found: Mapping[str, File]) -> list[str]:
    """Everything in which the code is not as the map has it."""
    round_trips = [f"a circle: {' -> '.join([*circle, circle[0]])}" for circle in circles(found)]
    return [
        *outside(found),
        *upward(found),
        *in_disguise(found),
        *round_trips,
        *too_large(found),
        *rooms_without_a_word(found),
    ]


def arrows(found: Mapping[str, File]) -> Counter[tuple[str, str]]:
    """How many imports go from one room to another."""
    counted: Counter[tuple[str, str]] = Counter()
    for file in found.values():
        for target in file.imports:
            mine, theirs = room(file.name), room(target)
            if mine and theirs and mine != theirs:
                counted[mine, theirs] += 1
    return counted


def show(found: Mapping[str, File], console: Console) -> None:
    """Print the map, from top to bottom."""
    table = Table("room", "files", "lines", "knows", title="The house")
    counted, sizes = arrows(found), _sizes(found)
    for line in LAYERS:
        for name in line:
            lines = sum(file.lines for file in found.values() if room(file.name) == name)
            knows = [f"{_short(b)} {count}" for (a, b), count in sorted(counted.items()) if a == name]
            table.add_row(name, str(sizes[name]), str(lines), ", ".join(knows) or "-")
        table.add_section()
    console.print(table)
    console.print(f"{len(found)} files, {sum(file.lines for file in found.values())} lines, {len(counted)} arrows")


def _short(name: str) -> str:
    return name.removeprefix("flows.").removeprefix("stages.").removeprefix("models.")


def main(said: Iterable[str] | None = None) -> int:
    """Print map and breaches; the exit code."""
    found, console = files(), Console(soft_wrap=False)
    show(found, console)
    broken = list(breaches(found) if said is None else said)
    for text in broken:
        console.print(f"breach: {text}", style="red", highlight=False)
    console.print(f"{len(circles(found))} circles, {len(list(upward(found)))} arrows up, {len(broken)} breaches")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
