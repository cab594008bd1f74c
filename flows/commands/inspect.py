"""Commands that only look: runs, ls, inspect, explain, logs, verify. They write nothing, and need no right to."""

from __future__ import annotations

import json
import shlex
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import (
    ArtifactArgument,
    JsonOption,
    RunArgument,
    StoreOption,
    cells,
    looked_at,
    say_json,
    show,
    table,
)

if TYPE_CHECKING:
    from flows.results import Inspection


def runs(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the runs of a store, the newest last."""
    from flows.reporting.format import duration
    from flows.results import RunsResult
    from flows.running.run_records import records

    found = looked_at(store)
    lines = [record.line() for record in records(found.scratch)]
    if as_json:
        say_json(RunsResult(store=found.uri, runs=lines))
        return
    shown = table(f"Runs beside {found.uri}", "run", "recipe", "state", "seconds", "model", "error", right=("seconds",))
    for line in lines:
        took = "-" if line.seconds is None else duration(line.seconds)
        shown.add_row(*cells(line.run, line.recipe, line.state, took, line.model, line.error))
    show(shown)


def ls(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the artifacts of a store, the newest last."""
    from flows.reporting.format import size
    from flows.results import Listed, ListResult
    from stages.runtime.contract import StageError

    artifacts, broken = looked_at(store), list[StageError]()
    listed = [
        Listed(
            fingerprint=identity,
            step=manifest.provenance.step,
            stage=manifest.work.stage,
            kind=manifest.kind,
            size_bytes=manifest.size_bytes,
            created=manifest.provenance.created,
            seconds=manifest.provenance.seconds,
        )
        for identity, manifest in artifacts.manifests(unread=broken.append)
    ]
    listed.sort(key=lambda one: (one.created, one.fingerprint))
    if as_json:
        say_json(ListResult(store=artifacts.uri, artifacts=listed))
        return
    shown = table(
        f"Artifacts in {artifacts.uri}", "fingerprint", "step", "stage", "kind", "size", "made", right=("size",)
    )
    for one in listed:
        when = one.created[:16].replace("T", " ")
        shown.add_row(*cells(one.fingerprint[:12], one.step, one.stage, one.kind, size(one.size_bytes), when))
    show(shown)
    for error in broken:
        typer.echo(f"! {error}")


def inspect(artifact: ArtifactArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show what an artifact is, from its bytes.

    Files, precisions, sharing, sparsity, measures, and the work that made it.
    """
    from flows.reporting.inspect_artifact import find_artifact
    from flows.reporting.inspect_artifact import inspect as look

    found = looked_at(store)
    seen = look(found, find_artifact(found, artifact))
    if as_json:
        say_json(seen)
    else:
        _show(seen)


def explain(run: RunArgument, store: StoreOption = None) -> None:
    """Say what a run did, and why."""
    from flows.reporting.format import duration, number
    from flows.running.run_records import find_run

    record = find_run(looked_at(store).scratch, run)
    line, facts, result = record.line(), record.facts, record.result
    typer.echo(f"run {record.name} of recipe {line.recipe}: {line.state}, started {line.started}")
    typer.echo(f"command: {shlex.join(facts.get('command', []))} (in {facts.get('folder', '')})")
    typer.echo(f"recipe as it ran: {record.folder / 'recipe.yaml'}")
    if line.error:
        typer.echo(f"error: {line.error}")
    for step in result.steps if result else ():
        made = "was sealed already" if step.cached else f"was made in {duration(step.seconds)}"
        typer.echo(f"{step.name}: {made}{f', because {step.why}' if step.why else ''} ({step.fingerprint[:12]})")
        for name, value in sorted(step.metrics.items()):
            typer.echo(f"    {name} {number(value)}")
    for gate in result.gates if result else ():
        typer.echo(gate.said)
    if result and result.model:
        held = ", promoted without a gate" if result.unjudged else ""
        stands = f"; {result.model.undone}" if result.model.undone else f" as {result.model.alias}{held}"
        typer.echo(f"registered: {result.model.name} version {result.model.version}{stands}")


def logs(
    run: RunArgument,
    store: StoreOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
) -> None:
    """Print a run's log."""
    from flows.running.run_records import find_run

    record = find_run(looked_at(store).scratch, run)
    shown = 0
    while True:
        running = record.pid is not None
        for event in list(record.events())[shown:]:
            typer.echo(_event(event))
            shown += 1
        if not (follow and running):
            return
        time.sleep(0.5)


def verify(artifact: ArtifactArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Hash every byte of an artifact."""
    from flows.reporting.format import size
    from flows.reporting.inspect_artifact import find_artifact
    from flows.results import VerifyResult
    from stages.runtime.looking import looked_into

    found = looked_at(store)
    identity = find_artifact(found, artifact)
    with looked_into(found, identity) as (_, manifest):
        pass
    files = {name: entry.sha256 for name, entry in manifest.files.items()}
    if as_json:
        say_json(VerifyResult(fingerprint=identity, uri=found.uri, files=files, size_bytes=manifest.size_bytes))
    else:
        typer.echo(f"ok: {identity[:12]}, {len(files)} files, {size(manifest.size_bytes)}, every byte matches")


def _show(seen: Inspection) -> None:
    from flows.reporting.format import duration, number, size

    step = f" of step {seen.step}" if seen.step else ""
    typer.echo(f"{seen.kind} {seen.fingerprint}{step}, {size(seen.size_bytes)} in {seen.uri}")
    made = seen.provenance
    took, peak = duration(made["seconds"]), size(made["peak_rss_bytes"])
    typer.echo(f"made {made['created']} in {took}, peak memory {peak}, on {made['host']} ({made['device']})")
    typer.echo(f"stage {seen.work['stage']} with {json.dumps(seen.work['params'], ensure_ascii=False)}")
    for role, identity in seen.work["inputs"].items():
        typer.echo(f"    reads {role}: {identity[:12]}")
    shown = table("Files", "file", "size", right=("size",))
    for name, count in seen.files.items():
        shown.add_row(*cells(name, size(count)))
    show(shown)
    if seen.precisions:
        shown = table(
            "Precisions", "type", "tensors", "elements", "size", "zeros", right=("tensors", "elements", "size", "zeros")
        )
        for one in seen.precisions:
            shown.add_row(*cells(one.dtype, one.count, f"{one.elements:,}", size(one.bytes), f"{one.zeros:.2%}"))
        show(shown)
        typer.echo(f"parameters {seen.parameters:,}; zeros in weight matrices {seen.sparsity:.2%}")
    for group in seen.shared:
        typer.echo(f"shared by {len(group)}: {', '.join(group[:4])}{' ...' if len(group) > 4 else ''}")
    for group in seen.duplicates:
        typer.echo(f"stored {len(group)} times: {', '.join(group[:4])}{' ...' if len(group) > 4 else ''}")
    if seen.duplicates:
        typer.echo(f"duplicates waste {size(seen.duplicate_bytes)}")
    for name, value in sorted(seen.metrics.items()):
        typer.echo(f"{name} {number(value)}")


def _event(event: dict[str, Any]) -> str:
    rest = {key: value for key, value in event.items() if key not in ("at", "event", "step", "text", "what")}
    said = [str(event.get("at", ""))[:19], str(event.get("step", "")), str(event.get("event", ""))]
    said += [str(event[key]) for key in ("what", "text") if key in event]
    said += [f"{key}={value}" for key, value in rest.items()]
    return " ".join(part for part in said if part)
