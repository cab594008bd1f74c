"""What is registered and where each alias stands, for those who look: the journal, and MLflow beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flows.names import alias_fault
from flows.registry.journal import Candidate, Promotion, Version, history, models
from flows.registry.projection import Registry, versions
from flows.tracking.connect import Tracking, quiet
from flows.tracking.errors import answered
from stages.runtime.artifacts import Store
from stages.runtime.contract import Frozen, Metrics, StageError

_LITE = "sqlite:///"


class ModelLine(Frozen):
    """One registered version.

    Attributes:
        aliases: those that the promotion journal has on it.
        mlflow: those that MLflow has on it, None where MLflow was not asked or knows no such version.
        targets: target -> `judged` or `compiled, not judged`.
        size_bytes: of the engine that it serves, None where the store has it no more.
        measures: the verdict's figures, by measure, what it is divided by, corpus and slice.
        when: of the newest entry in the journal, empty where it was never promoted.
        run: MLflow's run that made it.
        digest: fingerprint of the engine that it serves.
        note: where MLflow differs from the journal, and what puts it right; empty where it does not.
    """

    model: str
    version: str
    aliases: list[str]
    mlflow: list[str] | None
    targets: dict[str, str]
    size_bytes: int | None
    measures: Metrics
    when: str
    run: str
    digest: str
    note: str = ""


class ModelsResult(Frozen):
    """`enginery models --json`. `away` says why MLflow was not asked; empty where it was."""

    store: str
    away: str
    models: list[ModelLine]


@dataclass
class _Seen:
    """One version, as the journal and MLflow have it."""

    version: Version
    when: str = ""
    aliases: list[str] = field(default_factory=list)
    mlflow: list[str] | None = None


def overview(store: Store, model: str | None = None) -> ModelsResult:
    """Every version that a recipe registered, by model and number; MLflow is only read, and may be away.

    Raises:
        StageError: `model` is given, and neither the journal nor MLflow knows it.
    """
    names = models(store.objects) if model is None else [model]
    sizes = {identity: manifest.size_bytes for identity, manifest in store.manifests()}
    tracking, away = _reading(store.scratch) if names else (None, "")
    lines: list[ModelLine] = []
    for name in names:
        entries = history(store.objects, name)
        known: list[Version] = []
        stands: dict[str, str] = {}
        if tracking:
            try:
                known, stands = _projected(store, tracking, name)
            except StageError as error:
                tracking, away = None, str(error)
        lines += _lines(name, entries, known, stands, sizes, asked=tracking is not None)
    if model is not None and not lines:
        raise StageError(
            f"no recipe registered a model {model!r}",
            limit=", ".join(models(store.objects)) or "no model yet",
            remedy=f"MLflow was not asked: {away}" if away else "`enginery models` lists them.",
        )
    return ModelsResult(store=store.uri, away=away, models=lines)


def _lines(
    name: str,
    entries: list[Promotion],
    known: list[Version],
    stands: dict[str, str],
    sizes: dict[str, int],
    *,
    asked: bool,
) -> list[ModelLine]:
    heads = {entry.alias: entry for entry in entries}
    seen: list[_Seen] = []
    for entry in entries:
        _of(seen, entry.version).when = entry.when
    for version in known:
        _of(seen, version).mlflow = sorted(alias for alias, number in stands.items() if number == version.number)
    for entry in [one for one in heads.values() if one.action != "withdraw"]:
        _of(seen, entry.version).aliases.append(entry.alias)
    seen.sort(key=lambda one: (int(one.version.number), one.when))
    return [_line(name, one, stands, sizes, asked=asked) for one in seen]


def _of(seen: list[_Seen], version: Version) -> _Seen:
    for one in seen:
        if one.version.same(version):
            return one
    seen.append(_Seen(version))
    return seen[-1]


def _line(name: str, one: _Seen, stands: dict[str, str], sizes: dict[str, int], *, asked: bool) -> ModelLine:
    candidate = one.version.candidate
    served = candidate.executables.get(candidate.serves)
    digest = served.fingerprint if served else ""
    return ModelLine(
        model=name,
        version=one.version.number,
        aliases=sorted(one.aliases),
        mlflow=one.mlflow,
        targets=candidate.targets,
        size_bytes=sizes.get(digest),
        measures=_measures(candidate),
        when=one.when,
        run=candidate.run,
        digest=digest,
        note=_note(name, one, stands) if asked else "",
    )


def _note(name: str, one: _Seen, stands: dict[str, str]) -> str:
    if one.mlflow is None:
        return "MLflow has lost this version: run its recipe again"
    good = [alias for alias in one.aliases if not alias_fault(alias)]
    if one.aliases and not good:
        again = f"enginery promote {name} {one.version.number}"
        return f"{alias_fault(one.aliases[0])}: `{again}` makes champion stand on it, with --alias another one"
    moved = [alias for alias in good if stands.get(alias) != one.version.number]
    said = [f"MLflow has {alias} on {stands.get(alias) or 'nothing'}" for alias in moved]
    return f"{', '.join(said)}: `enginery reconcile {name}` puts it back" if said else ""


def _measures(candidate: Candidate) -> dict[str, float]:
    """The figures that the gates looked at, of the engine that is served."""
    found = {}
    gates: Iterable[dict[str, Any]] = candidate.verdict.get("gates", ())
    for gate in gates:
        if gate.get("measured") is not None and gate.get("artifact") in (candidate.serves, None, ""):
            against = f" against {gate['against']}" if gate.get("against") else ""
            corpus = f" on {gate['corpus']}" if gate.get("corpus") else ""
            # The worst slice of a corpus, or one of it, is not the corpus.
            part = f", {'worst ' if gate.get('worst') else ''}slice {gate['slice']}" if gate.get("slice") else ""
            found[f"{gate['measure']}{against}{corpus}{part}"] = float(gate["measured"])
    return found


def _projected(store: Store, tracking: Tracking, model: str) -> tuple[list[Version], dict[str, str]]:
    """MLflow's versions of a model, and alias -> number."""
    from mlflow.exceptions import MlflowException

    with answered(tracking.uri):
        try:
            aliases = tracking.client.get_registered_model(model).aliases
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return [], {}
        return versions(Registry(store.objects, tracking), model), {k: str(v) for k, v in aliases.items()}


def _reading(scratch: Path) -> tuple[Tracking | None, str]:
    """MLflow's registry to read from, or why it cannot be asked. Nothing is made, an embedded database least of all."""
    # A person waits: MLflow's own patience with a server that is away is minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    named = os.environ.get("MLFLOW_REGISTRY_URI") or os.environ.get("MLFLOW_TRACKING_URI")
    uri = named or f"{_LITE}{scratch.absolute() / 'mlflow.db'}"
    path = Path(uri.removeprefix(_LITE))
    if uri.startswith(_LITE) and not path.is_file():
        return None, f"there is no database {path} yet"
    quiet()
    from mlflow import MlflowClient

    if uri.startswith(_LITE):
        # With the driver in its name: of a plain one MLflow makes the folder that it takes `file:/...` to be.
        uri = f"sqlite+pysqlite:///file:{quote(str(path))}?mode=ro&uri=true"
    try:
        with answered(uri):
            return Tracking(MlflowClient(tracking_uri=uri, registry_uri=uri), uri, ""), ""
    except StageError as error:
        return None, str(error)
