"""`make bench-abilities`: see `--help`.

What every technique keeps of what the dense model knows, by the text that it was calibrated on: one source (`narrow`),
text that the model wrote itself (`self`), half of each (`mixed`); beside the peers that are installed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from flows.reporting.format import size
from flows.reporting.terminal import TerminalProgress
from flows.running.child_process import Launcher
from flows.settings import cores, environment
from stages.adapters.connect import connect, default_store
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import canonical, digest_bytes
from tests.benchmarks import kept
from tests.benchmarks.__main__ import MODEL, OTHER, TEXT, source
from tests.benchmarks.bench import SPLITS, Bench, FailedError, Options, missing
from tests.benchmarks.cells import Cells, Sealing
from tests.benchmarks.kept import ABILITIES, CALIBRATIONS, MIXED, SELF, Reports, Row
from tests.benchmarks.peers import PEERS, Peer
from tests.benchmarks.techniques import GENTLE, Technique, chosen

SPLITS_OF_TEXT = {"calibrate": 0.4, "train": 0.4, "validate": 0.1, "test": 0.1}
"""What a model writes is short: of the bench's own shares too little were left to stop `recover` by."""
WIDTH = 220
"""Of the table where nobody looks at a terminal."""


@dataclass(frozen=True)
class Asked:
    """What was asked beside the options of every bench.

    Attributes:
        calibrations: of CALIBRATIONS.
        abilities: source of the items, as the stage `items` takes it.
        items: of them, at most; None for all of the split `test`.
        samples: texts that the model writes.
        sample_tokens: of each, at most.
        threads: a step may use.
        launcher: `process`, or `inline` for tests.
    """

    calibrations: tuple[str, ...] = CALIBRATIONS
    abilities: str = "abilities://"
    items: int | None = None
    samples: int = 384
    sample_tokens: int = 128
    threads: int = 1
    launcher: str = "process"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    told = "Abilities that every technique keeps, by the text that it is calibrated on, beside its peers."
    made = argparse.ArgumentParser(prog="make bench-abilities", description=told)
    made.add_argument("--only", default="", help="names with commas between them; see --list")
    made.add_argument("--list", action="store_true", help="name the techniques and peers")
    made.add_argument("--calibrations", default=",".join(CALIBRATIONS), help="some of these")
    made.add_argument("--items", type=int, help="ask the first so many items alone")
    made.add_argument("--abilities", default=Asked.abilities, help="file or source of other items")
    made.add_argument("--model", default=MODEL, help="folder or source of the dense checkpoint")
    made.add_argument("--text", default=TEXT, help="folder or source of the narrow text")
    made.add_argument("--other", default=OTHER, help="folder or source of the text that calibrates nothing")
    made.add_argument("--windows", type=int, default=16, help="test windows of the other text")
    made.add_argument("--tokens", type=int, default=512, help="length of a window")
    made.add_argument("--calibration", type=int, help="calibration windows; by default each technique's own number")
    made.add_argument("--samples", type=int, default=Asked.samples, help="texts that the model writes itself")
    made.add_argument("--sample-tokens", type=int, default=Asked.sample_tokens, help="of each, at most")
    made.add_argument("--budget", help='tokens of recover, or minutes at a rate: "2.83 min at 400/s"')
    made.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS") or cores()))
    made.add_argument("--store", default=default_store(), help="results lie in its bench/abilities")
    made.add_argument("--launcher", default=Asked.launcher, choices=("process", "inline"), help=argparse.SUPPRESS)
    made.add_argument(
        "--python", action="append", default=[], metavar="PEER=PYTHON", help="interpreter that has a peer installed"
    )
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the bench, show the table, record it; 1 where a cell failed."""
    given = parser().parse_args(argv)
    names = [name for name in given.only.split(",") if name]
    known = [one.name for one in (*GENTLE, *PEERS)]
    calibrations = tuple(one for one in CALIBRATIONS if one in given.calibrations.split(","))
    if given.list or {*names} - {*known} or not calibrations:
        print("\n".join(known))  # noqa: T201
        return 0 if given.list else 2
    budget = int(given.budget) if (given.budget or "").isdigit() else given.budget
    model, text, other = map(source, (given.model, given.text, given.other))
    options = Options(model, text, other, given.windows, given.tokens, given.calibration, budget)
    written = (given.samples, given.sample_tokens)
    asked = Asked(calibrations, source(given.abilities), given.items, *written, given.threads, given.launcher)
    interpreters = dict(pair.split("=", 1) for pair in given.python)
    try:
        return bench(options, asked, names, given.store, interpreters)
    except (StageError, FailedError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1


def bench(options: Options, asked: Asked, names: Sequence[str], uri: str, interpreters: dict[str, str]) -> int:
    """Measure what is named, all for none."""
    scratch = connect(uri).scratch
    root = scratch / "bench" / "abilities"
    root.mkdir(parents=True, exist_ok=True)
    for name, value in environment(scratch).items():
        os.environ.setdefault(name, value)
    store = connect(str(root / "store"))
    launcher = Launcher(store, asked.launcher, asked.threads, root / "logs")
    with _alone(root), TerminalProgress() as terminal:
        techniques, peers = _chosen(names, interpreters, terminal)
        sealing = Sealing(store, launcher, terminal)
        cells = texts(sealing, options, asked, root, interpreters, techniques)
        first = next(iter(cells.values()))
        dense = first.dense()
        found: dict[str, dict[str, Reports | str]] = {}
        rows: list[Row] = []
        file = root / "abilities.json"
        for one in measured(cells, techniques, peers, found):
            rows.append(_row(one, found[one.name], dense))
            rows = _with_peers(rows, found, dense)
            _write(file, rows, dense, {**asdict(options), **asdict(asked)})
    whole, count = kept.cell(dense, dense), len(dense[ABILITIES]["documents"])
    title = (
        f"{options.model.rpartition('/')[2]}: dense, {size(whole.size_bytes)}, answers {whole.right} of {count} items"
    )
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(width=WIDTH, highlight=False)
    console.print(kept.table(rows, asked.calibrations, title))
    from tests.benchmarks.record import logged

    link = logged(
        scratch,
        "abilities",
        {**asdict(options), **asdict(asked), "only": ",".join(names)},
        {f"{row.name}/{name}": value for row in rows for name, value in kept.figures(row).items()},
        {"abilities.json": file.read_text(encoding="utf-8")},
        failed=any(cell.error for row in rows for cell in row.cells.values()),
    )
    console.print(f"rows: {file}\nMLflow: {link}", markup=False, soft_wrap=True)
    return int(any(cell.error for row in rows for cell in row.cells.values()))


def _chosen(
    names: Sequence[str], interpreters: Mapping[str, str], terminal: TerminalProgress
) -> tuple[tuple[Technique, ...], list[Peer]]:
    """The techniques and the peers that are named, all for none, as far as they are installed."""
    ours = [name for name in names if name in {one.name for one in GENTLE}]
    techniques = chosen(ours, GENTLE) if ours or not names else ()
    peers = [one for one in PEERS if not names or one.name in names]
    absent = missing(peers, interpreters)
    for distribution in absent:
        terminal.line(f"{distribution} is not installed: its rows are left out (extra `peers`, or --python)")
    return techniques, [one for one in peers if one.distribution not in absent]


def texts(
    sealing: Sealing,
    options: Options,
    asked: Asked,
    root: Path,
    interpreters: Mapping[str, str],
    techniques: Sequence[Technique],
) -> dict[str, Cells]:
    """Bring the model, the items and the texts; calibration -> where its cells are measured.

    What tells an item with its answer is left out of every text, also of what the model writes.
    """
    dense = sealing.sealed(sealing.order("dense", "fetch", {"source": options.model}, {}))
    items = sealing.sealed(sealing.order("items", "items", {"source": asked.abilities}, {}))
    other = sealing.sealed(
        sealing.order("other", "corpus", {"source": options.other, "splits": SPLITS["other"]}, {"items.0": items})
    )
    asks = {
        ABILITIES: {"split": "test", "items": asked.items},
        kept.OTHER: {"split": "test", "windows": options.windows, "window_tokens": options.tokens},
    }
    made = {}
    for name in asked.calibrations:
        params = {**_sources(name, options, asked), "splits": SPLITS_OF_TEXT}
        inputs = {"items.0": items} | ({} if name == kept.NARROW else {"model": dense})
        text = sealing.sealed(sealing.order(f"{name} text", "corpus", params, inputs))
        identities = {"dense": dense, "text": text, "other": other}
        folder = root / name / digest_bytes(canonical([identities, options.tokens]))[:16]
        folder.mkdir(parents=True, exist_ok=True)
        inside = {role: sealing.store.checkout(one) for role, one in identities.items()}
        room = Bench(options, folder, inside, identities, sealing.terminal, interpreters)
        made[name] = Cells(sealing, room, name, items, asks, {one.name: one for one in techniques})
    return made


def _sources(name: str, options: Options, asked: Asked) -> dict[str, Any]:
    written = {"source": "model://self", "samples": asked.samples, "sample_tokens": asked.sample_tokens}
    if name == MIXED:
        return {"sources": [{"source": options.text, "share": 0.5, "name": "narrow"}, {**written, "share": 0.5}]}
    return written if name == SELF else {"source": options.text}


def measured(
    cells: Mapping[str, Cells],
    techniques: Sequence[Technique],
    peers: Sequence[Peer],
    found: dict[str, dict[str, Reports | str]],
) -> Iterator[Technique | Peer]:
    """Put into `found` what each came to, by calibration; yields each that is a row once it is whole.

    A failure is a cell, and that of those that read its checkpoint. Checkpoints go once nobody reads them.
    """
    every = [one for one in (*techniques, *peers) if isinstance(one, Peer) or one.scored]
    for place, one in enumerate(every, start=1):
        found[one.name] = {}
        for name, room in cells.items():
            try:
                found[one.name][name] = room.reports(one)
            except (StageError, FailedError) as error:
                found[one.name][name] = str(error)
            _clear(room, one, techniques)
        next(iter(cells.values())).sealing.terminal.line(f"{place} of {len(every)} rows: {one.name}")
        yield one


def _clear(room: Cells, one: Technique | Peer, techniques: Sequence[Technique]) -> None:
    """Take the checkpoints that nobody is still to read."""
    names = [each.name for each in techniques]
    place = names.index(one.name) + 1 if one.name in names else len(names)
    waiting = {name for later in techniques[place:] if room.due(later) for name in later.inputs.values()}
    for old in (*techniques[:place], one):
        if old.name not in waiting:
            room.drop(old)


def _row(one: Technique | Peer, found: Mapping[str, Reports | str], dense: Reports) -> Row:
    if isinstance(one, Technique):
        return kept.row(one.name, found, dense, about=one.about)
    about = one.about if one.save else f"{one.about}; asked in its tool's process, size by its bits"
    return kept.row(one.name, found, dense, about=about, ours=one.ours)


def _with_peers(rows: Sequence[Row], found: Mapping[str, Mapping[str, Reports | str]], dense: Reports) -> list[Row]:
    beside = kept.beside(found, [one for one in rows if one.ours], dense)
    return [replace(one, beside=beside.get(one.name, {})) for one in rows]


def _write(file: Path, rows: Sequence[Row], dense: Reports, asked: Mapping[str, Any]) -> None:
    """The rows so far; written whole, so that a kill leaves the last ones."""
    told = {"asked": asked, "dense": kept.as_json(kept.row("dense", {"dense": dense}, dense))}
    whole = file.with_suffix(".part")
    whole.write_text(json.dumps({**told, "rows": [*map(kept.as_json, rows)]}, indent=1) + "\n", encoding="utf-8")
    whole.replace(file)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One bench at a time: what one takes away another may be about to name."""
    with (root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StageError(
                f"another bench of abilities works in {root}", remedy="Wait for it, or give --store."
            ) from error
        yield


if __name__ == "__main__":
    sys.exit(main())
