"""What a stage is, what it turns into what, and how it fails.

Every other room of the house speaks in these types. They hold no behaviour beyond their own consistency.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Metrics = dict[str, float]

PARTIAL = ".partial"
"""Folder inside a stage's output where it keeps state to resume from. It is never sealed."""


class Kind(StrEnum):
    """What an artifact holds."""

    CHECKPOINT = "checkpoint"
    CORPUS = "corpus"
    ONNX = "onnx"
    ENGINE = "engine"
    REPORT = "report"


class Image(StrEnum):
    """A set of dependencies; `requires` asserts their versions where a stage runs."""

    BASE = "base"
    TORCH = "torch"
    TENSORRT = "tensorrt"
    GPU = "gpu"


class StageError(Exception):
    """A broken contract, said in four parts: what happened, what was measured, the limit, the remedy."""

    def __init__(self, what: str, *, measured: object = None, limit: object = None, remedy: str = "") -> None:
        self.what, self.measured, self.limit, self.remedy = what, measured, limit, remedy
        parts = [what]
        if measured is not None:
            parts.append(f"measured {measured}")
        if limit is not None:
            parts.append(f"limit {limit}")
        said = "; ".join(parts)
        # Another error's text may end with a full stop of its own.
        super().__init__(f"{said.removesuffix('.')}. {remedy}" if remedy else said)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuilt, (type(self), self.what, self.measured, self.limit, self.remedy))


class DoesNotFit(StageError):
    """The work needs more than this machine has: memory, disk, a device. Exit code 3."""


class Interrupted(StageError):
    """A person or a scheduler ended the work on purpose. Exit code 130."""


class Unavailable(StageError):
    """Infrastructure failed (network, object store, database). The only error that is retried."""


def _rebuilt(kind: type[StageError], what: str, measured: object, limit: object, remedy: str) -> StageError:
    return kind(what, measured=measured, limit=limit, remedy=remedy)


class Frozen(BaseModel):
    """An immutable record that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def Location(default: Any = ..., *, pinned: bool = False, **kwargs: Any) -> Any:
    """A params field that says where bytes lie and not what they are: it never enters a fingerprint.

    Args:
        default: its value where a recipe gives none.
        pinned: nobody writes it: it is filled in when the run is planned.
        kwargs: of pydantic's Field.
    """
    extra: dict[str, Any] = {"location": True, "pinned": pinned}
    return Field(default, json_schema_extra=extra, **kwargs)


class Params(Frozen):
    """Only what changes the output's bytes. Devices, paths, minutes, credentials and worker counts never enter."""

    def identity(self) -> dict[str, Any]:
        """The fields that decide the output's bytes, as JSON values."""
        hidden = {
            name
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("location")
        }
        found = self.model_dump(mode="json", exclude=hidden)
        for name in found:
            inner = getattr(self, name)
            if isinstance(inner, list) and any(isinstance(one, Params) for one in inner):
                found[name] = [one.identity() for one in inner]
        return found


@dataclass(frozen=True, kw_only=True)
class Input:
    """What a stage accepts in one role."""

    kinds: frozenset[Kind]
    optional: bool = False
    many: bool = False


class Work(Frozen):
    """The identity of an artifact: same work, same artifact."""

    stage: str
    code: str
    params: dict[str, Any]
    inputs: dict[str, str]
    requires: dict[str, str]
    executor: dict[str, str] = {}


class FileEntry(Frozen):
    """One sealed file."""

    sha256: str
    size: int


class Provenance(Frozen):
    """Facts about the making, outside the identity. `step` is the name the step bore in its recipe."""

    step: str = ""
    commit: str = ""
    image: str = ""
    host: str
    device: str
    created: str
    seconds: float
    peak_rss_bytes: int


class Manifest(Frozen):
    """Written last: where it stands, the artifact is whole."""

    work: Work
    kind: Kind
    files: dict[str, FileEntry]
    metrics: dict[str, float]
    provenance: Provenance

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())


class Progress(Protocol):
    """How a running stage speaks. The bar, MLflow's curve and the child's JSON lines listen."""

    def advanced(self, done: float, total: float) -> None:
        """`done` of `total` units of this stage's work are finished."""

    def metric(self, name: str, value: float, step: int) -> None:
        """One point of a curve."""

    def note(self, text: str) -> None:
        """A sentence worth a log line."""


class Pins(Protocol):
    """What a stage may use while it turns a source into a digest: a cache of what was already resolved."""

    downloads: Path

    def recall(self, source: str) -> str | None:
        """The digest last resolved for an immutable source."""

    def remember(self, source: str, digest: str) -> None:
        """Keep a resolution for the next run without network."""


P = TypeVar("P", bound=Params)


@dataclass(frozen=True, kw_only=True)
class Divided(Generic[P]):
    """Work of independent units, whose parts any number of workers may compute beside the stage's own run.

    Attributes:
        count: (params, role -> folder of the input artifact) -> how many units there are.
        part: (params, inputs, range of units, progress) -> what the stage's run gathers: bytes that depend on the
            params, the inputs and the range alone.
    """

    count: Callable[[P, Mapping[str, Path]], int]
    part: Callable[[P, Mapping[str, Path], range, Progress], bytes]


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[P]):
    """A definition: sealed artifacts and params in, one sealed artifact out.

    Attributes:
        run: (params, role -> folder of the input artifact, output folder, progress) -> metrics. It writes its files
            into the output folder, state to resume from under `PARTIAL` there, and prints nothing.
        pin: turns a source named in params into the digest of its content, before the work has an identity. Only
            `fetch`, `corpus` and `items` have one.
        executed_on: for a stage whose result is a fact about a machine: the executor for given params and inputs.
        chosen_image: for a stage some of whose params ask for more than `image`, which holds what all of them need.
        uses: the modules that its params choose by name, which its code does not import: they are in `code`, too.
        admit: (params, role -> what is known of the input before it is made) -> what is known of the output, see
            `stages.admission`: a `Subject`, or a corpus's splits; None for a text of which no more is known than that
            it is there. It raises StageError where the work would, as far as names, shapes and settings say it.
        divided: for a stage whose work is a sum of independent parts. `run` uses those that it finds in its draft, see
            `stages.runtime.parts`, and its bytes do not depend on how the work was divided.
    """

    name: str
    params: type[P]
    inputs: Mapping[str, Input]
    output: Kind
    image: Image
    run: Callable[[P, Mapping[str, Path], Path, Progress], Metrics]
    pin: Callable[[P, Pins, Progress], P] | None = None
    executed_on: Callable[[P], dict[str, str]] | None = None
    uses: Callable[[P], tuple[str, ...]] | None = None
    admit: Callable[[P, Mapping[str, Any]], Any] | None = None
    divided: Divided[P] | None = None
    chosen_image: Callable[[P], Image] | None = None

    def image_of(self, params: P) -> Image:
        """The image that a run with these params needs."""
        return self.chosen_image(params) if self.chosen_image else self.image
