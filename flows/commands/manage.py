"""Commands that change what is kept or served: cancel, promote, rollback, reconcile, sweep; and doctor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import (
    AliasOption,
    AnyModelArgument,
    ModelArgument,
    RunArgument,
    StoreOption,
    looked_at,
    opened,
    seconds,
)

if TYPE_CHECKING:
    from flows.registry.projection import Registry, Release
    from stages.runtime.artifacts import Store

WhyOption = Annotated[str, typer.Option("--why", help="A reason, kept in the promotion journal.")]


def cancel(run: RunArgument, store: StoreOption = None) -> None:
    """End a run as Ctrl-C would.

    Sealed steps stay, and the same command goes on from there.
    """
    from flows.running.run_records import find_run

    record = find_run(looked_at(store).scratch, run)
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


def reconcile(model: AnyModelArgument = None, store: StoreOption = None) -> None:
    """Put back aliases that were moved by hand.

    The promotion journal says where they stand. An alias of the journal that MLflow takes no more is told, and left.
    """
    from flows.registry import projection
    from flows.registry.journal import models

    found = _registry(opened(store))
    names = [model] if model else models(found.objects)
    mended = [drift for name in names for drift in projection.reconcile(found, name)]
    for drift in mended:
        typer.echo(
            f"{drift.model}@{drift.alias}: was on {drift.found or 'nothing'}, is on {drift.journal or 'nothing'} again"
        )
    refused = [line for name in names for line in projection.refused(found.objects, name)]
    for line in refused:
        typer.echo(line)
    if not mended:
        typer.echo(f"every {'other ' if refused else ''}alias stands where the journal says")


def sweep(
    artifact: Annotated[
        str | None, typer.Option("--artifact", metavar="ARTIFACT", help="Also take this artifact away.")
    ] = None,
    runs_older_than: Annotated[
        str, typer.Option("--runs-older-than", metavar="TIME", help="Take records of runs that ended so long ago.")
    ] = "90d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and take nothing.")] = False,
    store: StoreOption = None,
) -> None:
    """Remove what no artifact needs.

    Once it is older than 24 hours: drafts, downloads, logs, files that no artifact names. Records of runs go later;
    those of promoted versions and the last 50 stay. What is in use stays.
    """
    from flows.pipeline.tidying import said, tidy
    from flows.reporting.format import size
    from flows.reporting.inspect_artifact import find_artifact

    limit_s = seconds(runs_older_than)
    found = looked_at(store) if dry_run else opened(store)
    if artifact:
        identity = find_artifact(found, artifact)
        _refuse_served(found, identity)
        if not dry_run:
            found.remove(identity)
        typer.echo(f"{'would take' if dry_run else 'took'} away artifact {identity[:12]}; its files go 24 hours later")
    swept = tidy(found, runs_older_than_s=limit_s, dry=dry_run)
    for line in said(swept):
        typer.echo(line)
    typer.echo(f"{'would remove' if dry_run else 'removed'} {swept.counts.total()} in all, {size(swept.bytes)}")


def _refuse_served(store: Store, identity: str) -> None:
    from flows.registry.journal import serving
    from stages.runtime.contract import StageError

    # What is damaged serves no run: it has to go, so that its step makes it anew.
    if (entries := serving(store.objects, identity)) and store.whole(identity):
        named = [f"{one.candidate.model}@{one.alias} stands on version {one.version.number} of it" for one in entries]
        raise StageError(
            f"artifact {identity[:12]} is served",
            measured=", ".join(named),
            limit="what no alias serves",
            remedy="Without it no run could be judged against what is served: first have the alias stand on another "
            "version, by `enginery promote` or `enginery rollback`.",
        )


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
