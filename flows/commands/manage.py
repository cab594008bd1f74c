"""Commands that change what is kept or served: cancel, promote, rollback, reconcile, sweep; and doctor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import AliasOption, RunArgument, StoreOption, opened, scratch_of

if TYPE_CHECKING:
    from flows.registry.projection import Registry, Release
    from stages.runtime.artifacts import Store

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="The registered model's name.")]
WhyOption = Annotated[str, typer.Option("--why", help="A reason, kept in the promotion journal.")]


def cancel(run: RunArgument, store: StoreOption = None) -> None:
    """End a run as Ctrl-C would.

    Sealed steps stay, and the same command goes on from there.
    """
    from flows.running.run_records import find_run

    record = find_run(scratch_of(store), run)
    pid = record.cancel()
    typer.echo(f"asked process {pid} of run {record.name} to end; the same command goes on from there")


def promote(
    model: ModelArgument,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="A registered version's number.")],
    alias: AliasOption = "champion",
    why: WhyOption = "",
    store: StoreOption = None,
) -> None:
    """Make an alias stand on a registered version."""
    from flows.registry import projection

    _told(model, alias, projection.promote(_registry(opened(store)), model, version, alias, why))


def rollback(
    model: ModelArgument, alias: AliasOption = "champion", why: WhyOption = "", store: StoreOption = None
) -> None:
    """Make an alias stand where it stood before."""
    from flows.registry import projection

    _told(model, alias, projection.rollback(_registry(opened(store)), model, alias, why))


def reconcile(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="One model; all by default.")] = None,
    store: StoreOption = None,
) -> None:
    """Put back aliases that were moved by hand.

    The promotion journal says where they stand.
    """
    from flows.registry import projection
    from flows.registry.journal import models

    found = _registry(opened(store))
    names = [model] if model else models(found.objects)
    mended = [drift for name in names for drift in projection.reconcile(found, name)]
    for drift in mended:
        typer.echo(f"{drift.model}@{drift.alias}: was on {drift.found or 'nothing'}, is on {drift.journal} again")
    if not mended:
        typer.echo("every alias stands where the journal says")


def sweep(
    artifact: Annotated[
        str | None, typer.Option("--artifact", metavar="ARTIFACT", help="Also take this artifact away.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Remove what no artifact needs.

    Drafts, downloads and files that no artifact names, once they are older than 24 hours.
    """
    from flows.reporting.format import size
    from flows.reporting.inspect_artifact import find_artifact

    found = opened(store)
    if artifact:
        identity = find_artifact(found, artifact)
        found.remove(identity)
        typer.echo(f"took away artifact {identity[:12]}; its files go with a sweep after 24 hours")
    swept = found.sweep()
    uploads = f", {swept.uploads} uploads that nobody ended" if swept.uploads else ""
    typer.echo(f"removed {swept.drafts} drafts and views and {swept.blobs} files, {size(swept.bytes)}{uploads}")


def doctor(store: StoreOption = None) -> int:
    """Say what this machine has, and what it lacks.

    Each line is ok, or missing with the remedy. Exit code 1 when something needed is missing.
    """
    from flows.commands.doctor import diagnose
    from flows.settings import settle

    broken = 0
    for line in diagnose(settle(store=store)):
        typer.echo(f"{'ok' if line.ok else 'missing':<8}{line.name}: {line.text}")
        if line.remedy:
            typer.echo(f"{'':<8}{line.remedy}")
        broken += line.needed and not line.ok
    return 1 if broken else 0


def _registry(store: Store) -> Registry:
    from flows.registry.projection import Registry
    from flows.tracking.connect import open_tracking

    return Registry(store.objects, open_tracking(store.scratch))


def _told(model: str, alias: str, release: Release) -> None:
    moved = "now stands" if release.moved else "stands as before"
    typer.echo(f"{model}@{alias} {moved} on version {release.version}{f': {release.note}' if release.note else ''}")
