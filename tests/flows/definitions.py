"""Stages that compute next to nothing, so that recipes can be checked apart from what the real ones do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from stages import STAGES
from stages.runtime.contract import Image, Input, Kind, Location, Metrics, Params, Progress, Stage

C, T, X, E = (frozenset({kind}) for kind in (Kind.CHECKPOINT, Kind.CORPUS, Kind.ONNX, Kind.ENGINE))


class FetchParams(Params):
    source: str = Location()


class CorpusParams(Params):
    source: str = Location()
    splits: dict[Literal["calibrate", "train", "validate", "test"], Annotated[float, Field(gt=0, le=1)]]


class ShareParams(Params):
    method: Literal["tie", "basis"] = "basis"
    keep: float = Field(0.95, gt=0, le=1)


class TokensParams(Params):
    tokens: int = Field(1000, ge=1)


class QuantizeParams(Params):
    scheme: Literal["int8_w8a8", "int8_weight_only", "int4_weight_only", "fp8"]


class NoParams(Params):
    pass


class CompileParams(Params):
    backend: Literal["tensorrt_rtx", "tensorrt", "onnxruntime"]
    architectures: list[str] = Field(default_factory=list)


class ValidateParams(Params):
    split: str
    window_tokens: int = 512
    windows: int | None = None
    target: str = "torch:cpu"


class BenchParams(Params):
    split: str = "test"
    target: str = "torch:cpu"


def run(params: Params, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    (output / "file.txt").write_text("made")
    return {"size_bytes": 4.0}


def made(name, params, output, **inputs):
    return Stage(
        name=name,
        params=params,
        inputs={role: taken if isinstance(taken, Input) else Input(kinds=taken) for role, taken in inputs.items()},
        output=output,
        image=Image.BASE,
        run=run,
    )


FETCH = made("fetch", FetchParams, Kind.CHECKPOINT)
CORPUS = made("corpus", CorpusParams, Kind.CORPUS)
ITEMS = made("items", FetchParams, Kind.CORPUS)
SHARE = made("share", ShareParams, Kind.CHECKPOINT, model=C, text=Input(kinds=T, optional=True))
PRUNE = made("prune", ShareParams, Kind.CHECKPOINT, model=C, text=T)
RECOVER = made("recover", TokensParams, Kind.CHECKPOINT, model=C, teacher=Input(kinds=C, optional=True), text=T)
QUANTIZE = made("quantize", QuantizeParams, Kind.CHECKPOINT, model=C, text=T)
FUSE = made("fuse", NoParams, Kind.CHECKPOINT, models=Input(kinds=C, many=True))
EXPORT = made("export", NoParams, Kind.ONNX, model=C)
COMPILE = made("compile", CompileParams, Kind.ENGINE, graph=X)
VALIDATE = made(
    "validate", ValidateParams, Kind.REPORT, model=C | X | E, text=T, baseline=Input(kinds=C, optional=True)
)
BENCH = made(
    "bench", BenchParams, Kind.REPORT, artifact=C | X | E, text=T, baseline=Input(kinds=C | X | E, optional=True)
)


@pytest.fixture
def plain_stages(monkeypatch):
    """Every stage replaced by its plain namesake, and `fuse` beside them."""
    for name in [*STAGES, "fuse"]:
        monkeypatch.setitem(STAGES, name, f"tests.flows.definitions:{name.upper()}")
