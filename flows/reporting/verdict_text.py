"""What a run came to, in words: one line for a state, Markdown for the pages of MLflow and Prefect."""

from __future__ import annotations

from flows.results import GateResult, RunResult

_FAILED = (": FAILED", ": failed")
_MOST_GATES = 25
"""MLflow takes 8000 characters; the report has every gate."""
_MOST_CHARACTERS = 4000


def summary(result: RunResult) -> str:
    """The state in one line, with every gate that did not hold, what was measured and its limit."""
    failed = "; ".join(_bare(gate) for gate in result.gates if not gate.passed)
    return f"{result.verdict}: {failed}" if failed else result.verdict


def described(result: RunResult) -> str:
    """The state, each gate, those that failed first, and what was promoted, in Markdown."""
    parts = [f"**{result.verdict}**"]
    gates = sorted(result.gates, key=lambda gate: gate.passed)
    if gates:
        lines = [f"- {'✓' if gate.passed else '✗'} {_escaped(gate.said)}" for gate in gates[:_MOST_GATES]]
        more = len(gates) - _MOST_GATES
        parts.append("\n".join([*lines, *([f"- and {more} more: see the report"] if more > 0 else [])]))
    else:
        parts.append("The recipe asks for no gate.")
    if result.model and result.model.version:
        on = f" ({', '.join(result.model.targets)})" if result.model.targets else ""
        stands = f": {_escaped(result.model.undone)}" if result.model.undone else f" as `{result.model.alias}`{on}"
        parts.append(f"`{result.model.name}` version {result.model.version}{stands}.")
    elif not result.passed:
        parts.append("No version was registered and no alias moved; the artifacts are kept.")
    return "\n\n".join(parts)


def broken(error: str, *, interrupted: bool) -> str:
    """The Markdown of a run that came to no result."""
    if interrupted:
        return "**interrupted**: the same command goes on from the last sealed step."
    return f"**failed**\n\n```\n{error[:_MOST_CHARACTERS]}\n```"


def _bare(gate: GateResult) -> str:
    said = gate.said
    for word in _FAILED:
        said = said.removesuffix(word)
    return said


def _escaped(text: str) -> str:
    """Text that holds names with `_` and `*`, which Markdown would take for its own, and that stays one line."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|" else c for c in " ".join(text.split()))
