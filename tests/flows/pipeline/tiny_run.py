"""A whole run in no time: made-up stages whose artifacts the judging reads, sealed once and ended many times."""

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from flows.pipeline.champion import facing
from flows.pipeline.drive import optimize
from flows.recipe.expand import expanded
from flows.recipe.read import load_recipe
from flows.registry.journal import history
from flows.results import RunResult
from flows.running.run_records import Record, records
from flows.running.session import opened, run_step
from flows.settings import Settings
from stages import STAGES
from stages.adapters.connect import connect
from stages.runtime.progress import Silent
from tests.flows import definitions
from tests.flows.recorded import migrated

RECIPE = """\
recipe: 1
name: tiny
steps:
  - {name: dense, stage: fetch, params: {source: "x://dense"}}
  - {name: text, stage: corpus, params: {source: "x://text", splits: {test: 1.0}}}
  - {name: graph, stage: export, inputs: {model: dense}}
  - {name: cpu, stage: compile, inputs: {graph: graph}, params: {backend: onnxruntime}}
judge: {artifacts: [cpu], baseline: dense, corpora: [text]}
gates:
  - {measure: perplexity, against: dense, at_most: 1.25}
register: {model: MODEL}
"""


class FetchParams(definitions.FetchParams):
    """A model that is so many nats a token worse than another, and so is all that is made of it."""

    worse: float = 0.0


def read(params, inputs, output, progress):
    said = {"sources": {"topics": {"characters": {"test": 9, "train": 9}}, "notes": {"characters": {"train": 9}}}}
    (output / "corpus.json").write_text(json.dumps(said))
    return definitions.CORPUS.run(params, inputs, output, progress)


def weights(params, inputs, output, progress):
    made = b"weights" + (str(params.worse).encode() if getattr(params, "worse", 0) else b"")
    (output / "model.safetensors").write_bytes(b"all weights")
    (output / "model.onnx").write_bytes((inputs["model"] / "model.onnx").read_bytes() if inputs else made)
    return {}


def compiled(params, inputs, output, progress):
    shutil.copyfile(inputs["graph"] / "model.onnx", output / "model.onnx")
    (output / "engine.json").write_text(json.dumps({"target": "onnxruntime:cpu", "executable": "model.onnx"}))
    return {"size_bytes": 7.0}


def validated(params, inputs, output, progress):
    worse = float((inputs["model"] / "model.onnx").read_bytes().removeprefix(b"weights") or 0)
    count = range(params.windows or 8)
    documents = [{"id": f"d{i}", "tokens": 10, "nll": 20.0 + i % 3 + 10 * worse} for i in count]
    said = {
        "artifact_target": "onnxruntime:cpu",
        "measures": {"perplexity": 8.0},
        "documents": documents,
        "corpus": "c",
    }
    (output / "report.json").write_text(json.dumps(said))
    return {"perplexity": 8.0}


def timed(params, inputs, output, progress):
    measures = {"decode_tokens_per_s": 30.0, "peak_rss_bytes": 2e8}
    one = {"target": "onnxruntime:cpu", "threads": 2, "intervals": {"decode_tokens_per_s": [29.0, 31.0]}}
    said = {
        "artifact": {**one, "measures": measures},
        "baseline": {**one, "measures": {"decode_tokens_per_s": 10.0, "peak_rss_bytes": 8e8}},
        "ratios": {"decode_tokens_per_s": [3.0, 2.5, 3.5], "peak_rss_bytes": [0.25, 0.25, 0.25]},
    }
    cell = {"batch": 1, "prompt_tokens": 512, "new_tokens": 32, **said}
    executor = {"target": params.target, "device": "a processor x2", "runtime": "onnxruntime 1"}
    report = {"task": "generate", "repeats": 5, "executor": executor, "speed": cell, "cells": [cell]}
    (output / "report.json").write_text(json.dumps(report))
    return {**measures, "decode_tokens_per_s_ratio": 3.0, "peak_rss_bytes_ratio": 0.25}


FETCH = replace(definitions.FETCH, params=FetchParams, run=weights)
CORPUS = replace(definitions.CORPUS, run=read)
EXPORT = replace(definitions.EXPORT, run=weights)
COMPILE = replace(definitions.COMPILE, run=compiled)
VALIDATE = replace(definitions.VALIDATE, run=validated)
BENCH = replace(
    definitions.BENCH, run=timed, executed_on=lambda params: {"target": params.target, "device": "a processor x2"}
)
MADE = {name: "tests.flows.definitions" for name in STAGES} | dict.fromkeys(
    ("fetch", "corpus", "export", "compile", "validate", "bench"), __name__
)


@dataclass
class Heard:
    """A terminal that keeps its lines, and breaks when it is told to."""

    lines: list[str] = field(default_factory=list)
    gone: bool = False

    def for_step(self, name):
        return Silent()

    def started(self, step): ...
    def finished(self, step, seconds, cached, why): ...
    def failed(self, step, text): ...

    def line(self, text):
        if self.gone:
            raise BrokenPipeError("the terminal is gone")
        self.lines.append(text)


@dataclass
class Place:
    """A store with everything sealed and an MLflow beside it, a model of its own, and what became of its runs.

    Places share store and database: to set up another of each takes longer than a run.
    """

    root: Path
    folder: Path
    model: str
    terminal: Heard = field(default_factory=Heard)
    output: Path | None = None
    gates: tuple[str, ...] = ()

    @property
    def settings(self) -> Settings:
        return Settings(store=str(self.root / "store"), launcher="inline", output=self.output)

    @property
    def recipe(self) -> Path:
        path = self.folder / "recipe.yaml"
        gates = "".join(f"  - {{{gate}}}\n" for gate in self.gates)
        path.write_text(RECIPE.replace("MODEL", self.model).replace("register:", f"{gates}register:"))
        return path

    def run(self, *sets: str) -> RunResult:
        return optimize(expanded(load_recipe(self.recipe, sets)), self.settings, self.terminal)

    def session(self, *sets: str):
        return opened(expanded(load_recipe(self.recipe, sets)), self.settings, self.terminal, facing)

    def seal(self, *sets: str) -> None:
        """Make every step and end nothing."""
        with self.session(*sets) as session:
            for name in session.planned:
                run_step(session, name)

    @property
    def client(self):
        from mlflow import MlflowClient

        return MlflowClient(os.environ["MLFLOW_TRACKING_URI"])

    @property
    def promoted(self) -> list[str]:
        """The versions in the journal."""
        return [one.version.number for one in history(connect(str(self.root / "store")).objects, self.model)]

    @property
    def alias(self) -> str:
        found = self.client.search_registered_models(f"name = '{self.model}'")
        return str(found[0].aliases.get("champion", "")) if found else ""

    @property
    def versions(self) -> list[str]:
        return [str(one.version) for one in self.client.search_model_versions(f"name = '{self.model}'")]

    @property
    def record(self) -> Record:
        # By the time, not by the name: runs that begin in one second have names in any order.
        return max(records(self.settings.scratch), key=lambda one: one.facts["started"])

    @property
    def state(self) -> str:
        return self.record.line().state

    @property
    def loose(self) -> list[Mapping[str, str]]:
        return [event for event in self.record.events() if event["event"] == "loose end"]

    def followed(self, run: str):
        """MLflow's run of a run."""
        (experiment,) = self.client.search_experiments(filter_string="name = 'enginery'")
        return self.client.search_runs([experiment.experiment_id], f"tags.`enginery.run` = '{run}'")[0]


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """The folder of a store in which every step is sealed and nothing was ever promoted."""
    root, before = tmp_path_factory.mktemp("sealed"), dict(os.environ)
    shutil.copy(migrated(), root / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        for name, module in MADE.items():
            patch.setitem(STAGES, name, f"{module}:{name.upper()}")
        patch.delenv("PREFECT_API_URL", raising=False)
        patch.setenv("PREFECT_HOME", str(root / "prefect"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        Place(root, root, "none").seal()
        yield root
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


_COUNT = itertools.count(1)


@pytest.fixture
def place(sealed, tmp_path, monkeypatch):
    monkeypatch.setattr("flows.pipeline.steps.AWAY_S", 0)  # what is away stays so
    # These engines are made up and answer nothing; test_proof.py asks real ones.
    monkeypatch.setattr("flows.pipeline.finish.proved", lambda session, registry, candidate, result: result)
    return Place(sealed, tmp_path, f"tiny{next(_COUNT)}")
