"""Commands that say what there is to choose from: models, stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import AnyModelArgument, JsonOption, StoreOption, cells, looked_at, say_json, show, table

if TYPE_CHECKING:
    from flows.registry.overview import ModelLine
    from flows.reporting.stage_docs import StageLine


def models(
    model: AnyModelArgument = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """List registered models: versions, aliases, figures.

    The promotion journal is the truth; MLflow's aliases stand beside it, with a mark where they differ. Without MLflow
    the journal is listed alone.
    """
    from flows.registry.overview import overview

    found = overview(looked_at(store), model)
    if as_json:
        say_json(found)
        return
    shown = table(
        f"Models of {found.store}", "model", "version", "aliases", "MLflow", "targets", "size", "measured",
        "promoted", "digest", right=("version", "size"),
    )  # fmt: skip
    for one in found.models:
        shown.add_row(*cells(*_row(one)))
    show(shown)
    for one in found.models:
        if one.note:
            typer.echo(f"! {one.model} version {one.version}: {one.note}")
        if model:
            typer.echo(f"{one.model} version {one.version}: run {one.run}, engine {one.digest}")
    if found.away:
        typer.echo(f"MLflow was not asked, and the journal is listed alone: {found.away}")


def stages(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One stage; all by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List what a step can do, or one stage's params."""
    from flows.reporting.stage_docs import StagesResult, described
    from stages import STAGES

    found = [described(one) for one in ([name] if name else STAGES)]
    if as_json:
        say_json(StagesResult(stages=found))
    elif name:
        _show(found[0])
    else:
        shown = table("Stages; `enginery stages NAME` has the params of one", "stage", "what it does", "reads", "makes")
        for one in found:
            reads = ", ".join(f"{role}: {kind}" for role, kind in one.inputs.items())
            shown.add_row(*cells(one.name, one.about, reads or "-", one.output))
        show(shown)


def _row(one: ModelLine) -> tuple[object, ...]:
    from flows.reporting.format import number, size

    measured = "\n".join(f"{name} {size(v) if name == 'size_bytes' else number(v)}" for name, v in one.measures.items())
    aliases = "?" if one.mlflow is None else ", ".join(one.mlflow) or "-"
    return (
        one.model,
        one.version,
        ", ".join(one.aliases) or "-",
        f"{aliases} !" if one.note else aliases,
        "\n".join(f"{target}: {status}" for target, status in one.targets.items()),
        "-" if one.size_bytes is None else size(one.size_bytes),
        measured or "-",
        one.when[:16].replace("T", " ") or "never",
        one.digest[:12],
    )


def _show(one: StageLine) -> None:
    typer.echo(f"{one.name}: {one.about}")
    for role, kind in one.inputs.items():
        typer.echo(f"    reads {role}: {kind}")
    typer.echo(f"    makes: {one.output}")
    typer.echo(f"    image: {one.image}")
    shown = table("Params", "param", "type", "allowed", "default", "what it is")
    for param in one.params:
        default = "must be given" if param.default is None else param.default
        shown.add_row(*cells(param.name, param.type, param.allowed or "-", default, param.about))
    show(shown)
    for measure in one.measures:
        typer.echo(f"measures {measure.name}: {measure.about}")
