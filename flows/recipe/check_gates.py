"""Whether a gate speaks of what the recipe judges."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from flows.recipe.located_yaml import Fault
from flows.recipe.located_yaml import Path as Field
from flows.recipe.model import CHAMPION
from flows.recipe.seen import RUNS, Seen
from flows.recipe.shape import BROKEN, part
from stages.adapters.targets import CPU, takes_turns
from stages.measures.table import HARNESS_MEASURES, MEASURES, OWN, SPEEDS, known, measure_of
from stages.runtime.contract import Kind


def named(seen: Seen, path: Field, name: Any, kinds: frozenset[Kind]) -> Iterator[Fault]:
    """That a name is of no step, or of one that makes something else."""
    if not isinstance(name, str):
        return
    fitting = [step.name for step in seen.steps if step.output in kinds]
    known = seen.find(name)
    if known is None or (known.output is not None and known.output not in kinds):
        text = f"{name!r} is no {' or '.join(sorted(kinds))}" if known else f"there is no step {name!r}"
        yield Fault(path, f"{text}; allowed: {', '.join(fitting) or 'none in this recipe'}")


def gate_faults(seen: Seen, here: Field, gate: dict[str, Any], wrong: set[str]) -> Iterator[Fault]:
    """What is wrong with one gate; `wrong` are the fields of `judge` that cannot be relied on."""
    measure = part(gate, "measure")
    if measure == "size_bytes":
        yield from _size_gate(seen, here, gate, wrong)
    elif measure in SPEEDS:
        yield from _speed_gate(seen, here, gate, measure, wrong)
    elif seen.judge is None and isinstance(measure, str):
        yield Fault((*here, "measure"), f"{measure} needs `judge`; allowed: size_bytes")
    elif seen.judge is not None:
        yield from _score_gate(seen, here, gate, wrong)


def ungated(seen: Seen, found: Collection[Fault]) -> Iterator[Fault]:
    """That no gate speaks of the engine that would be promoted; `found` is what is wrong already.

    A gate against the champion holds nothing of the first one, nor does one that compares that engine with itself.
    """
    judged = [seen.find(name) for name in seen.named("artifacts")]
    known = all(step and step.output and (step.stage != "compile" or step.index not in seen.unsound) for step in judged)
    if not known or any(fault.path[:1] == ("judge",) or fault.path == ("gates",) for fault in found):
        return  # which engine it is cannot be told, or no gate holds anything
    engines = [step.name for step in judged if step and step.output is Kind.ENGINE and step.name in seen.executed()]
    faulty = {fault.path[1] for fault in found if fault.path[:1] == ("gates",)}
    for place, gate in enumerate(seen.gates if engines else ()):
        artifact, against = part(gate, "artifact"), part(gate, "against")
        # What is meant by a gate that is wrong cannot be told.
        if place in faulty or (against not in (CHAMPION, engines[0]) and artifact in (None, BROKEN, engines[0])):
            return
        if artifact == engines[0] and against != CHAMPION:
            return
    if engines and seen.gates:
        text = f"{engines[0]!r} would be served, and none of the gates without `champion` speaks of it"
        yield Fault(("gates",), f"{text}; allowed: one more, of `artifact: {engines[0]}` or of every artifact")


def _with_itself(here: Field, gate: dict[str, Any], judged: list[str], others: Iterable[str]) -> Iterator[Fault]:
    """What is compared with itself is equal whatever was made of it."""
    artifact, against = part(gate, "artifact"), part(gate, "against")
    if not isinstance(against, str) or not (artifact == against or (artifact is None and judged == [against])):
        return
    text = f"{against!r} compared with itself holds nothing"
    text += "" if artifact else ", and no other artifact is judged"
    allowed = ", ".join(dict.fromkeys(one for one in (CHAMPION, *others) if one != against))
    yield Fault((*here, "against"), f"{text}; allowed: {allowed}")


def _size_gate(seen: Seen, here: Field, gate: dict[str, Any], wrong: set[str]) -> Iterator[Fault]:
    if part(gate, "corpus") not in (None, BROKEN):
        yield Fault((*here, "corpus"), "a size has no corpus; allowed: leave it out")
    for field in ("slice", "worst"):
        if part(gate, field) not in (None, False, BROKEN):
            yield Fault((*here, field), "a size has no slices; allowed: leave it out")
    if part(gate, "artifact") is not None:
        yield from named(seen, (*here, "artifact"), part(gate, "artifact"), RUNS)
    elif seen.judge is None:
        yield Fault((*here, "artifact"), "required, since nothing is judged; allowed: the name of a step")
    if part(gate, "against") != CHAMPION:
        yield from named(seen, (*here, "against"), part(gate, "against"), RUNS)
    others = [step.name for step in seen.steps if step.output in RUNS]
    yield from _with_itself(here, gate, [] if "artifacts" in wrong else seen.named("artifacts"), others)


def _speed_gate(seen: Seen, here: Field, gate: dict[str, Any], measure: str, wrong: set[str]) -> Iterator[Fault]:
    for field in ("corpus", "slice", "worst"):
        if part(gate, field) not in (None, False, BROKEN):
            yield Fault((*here, field), "a speed has no corpus and no slices; allowed: leave it out")
    if seen.judge is BROKEN:
        return
    if seen.judge is None or part(seen.judge, "speed", False) is False:
        text = f"{measure} is not measured, since `judge` asks for no speed"
        yield Fault((*here, "measure"), f"{text}; allowed: with `speed: true` of `judge`")
    baseline, executed = part(seen.judge, "baseline"), seen.executed()
    beside = [baseline] if isinstance(baseline, str) else []
    for field, allowed, why, of in (
        ("artifact", executed, "is not judged by execution here", {"artifacts"}),
        ("against", beside, f"was not measured in turn with it, as {measure} must be", {"baseline"}),
    ):
        value = part(gate, field)
        if isinstance(value, str) and isinstance(seen.judge, dict) and value not in allowed and not of & wrong:
            yield Fault((*here, field), f"{value!r} {why}; allowed: {', '.join(allowed) or 'none in this recipe'}")
    artifact = part(gate, "artifact")
    if (
        isinstance(artifact, str)
        and part(gate, "against") == baseline
        and not takes_turns(seen.target(artifact) or CPU)
    ):
        text = f"{artifact!r} is timed alone, since torch here is built without CUDA"
        yield Fault((*here, "against"), f"{text}; allowed: leave it out, or install a torch for CUDA")
    alone = part(gate, "artifact") or (executed[0] if len(executed) == 1 and not wrong else None)
    if baseline in executed and alone == part(gate, "against") == baseline:
        yield Fault((*here, "artifact"), f"{baseline!r} takes no turns with itself; allowed: another artifact")


def _score_gate(seen: Seen, here: Field, gate: dict[str, Any], wrong: set[str]) -> Iterator[Fault]:
    """What a gate says of what `judge` has; `wrong` are the fields of `judge` that cannot be relied on."""
    measure, baseline = part(gate, "measure"), part(seen.judge, "baseline")
    yield from _kinds_of_corpora(seen, here, gate)
    paired = isinstance(measure, str) and measure_of(measure).paired
    executed, corpora = seen.executed(), seen.named("corpora")
    against = [CHAMPION, *executed, *([baseline] if isinstance(baseline, str) and not paired else [])]
    measures, own = (part(seen.judge, key, default) for key, default in (("measures", list(MEASURES)), ("own", [])))
    if BROKEN not in (measures, own):
        measures = [*measures, *(f"{OWN}{name}" for name in own)]
    for field, allowed, why, of in (
        ("measure", measures, "is not measured", {"measures"}),
        ("artifact", executed, "is not judged by execution here", {"artifacts"}),
        ("corpus", corpora, "is not judged", {"corpora"}),
        ("against", against, "has no such measure", {"artifacts", "baseline"}),
    ):
        value = part(gate, field)
        if not isinstance(value, str) or allowed is BROKEN or value in allowed or value.startswith(HARNESS_MEASURES):
            continue
        strange = field != "measure" and seen.find(value) is None
        # Where the list itself is wrong, the name may be what was meant to stand there; an unknown one is wrong anyway.
        if strange or (isinstance(seen.judge, dict) and not of & wrong and measure is not BROKEN):
            text = f"there is no step {value!r}" if strange else f"{value!r} {why}"
            yield Fault((*here, field), f"{text}; allowed: {', '.join(allowed) or 'none in this recipe'}")
    if part(gate, "against") in against:
        yield from _with_itself(here, gate, [] if "artifacts" in wrong else executed, against)


def _kinds_of_corpora(seen: Seen, here: Field, gate: dict[str, Any]) -> Iterator[Fault]:
    """A measure of items needs a set of items, and one that is seen between two needs both."""
    measure = known(str(part(gate, "measure")))
    if measure is None:
        return
    if measure.between and part(gate, "against") is None:
        yield Fault(
            (*here, "against"), f"{part(gate, 'measure')} is counted between two; allowed: the baseline, a step"
        )
    if measure.score.startswith("varied") and part(seen.judge, "variants", []) == []:
        text = f"{part(gate, 'measure')} is of items that are typed otherwise, and `judge` asks for none"
        yield Fault((*here, "measure"), f"{text}; allowed: with `variants` of `judge`")
    sets = [name for name in seen.named("corpora") if (one := seen.find(name)) and one.stage == "items"]
    corpus = part(gate, "corpus")
    if measure.of_items and corpus is None and not sets:
        text = f"{part(gate, 'measure')} is measured on a set of items, and `judge` has none"
        yield Fault((*here, "measure"), f"{text}; allowed: with a step of the stage items among its corpora")
    if measure.of_items and isinstance(corpus, str) and corpus in seen.named("corpora") and corpus not in sets:
        allowed = ", ".join(sets) or "a step of the stage items"
        yield Fault(
            (*here, "corpus"), f"{corpus!r} is text, and {part(gate, 'measure')} is of items; allowed: {allowed}"
        )
