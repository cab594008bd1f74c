"""Watching for what arrives: a checkpoint below a prefix, or a version under an alias. Each starts one run.

With a Prefect server an arrival becomes an event, and an automation starts the run; without one the recipe runs in this
process. Either way what was done is recorded in the store, so that it may be killed at any moment.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from dataclasses import dataclass

from prefect import flow, get_run_logger

from flows.pipeline.drive import optimize
from flows.prefect_api.events import CONFIRM_S, deliver, has_server
from flows.recipe.expand import expanded
from flows.recipe.model import Recipe
from flows.recipe.read import load_recipe
from flows.reporting.terminal import TerminalProgress
from flows.running.placement import judging_gpu
from flows.settings import Settings, enter, settle
from flows.tracking.connect import open_tracking
from flows.triggers.arrival_records import Arrival, arrived, checkpoint, finish, finished, on_source
from flows.triggers.checkpoint_scan import Prefix, look
from flows.triggers.watched_alias import arrival, parse, standing
from stages.runtime.artifacts import Store
from stages.runtime.contract import DoesNotFit, Interrupted, StageError, Unavailable

Say = Callable[[str], None]


@dataclass(frozen=True)
class Look:
    """One look at a watched place: what is there, and whether another look may find more without a change."""

    arrivals: list[Arrival]
    waits: bool


_WORST = (0, 2, 3, 1)
"""Exit codes of what came of arrivals, the best first: as asked, a gate failed, does not fit, broken or not sent."""


def watch(
    uri: str, recipe: Recipe, settings: Settings, *, every_s: float, settle_s: float, once: bool, say: Say
) -> int:
    """Look at a place again and again, and start one run for each thing that arrives.

    Args:
        uri: s3://bucket/prefix, a folder, or models:/NAME@ALIAS.
        recipe: what to run.
        settings: its store keeps the records.
        every_s: seconds between looks.
        settle_s: how long a checkpoint must not have changed.
        once: end after what is there now, instead of going on for ever.
        say: hears one line for each thing that happens.

    Returns:
        With `once`, the exit code of the worst that came of an arrival.

    Raises:
        StageError: the place is not there, or one may not read it, or the recipe cannot take a checkpoint.
        Unavailable: the first look failed; later ones are repeated.
    """
    store = settings.connect()
    looks = _looks(uri, recipe, store, settle_s, say)
    if not uri.startswith("models:"):
        on_source(recipe, uri)  # a recipe that can take nothing is refused before anything arrives
    seen, failed, worst = looks(), False, 0
    say(f"watching {uri} for recipe {recipe.name}")
    while True:
        try:
            seen = looks() if failed else seen
            worst = max(worst, _act_on_new(seen, recipe, settings, store, say), key=_WORST.index)
            if once and not seen.waits:
                return worst
            time.sleep(max(settle_s, 0.1) if once else every_s)
            seen, failed = looks(), False
        except Unavailable as error:
            if once:
                raise
            if not failed:
                say(f"a service is away, and the look is repeated: {error}")
            failed = True
            time.sleep(every_s)


def _act_on_new(seen: Look, recipe: Recipe, settings: Settings, store: Store, say: Say) -> int:
    done, codes = finished(store.objects, recipe.name), [0]
    for one in seen.arrivals:
        if one.key not in done:
            codes.append(_act(one, recipe, settings, store, say))
            done.add(one.key)
    return max(codes, key=_WORST.index)


@flow(name="watch")
def watch_once(uri: str, recipe: Recipe | str, settle_s: float = 10.0) -> list[str]:
    """Look once for checkpoints that arrived, and announce them. To be scheduled, each minute for instance.

    What is seen for the first time is announced by a later look, once it has not changed in between.

    Args:
        uri: s3://bucket/prefix or a folder.
        recipe: the one whose automation is to start: the name of a shipped one, the s3:// URI of its YAML, or itself.
        settle_s: how long a checkpoint must not have changed.

    Returns:
        The digests that were announced.
    """
    if isinstance(recipe, str):
        recipe = load_recipe(recipe)
    on_source(recipe, uri)
    settings = settle()
    enter(settings)
    store, say = settings.connect(), get_run_logger().info
    done = finished(store.objects, recipe.name)
    seen = _checkpoints(Prefix(uri, recipe.name, store, settle_s), say)
    new = {one.key: one for one in seen.arrivals if one.key not in done}
    for one in new.values():
        announce(store, one, say)
    return sorted(new)


def announce(store: Store, found: Arrival, say: Say, *, confirm_s: float = CONFIRM_S) -> bool:
    """Send the event of an arrival, once for its key; done as soon as the server has it on record.

    Returns:
        Whether it has.

    Raises:
        Unavailable: the server does not answer; the record stands, and the next look sends it.
        StageError: it refuses.
    """
    record = arrived(store.objects, found)
    if not deliver(record.announcement(), confirm_s=confirm_s):
        say(f"the event of {record.name} was sent and is not on record yet; the next look asks again")
        return False
    finish(store.objects, record, announced=str(record.id))
    say(f"announced {record.name} ({record.key[:12]}) as {record.event}")
    return True


def _looks(uri: str, recipe: Recipe, store: Store, settle_s: float, say: Say) -> Callable[[], Look]:
    if not uri.startswith("models:"):
        prefix = Prefix(uri, recipe.name, store, settle_s)
        return lambda: _checkpoints(prefix, say)
    alias, tracking = parse(uri, recipe), open_tracking(store.scratch)

    def one() -> Look:
        version = standing(tracking, alias)
        return Look([] if version is None else [arrival(tracking, alias, version, recipe.name)], waits=False)

    return one


def _checkpoints(prefix: Prefix, say: Say) -> Look:
    seen = look(prefix, say)
    found = [checkpoint(prefix.recipe, uri, one.digest, one.sizes) for uri, one in seen.items() if one.digest]
    return Look(found, waits=any(one.waits for one in seen.values()))


def _act(one: Arrival, recipe: Recipe, settings: Settings, store: Store, say: Say) -> int:
    """Announce an arrival or run the recipe on it; returns the exit code of what came of it."""
    try:
        if has_server():
            return 0 if announce(store, one, say) else 1
        return _run_here(one, recipe, settings, store, say)
    except Unavailable as error:
        say(f"{one.name} is tried again at the next look: {error}")
        return 1


def _run_here(one: Arrival, recipe: Recipe, settings: Settings, store: Store, say: Say) -> int:
    """Run the recipe in this process. The record is closed when the run ended, so a kill in its middle goes on."""
    store.scratch.mkdir(parents=True, exist_ok=True)
    with (store.scratch / "arrivals.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if one.key in finished(store.objects, recipe.name):
            return 0
        record = arrived(store.objects, one)
        say(f"running {recipe.name} on {record.name} ({record.key[:12]})")
        try:
            with TerminalProgress() as terminal:
                asked = expanded(on_source(recipe, record.uri, record.digest), judging_gpu(settings))
                result = optimize(asked, settings, terminal)
        except (Interrupted, Unavailable):
            raise
        except StageError as error:
            finish(store.objects, record, error=str(error))
            again = f"`enginery watch` with --again {record.key[:12]} tries it once more"
            say(f"{recipe.name} on {record.name} failed: {error}\n{again}")
            return 3 if isinstance(error, DoesNotFit) else 1
        except Exception as error:
            finish(store.objects, record, error=f"{type(error).__name__}: {error}")
            raise
        else:
            finish(store.objects, record, run=result.run, passed=result.passed)
            say(f"{recipe.name} on {record.name}: {result.verdict}; report: {result.report}")
            return 0 if result.passed else 2
