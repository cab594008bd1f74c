"""What a person has done away with, as the journal tells it, and where an alias goes back to.

An engine that was rolled back, or that a person left, comes back by no run: only a person has it served again.
"""

from __future__ import annotations

from itertools import pairwise

from flows.registry.journal import Promotion, Version, standing_entry


def standing(entries: list[Promotion]) -> list[Version]:
    """The versions an alias stands on and would roll back to, last first served: promote pushes, rollback pops.

    A rollback pops what it has passed over as well.
    """
    stack: list[Version] = []
    for entry in entries:
        if entry.action != "promote":
            stack.pop()
            while entry.action == "rollback" and stack and not _alike(stack[-1], entry.version):
                stack.pop()
            continue
        if stack and _alike(stack[-1], entry.version):
            stack.pop()  # registered again after MLflow's registry was lost: not a step to go back to
        stack.append(entry.version)
    return stack


def before(entries: list[Promotion]) -> tuple[Version | None, list[Version]]:
    """The version that a rollback goes to, None for none, and those that it passes over.

    Passed over is what was rolled back before; what a person left by `promote` is not: to go back to it is to take that
    promotion back.
    """
    stack = standing(entries)
    undone = {engine for engine, entry in rolled_back(entries).items() if entry.action != "promote"}
    passed: list[Version] = []
    for version in reversed(stack[:-1]):
        if _alike(version, stack[-1]):
            continue
        if version.candidate.served not in undone:
            return version, passed
        passed.append(version)
    return None, passed


def _alike(one: Version, other: Version) -> bool:
    return one.candidate.identity == other.candidate.identity


def rolled_back(entries: list[Promotion]) -> dict[str, Promotion]:
    """Engines that were rolled back or that a person moved away from, with the entry that did it.

    Until a person promotes one again, or rolls back to one that was only left. By the served engine's fingerprint: it
    is the same whatever is compiled beside it. What a run promotes marks nothing: it only found a better one.
    """
    undone: dict[str, Promotion] = {}
    for former, entry in pairwise(entries):
        left, now = former.candidate.served, entry.candidate.served
        if entry.action == "promote" and not entry.by_person:
            continue
        if entry.action == "promote" or (now in undone and undone[now].action == "promote"):
            undone.pop(now, None)
        # A person who promotes where nothing stood leaves nothing, nor does one who has it served beside another plan.
        if entry.action != "promote" or (former.action != "withdraw" and left != now):
            undone[left] = entry
    return undone


def why_not(entries: list[Promotion], version: Version, *, by_person: bool) -> tuple[str, bool]:
    """Why no entry is made, empty where one is, and whether the alias stands on the version then."""
    stands = standing_entry(entries)
    if stands and stands.version.same(version):
        return f"{stands.alias} stands on version {version.number} already", True
    undone = None if by_person else rolled_back(entries).get(version.candidate.served)
    if undone is None:
        return "", True
    done = "rolled back" if undone.action != "promote" else f"left for version {undone.version.number}"
    reason = f": {undone.why}" if undone.why else ""
    where = "" if undone.alias == "champion" else f" --alias {undone.alias}"
    return (
        f"version {version.number} was {done} by {undone.who} on {undone.when[:10]}{reason}; "
        f"`enginery promote {version.candidate.model} {version.number}{where}` puts it back"
    ), False
