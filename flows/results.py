"""What the commands print with --json, and what a record keeps; `flows/commands/schemas` has the JSON Schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from stages.runtime.contract import Frozen, Kind

Metrics = dict[str, float]

Held = Literal["bad end", "value", "good end"]
"""What of a measure a limit is on: an end of its interval, or what was measured itself."""
Bound = Literal["at_most", "at_least"]
"""Which side of a limit is held, in the words of a recipe's gate."""

RunVerdict = Literal["passed", "gate failed", "not judged"]
"""`not judged`: no gate was applied, since there is none, or none but those against a champion that is not there."""

RunState = Literal["running", "passed", "gate failed", "not judged", "error", "interrupted", "ended"]


class StepResult(Frozen):
    """One step or one measurement of a run.

    Attributes:
        seconds: wall clock in this run; near zero when cached.
        peak_rss_bytes: of the making, also when cached; 0 when it is not known.
        why: why it was made: the first field in which the nearest sealed artifact differed.
        measures: the step that a measurement measured, on `corpus`; empty for a step of the recipe.
        device: of a measured speed, which is of this device alone; empty for what is true anywhere.
    """

    name: str
    stage: str
    kind: Kind
    fingerprint: str
    uri: str
    cached: bool
    seconds: float
    peak_rss_bytes: int
    metrics: Metrics
    why: str = ""
    measures: str = ""
    corpus: str = ""
    device: str = ""


class GateResult(Frozen):
    """One gate on one artifact, as executed on one target, on one corpus.

    Attributes:
        measured: the point estimate, None when there is none: no champion yet, or no finite number.
        bound: whether the limit is the most or the least that is allowed.
        low: lower end of its interval.
        high: upper end of its interval; the gate looks at the bad end.
        slice: the slice of the corpus that was looked at, empty for all; with `worst` the one that holds least of all.
        held: what is held against the limit.
        text: the whole in one sentence.
    """

    measure: str
    artifact: str
    target: str
    corpus: str
    measured: float | None
    bound: Bound
    limit: float
    passed: bool
    against: str | None = None
    slice: str = ""
    worst: bool = False
    held: Held = "bad end"
    low: float | None = None
    high: float | None = None
    text: str = ""

    @model_validator(mode="before")
    @classmethod
    def _with_bound(cls, data: Any) -> Any:
        # Records of runs from before there was the field: their sentences were all made by one line of code.
        if isinstance(data, dict) and "bound" not in data:
            return {**data, "bound": "at_least" if ", limit at least " in data.get("text", "") else "at_most"}
        if isinstance(data, dict) and (given := dict(data)).pop("value", None) is not None:
            return {**given, "held": "value" if data["value"] else "bad end"}
        return data

    @property
    def applied(self) -> bool:
        """Whether something was held against the limit; not so where there is no champion yet."""
        return self.measured is not None or not self.passed

    @property
    def state(self) -> Literal["passed", "failed", "not applicable"]:
        """What became of it, in a word."""
        return ("passed" if self.passed else "failed") if self.applied else "not applicable"

    @property
    def said(self) -> str:
        """The whole in one sentence, also when nobody wrote one."""
        where = f" on {self.corpus}" if self.corpus else ""
        limit = f"limit {self.bound.replace('_', ' ')} {self.limit}"
        return self.text or f"{self.measure} of {self.artifact}{where}: measured {self.measured}, {limit}: {self.state}"


class ModelResult(Frozen):
    """The registered version.

    Attributes:
        targets: those it was judged on.
        undone: why the alias does not stand on it: it was rolled back before, or did not answer like the judged engine,
            and then where the alias went by itself; empty where it stands there.
    """

    name: str
    version: str
    alias: str
    targets: list[str]
    undone: str = ""


class RunResult(Frozen):
    """A run of a recipe.

    Attributes:
        run: the run's name in `enginery runs`.
        passed: no gate failed, so that the command exits with 0; `verdict` says whether any was applied.
        report: path or URI of the HTML report.
        executed: artifact and target of each engine that answered here.
        compiled: artifact and target of each engine that was built and that nothing here could run.
        outputs: what lies where: `report.html`, and each artifact by its step; with --output the files beside them.
        lost: where right answers went, a sentence for each set of items.
    """

    run: str
    passed: bool
    verdict: RunVerdict
    seconds: float
    report: str
    store: str
    steps: list[StepResult]
    gates: list[GateResult]
    model: ModelResult | None
    executed: list[str]
    compiled: list[str]
    outputs: dict[str, str] = Field(default_factory=dict)
    lost: list[str] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _with_verdict(cls, data: Any) -> Any:
        # Records of runs from before there was the field.
        if isinstance(data, dict) and "verdict" not in data:
            gates = [GateResult.model_validate(gate) for gate in data.get("gates", ())]
            return {**data, "verdict": run_verdict(gates)}
        return data

    @property
    def unjudged(self) -> str:
        """Why no gate was applied; empty where one was."""
        if self.verdict != "not judged":
            return ""
        return "no gate has a champion to compare with yet" if self.gates else "the recipe has no gates"


def run_verdict(gates: Sequence[GateResult]) -> RunVerdict:
    """What a run came to by its gates: one that was applied must be there for `passed`."""
    if not all(gate.passed for gate in gates):
        return "gate failed"
    return "passed" if any(gate.applied for gate in gates) else "not judged"


class PlanLine(Frozen):
    """What would happen to one step.

    Attributes:
        why: on a miss, the first field in which the nearest sealed artifact differs.
        needs: memory, disk, network, in words.
    """

    name: str
    stage: str
    hit: bool
    why: str
    fingerprint: str | None
    needs: str


class PlanResult(Frozen):
    """`enginery plan --json`."""

    recipe: str
    store: str
    steps: list[PlanLine]


class CheckLine(Frozen):
    """What one verb would do with a checkpoint."""

    does: str
    stage: str
    takes: bool
    why: str


class CheckResult(Frozen):
    """`enginery check --json`."""

    source: str
    facts: dict[str, str]
    verbs: list[CheckLine]


class Tensors(Frozen):
    """Tensors of one type: how many, their elements, bytes, and the share of elements that are zero."""

    dtype: str
    count: int
    elements: int
    bytes: int
    zeros: float


class Inspection(Frozen):
    """`enginery inspect --json`: an artifact as its bytes say it is.

    Attributes:
        precisions: tensors by element type; a 4-bit pair in a byte counts as one uint8.
        parameters: elements of all tensors, each stored tensor counted once.
        sparsity: share of zeros over all weight matrices.
        shared: groups of places that one stored tensor serves.
        duplicates: tensors of equal bytes that are stored more than once, with the bytes that this wastes.
        facts: the small JSON files of the artifact, by name.
    """

    fingerprint: str
    uri: str
    kind: Kind
    step: str
    size_bytes: int
    files: dict[str, int]
    metrics: Metrics
    parameters: int
    sparsity: float
    precisions: list[Tensors]
    shared: list[list[str]]
    duplicates: list[list[str]]
    duplicate_bytes: int
    facts: dict[str, Any]
    work: dict[str, Any]
    provenance: dict[str, Any]


class Listed(Frozen):
    """One artifact of a store."""

    fingerprint: str
    step: str
    stage: str
    kind: Kind
    size_bytes: int
    created: str
    seconds: float


class ListResult(Frozen):
    """`enginery ls --json`."""

    store: str
    artifacts: list[Listed]


class RunLine(Frozen):
    """One recorded run."""

    run: str
    recipe: str
    state: RunState
    started: str
    seconds: float | None
    model: str
    error: str


class RunsResult(Frozen):
    """`enginery runs --json`."""

    store: str
    runs: list[RunLine]


class VerifyResult(Frozen):
    """`enginery verify --json`: every byte was hashed and matched."""

    fingerprint: str
    uri: str
    files: dict[str, str]
    size_bytes: int
