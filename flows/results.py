"""What the commands print with --json, and what a record keeps; `flows/commands/schemas` has the JSON Schemas."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from stages.runtime.contract import Frozen, Kind

Metrics = dict[str, float]


class StepResult(Frozen):
    """One step of a run, or one measurement of the judging.

    Attributes:
        seconds: wall clock in this run; near zero when cached.
        peak_rss_bytes: of the making, also when cached; 0 when it is not known.
        why: why it was made: the first field in which the nearest sealed artifact differed.
        measures: the step that a measurement measured, empty for a step of the recipe.
        corpus: the corpus it was measured on.
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


class GateResult(Frozen):
    """One gate on one artifact, as executed on one target, on one corpus.

    Attributes:
        measured: the point estimate, None when there is none: no champion yet, or no finite number.
        low: lower end of its interval.
        high: upper end of its interval; the gate looks at the bad end.
        text: the whole in one sentence.
    """

    measure: str
    artifact: str
    target: str
    corpus: str
    measured: float | None
    limit: float
    passed: bool
    against: str | None = None
    low: float | None = None
    high: float | None = None
    text: str = ""

    @property
    def said(self) -> str:
        """The whole in one sentence, also when nobody wrote one."""
        where = f" on {self.corpus}" if self.corpus else ""
        held = "passed" if self.passed else "failed"
        return self.text or f"{self.measure} of {self.artifact}{where}: {self.measured} against {self.limit}: {held}"


class ModelResult(Frozen):
    """The registered version. `targets` are those it was judged on."""

    name: str
    version: str
    alias: str
    targets: list[str]


class RunResult(Frozen):
    """A run of a recipe.

    Attributes:
        run: the run's name in `enginery runs`.
        report: path or URI of the HTML report.
        executed: artifact and target of each engine that answered here.
        compiled: artifact and target of each engine that was built and that nothing here could run.
        outputs: what lies where: `report`, `engine cpu`, ...
    """

    run: str
    passed: bool
    seconds: float
    report: str
    store: str
    steps: list[StepResult]
    gates: list[GateResult]
    model: ModelResult | None
    executed: list[str]
    compiled: list[str]
    outputs: dict[str, str] = Field(default_factory=dict)


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
    state: Literal["running", "passed", "gate failed", "error", "interrupted", "ended"]
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


SCHEMAS: dict[str, type[Frozen]] = {
    "run": RunResult,
    "plan": PlanResult,
    "inspect": Inspection,
    "ls": ListResult,
    "runs": RunsResult,
    "verify": VerifyResult,
}
"""Name of the schema file -> what it describes."""
