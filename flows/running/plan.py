"""A recipe's steps as work: what each is, whether it is sealed already, and why not.

Every identity is known before anything runs, since a fingerprint needs only the fingerprints before it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from flows.prefect_api.retry import patiently
from flows.recipe.expand import PlannedStep
from flows.reporting.format import size
from flows.running.order import Order
from flows.running.placement import Pools
from stages import stage
from stages.adapters.backends import backend
from stages.adapters.connect import pins
from stages.adapters.sources import SCHEMES
from stages.runtime.artifacts import Store
from stages.runtime.contract import Kind, Manifest, Params, Pins, Progress, StageError, Work
from stages.runtime.execute import check_kinds, work_of
from stages.runtime.fingerprint import differing_fields, fingerprint
from stages.runtime.patience import BRIEFLY_S

OUTSIDE = frozenset(SCHEMES) - {"file"}
"""Schemes of sources that lie beyond this machine."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One step with its identity.

    Attributes:
        order: what the launcher runs.
        identity: fingerprint of the work.
        manifest: the sealed artifact, None when it must be made.
        why: the first field in which the nearest sealed artifact differs; empty on a hit.
        roles: role -> name of the step whose artifact this one reads there.
        measures: the step that a measurement measures, empty for a step of the recipe.
        corpus: the corpus it is measured on.
        given: it reads a sealed artifact, too, that no step of the recipe makes.
    """

    order: Order
    identity: str
    manifest: Manifest | None
    why: str
    roles: Mapping[str, str]
    measures: str = ""
    corpus: str = ""
    given: bool = False

    @property
    def name(self) -> str:
        """The step's name in the recipe."""
        return self.order.step

    @property
    def after(self) -> tuple[str, ...]:
        """Names of the steps whose artifacts this one reads."""
        return tuple(dict.fromkeys(self.roles.values()))

    @property
    def hit(self) -> bool:
        """Whether it is sealed and nobody wants it made again."""
        return self.manifest is not None and not self.order.force


def resolve(
    steps: Sequence[PlannedStep],
    store: Store,
    listener: Callable[[str], Progress],
    forced: frozenset[str] = frozenset(),
    devices: Callable[[str, str], str] = lambda _stage, _target: "",
    known: Mapping[str, Planned] = MappingProxyType({}),
) -> dict[str, Planned]:
    """Give each step its identity; sources are pinned to digests, which may download them.

    Args:
        steps: in an order in which no step reads a later one.
        store: where hits are looked for.
        listener: step name -> who hears of a download.
        forced: names of steps to make again.
        devices: (stage, target) -> the device it will run on, empty where that is this machine's.
        known: steps that have an identity already.

    Returns:
        Step name -> Planned: those that were known, then the others in the order given.

    Raises:
        StageError: a source that is not there, a given artifact that is gone, or kinds that do not fit.
    """
    planned = dict(known)
    kinds = {name: stage(one.order.stage).output for name, one in known.items()}
    for step in steps:
        definition = stage(step.stage)
        params = definition.params.model_validate(dict(step.params))
        if definition.pin:
            params = _pinned(definition.pin, params, store, listener(step.name))
        roles = step.inputs
        given = {role: _sealed(store, step.name, one) for role, one in step.given.items()}
        check_kinds(definition, {role: kinds[source] for role, source in roles.items()} | given)
        made = {role: planned[source].identity for role, source in roles.items()}
        work = work_of(definition, params, made | dict(step.given))
        if work.executor and (there := devices(step.stage, work.executor["target"])):
            work = work.model_copy(update={"executor": {**work.executor, "device": there}})
        identity = fingerprint(work)
        manifest = store.manifest(identity)
        kinds[step.name] = definition.output
        planned[step.name] = Planned(
            order=Order(step=step.name, stage=step.stage, params=params, work=work, force=step.name in forced),
            identity=identity,
            manifest=manifest,
            why="" if manifest else _reason(store, work, step.name, planned, roles),
            roles=roles,
            measures=step.measures,
            corpus=step.corpus,
            given=bool(given),
        )
    return planned


def _sealed(store: Store, name: str, identity: str) -> Kind:
    if manifest := store.manifest(identity):
        return manifest.kind
    raise StageError(f"artifact {identity[:12]}, which {name} reads, is not in {store.uri}", remedy="Run again.")


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


def needs(planned: Iterable[Planned], store: Store, pools: Pools | None) -> dict[str, str]:
    """What making each step asks of where it runs, in words, as far as it is known.

    Args:
        planned: the steps.
        store: whose artifacts say what making their like took.
        pools: where steps run in containers of their own; None for this machine.

    Returns:
        Step name -> memory, disk, network, and what is not installed here or which container it is.
    """
    found: dict[str, str] = {}
    sealed: list[Manifest] | None = None
    for one in planned:
        if one.hit:
            found[one.name] = "nothing: sealed"
            continue
        if sealed is None:
            sealed = [manifest for _, manifest in store.manifests()]
        said = [_took(one, sealed), _network(one.order.params)]
        said += [_container(pools, one.order)] if pools else _not_installed(one.order)
        found[one.name] = ", ".join(filter(None, said))
    return found


def _took(one: Planned, sealed: Iterable[Manifest]) -> str:
    """Memory and disk as the artifact that is most like it took."""
    work, step = one.order.work, one.name
    alike = [manifest for manifest in sealed if manifest.work.stage == work.stage]
    if not alike:
        return "memory and disk not known before the first"
    nearest = min(alike, key=lambda m: (m.provenance.step != step, differing_fields(m.work, work)))
    memory = f"{size(nearest.provenance.peak_rss_bytes)} memory, " if nearest.provenance.peak_rss_bytes else ""
    return f"{memory}{size(nearest.size_bytes)} disk, as its like took"


def _network(params: Params) -> str:
    several = [params, *getattr(params, "sources", ())]
    schemes = [str(getattr(one, name, "")).partition("://")[0] for one in several for name in ("source", "base")]
    outside = " and ".join(f"{scheme}://" for scheme in dict.fromkeys(schemes) if scheme in OUTSIDE)
    return f"network to {outside}, unless its download is still here" if outside else ""


def _container(pools: Pools, order: Order) -> str:
    place = pools.place(order.stage)
    limits = f"{size(place.memory_bytes)} memory and {place.minutes:g} min at most"
    return f"a container of {pools.image(order.stage, order.params)} in pool {place.pool} ({limits})"


def _not_installed(order: Order) -> list[str]:
    """Libraries that the work requires and this machine lacks, each with what installs it."""
    required = dict(order.work.requires)
    if chosen := getattr(order.params, "backend", ""):
        required.setdefault(backend(chosen).library, "")
    extra = stage(order.stage).image_of(order.params).value
    said = []
    for name, wanted in required.items():
        found = _installed(name)
        if found is None:
            how = f": pip install 'enginery[{extra}]'" if wanted else ""
            said.append(f"{name}, which is not installed{how}")
        elif wanted and found != wanted.split("+")[0]:
            said.append(f"{name} {wanted}, not {found}: install the versions of constraints.txt")
    return said


@cache
def _installed(library: str) -> str | None:
    try:
        return importlib.metadata.version(library).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


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
