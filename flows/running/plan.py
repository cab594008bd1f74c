"""A recipe's steps as work: what each is, whether it is sealed already, and why not.

Every identity is known before anything runs, since a fingerprint needs only the fingerprints before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from flows.prefect_api.retry import patiently
from flows.recipe.expand import PlannedStep
from flows.running.order import Order
from stages import stage
from stages.adapters.connect import pins
from stages.runtime.artifacts import Store
from stages.runtime.contract import Kind, Manifest, Params, Pins, Progress, StageError, Work
from stages.runtime.execute import check_kinds, work_of
from stages.runtime.fingerprint import fingerprint
from stages.runtime.patience import BRIEFLY_S


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One step with its identity.

    Attributes:
        order: what the launcher runs.
        identity: fingerprint of the work.
        manifest: the sealed artifact, None when it must be made.
        why: the first field in which the nearest sealed artifact differs; empty on a hit.
        after: names of the steps whose artifacts this one reads.
        measures: the step that a measurement measures, empty for a step of the recipe.
        corpus: the corpus it is measured on.
    """

    order: Order
    identity: str
    manifest: Manifest | None
    why: str
    after: tuple[str, ...]
    measures: str = ""
    corpus: str = ""

    @property
    def name(self) -> str:
        """The step's name in the recipe."""
        return self.order.step


def resolve(
    steps: Sequence[PlannedStep],
    store: Store,
    listener: Callable[[str], Progress],
    forced: frozenset[str] = frozenset(),
    devices: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Planned]:
    """Give each step its identity; sources are pinned to digests, which may download them.

    Args:
        steps: in an order in which no step reads a later one.
        store: where hits are looked for.
        listener: step name -> who hears of a download.
        forced: names of steps to make again.
        devices: stage -> the device it will run on, where that is not this machine's.

    Returns:
        Step name -> Planned, in the order given.

    Raises:
        StageError: a source that is not there, or kinds that do not fit.
    """
    planned: dict[str, Planned] = {}
    kinds: dict[str, Kind] = {}
    for step in steps:
        definition = stage(step.stage)
        params = definition.params.model_validate(dict(step.params))
        if definition.pin:
            params = _pinned(definition.pin, params, store, listener(step.name))
        roles = step.inputs
        check_kinds(definition, {role: kinds[source] for role, source in roles.items()})
        work = work_of(definition, params, {role: planned[source].identity for role, source in roles.items()})
        if work.executor and step.stage in devices:
            work = work.model_copy(update={"executor": {**work.executor, "device": devices[step.stage]}})
        identity = fingerprint(work)
        manifest = store.manifest(identity)
        kinds[step.name] = definition.output
        planned[step.name] = Planned(
            order=Order(step=step.name, stage=step.stage, params=params, work=work, force=step.name in forced),
            identity=identity,
            manifest=manifest,
            why="" if manifest else _reason(store, work, step.name, planned, roles),
            after=tuple(dict.fromkeys(roles.values())),
            measures=step.measures,
            corpus=step.corpus,
        )
    return planned


def _reason(store: Store, work: Work, name: str, planned: Mapping[str, Planned], roles: Mapping[str, str]) -> str:

    missed = [source for source in roles.values() if planned[source].manifest is None]
    nearest = store.nearest(work, name)
    if missed and not nearest.startswith("params"):
        return f"reads {missed[0]}, which is made anew"
    return nearest


def _pinned(
    pin: Callable[[Params, Pins, Progress], Params], params: Params, store: Store, progress: Progress
) -> Params:
    return patiently(lambda: pin(params, pins(store), progress), away_s=BRIEFLY_S, say=progress.note)


def needs(planned: Planned) -> str:
    """What making this step asks of the machine, in words."""
    definition = stage(planned.order.stage)
    said = [f"{definition.image} image"]
    if definition.pin:
        said.append("network, unless the source is local or was pinned before")
    if planned.manifest:
        said = ["nothing: sealed"]
    return ", ".join(said)


def check_start(planned: Mapping[str, Planned], first: str) -> frozenset[str]:
    """The steps that `--from first` makes again: it and all that read it.

    Raises:
        StageError: no such step, or an earlier step is not sealed.
    """
    if first not in planned:
        raise StageError(f"--from names no step: {first!r}", limit=", ".join(planned))
    again = {first}
    for name, one in planned.items():
        if again & set(one.after):
            again.add(name)
    needed, pending = set(), list(planned[first].after)
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += planned[name].after
    missing = [name for name in planned if name in needed and planned[name].manifest is None]
    if missing:
        raise StageError(
            f"--from {first} needs what stands before it sealed",
            measured=f"not sealed: {', '.join(missing)}",
            remedy="Run without --from.",
        )
    return frozenset(again)
