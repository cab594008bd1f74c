"""The command export-to: a model in the form that another tool opens."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.asked import AskedArgument, asked_folder
from flows.commands.options import StoreOption, looked_at

if TYPE_CHECKING:
    from stages.runtime.contract import Kind


class Format(StrEnum):
    """Which tool."""

    HF = "hf"
    ONNX = "onnx"
    GENAI = "genai"
    GGUF = "gguf"


class Stored(StrEnum):
    """Type of a GGUF file's matrices."""

    F32 = "f32"
    F16 = "f16"
    Q8_0 = "q8_0"


def export_to(
    model: AskedArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder to write, absent or empty.")],
    form: Annotated[
        Format,
        typer.Option(
            "--format", help="hf: transformers; onnx: ONNX Runtime; genai: onnxruntime-genai; gguf: one GGUF file."
        ),
    ],
    dtype: Annotated[
        Stored | None, typer.Option("--dtype", help="Type of a GGUF file's matrices. Default: f16.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Write a model as another tool opens it.

    What an engine was made from is looked up in the store. FOLDER is written whole or not at all.
    """
    from flows.reporting.format import size
    from stages.runtime.contract import StageError

    if dtype and form != Format.GGUF:
        raise StageError(f"--dtype is for gguf, not for {form}", measured=dtype, remedy="Leave it out.")
    with _draft(folder) as draft, asked_folder(model, store) as (source, _):
        _write(form, source, draft, dtype or Stored.F16, store)
        files = sorted(path for path in draft.rglob("*") if path.is_file())
        lines = [f"{path.relative_to(draft)}: {size(path.stat().st_size)}" for path in files]
    for line in lines:
        typer.echo(line)


def _write(form: Format, source: Path, draft: Path, dtype: Stored, store: str | None) -> None:
    from flows.reporting.made_from import kind_of
    from stages.runtime.contract import Kind, StageError

    kind = kind_of(source)
    if form in (Format.HF, Format.GGUF):
        _write_checkpoint(form, source, draft, dtype, store)
    elif kind == Kind.CHECKPOINT:
        raise StageError(
            f"a checkpoint becomes no graph by --format {form}",
            measured=f"{source.name} is a checkpoint",
            limit="a graph, or an engine made of one",
            remedy="Run a recipe whose steps `export` and `compile` it, and name what they made.",
        )
    else:
        _write_graph(form, source, draft, store)


def _write_checkpoint(form: Format, source: Path, draft: Path, dtype: Stored, store: str | None) -> None:
    from stages.models.checkpoint import gguf_layout
    from stages.models.checkpoint.plain_layout import write_plain
    from stages.runtime.contract import Kind

    if form == Format.GGUF:  # configuration and tokenizer travel with an engine: refused before anything is brought
        gguf_layout.refuse(source)
    with _source(source, Kind.CHECKPOINT, store) as checkpoint:
        if form == Format.GGUF:
            gguf_layout.write_gguf(checkpoint, draft, dtype.value, _Told())
        else:
            write_plain(checkpoint, draft, _Told())


def _write_graph(form: Format, source: Path, draft: Path, store: str | None) -> None:
    from stages.graphs import genai
    from stages.models.checkpoint.json_files import read_json
    from stages.models.checkpoint.layout import carry_served
    from stages.runtime.contract import Kind

    if form == Format.GENAI and read_json(source / "engine.json", optional=True).get("backend") == "onnxruntime":
        genai.write_folder(source, read_json(source / "engine.json"), draft)
        carry_served(source, draft)
        return
    with _source(source, Kind.ONNX, store) as graph:
        if form == Format.GENAI:
            genai.write_folder(graph, read_json(graph / "graph.json"), draft)
            carry_served(graph, draft)
        else:
            shutil.copytree(graph, draft, dirs_exist_ok=True)


@contextmanager
def _source(folder: Path, wanted: Kind, store: str | None) -> Iterator[Path]:
    """The folder itself where it holds what is wanted, or what it was made from."""
    from flows.reporting.made_from import kind_of, made_from

    if kind_of(folder) == wanted:
        yield folder
    else:
        with made_from(folder, wanted, looked_at(store)) as found:
            yield found


@contextmanager
def _draft(folder: Path) -> Iterator[Path]:
    """A folder beside the one that is asked for, whose name it takes when the block ends without an error."""
    from stages.runtime.contract import StageError

    target = folder.absolute()
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise StageError(
            f"{folder} is there already", limit="no folder, or an empty one", remedy="Give another, or remove it."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as beside:
        draft = Path(beside) / target.name
        draft.mkdir()
        yield draft
        draft.rename(target)


class _Told:
    """Prints what is not as it was."""

    def advanced(self, done: float, total: float) -> None:
        """See Progress."""

    def metric(self, name: str, value: float, step: int) -> None:
        """See Progress."""

    def note(self, text: str) -> None:
        """See Progress."""
        typer.echo(f"note: {text}")
