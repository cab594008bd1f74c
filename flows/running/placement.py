"""Where each stage runs in production: its work pool, image, network and limits."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from flows.settings import Settings
from stages import STAGES, stage
from stages.adapters.targets import on_gpu
from stages.runtime.contract import Frozen, Params, StageError
from stages.runtime.cuda_driver import gpu_architecture

GB = 10**9


def stack_name() -> str:
    """What the names of this stack's networks and volumes begin with, on the workers' side."""
    return os.environ.get("ENGINERY_STACK") or "enginery"


class Place(Frozen):
    """Where one stage runs.

    Attributes:
        pool: name of the work pool.
        image: which of the images, by its short name; empty for the one that the stage asks for.
        network: `inside`, which has no way out, or `outside` for stages that fetch.
        memory_bytes: of its container; what goes beyond is killed and reported.
        minutes: after so long the stage is ended; its partial state is kept.
        one_at_a_time: a global concurrency limit that it holds while it computes; empty for none.
        job_variables: what else the pool's job template asks for, as the template names it.
    """

    pool: str = "cpu"
    image: str = ""
    network: str = "inside"
    memory_bytes: int = Field(8 * GB, gt=0)
    minutes: float = Field(240, gt=0)
    one_at_a_time: str = ""
    job_variables: Mapping[str, Any] = Field(default_factory=dict)

    @field_validator("job_variables")
    @classmethod
    def _not_ours(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Refuse what another field says."""
        for name in sorted(set(given) & set(_OURS)):
            raise ValueError(f"{name} is no job variable to set here: set {_OURS[name]} instead")
        return given


_OURS: Mapping[str, str] = {
    "image": "`image` of the stage or `images` of the file",
    "network": "`network`",
    "memory_bytes": "`memory_bytes`",
    "seconds": "`minutes`",
}
"""Job variable -> what sets it."""


_DEFAULTS: Mapping[str, Place] = {
    "fetch": Place(network="outside"),
    # It may read what is installed (descriptions://constraints), which must be what the planner has. A model may write
    # for it: all that the torch image holds is in this one, too.
    "corpus": Place(network="outside", image="server"),
    "items": Place(network="outside"),
    "compile": Place(pool="gpu", one_at_a_time="gpu"),
    "validate": Place(pool="gpu", one_at_a_time="gpu"),
    "bench": Place(pool="gpu", one_at_a_time="gpu"),
}


class Gpu(Frozen):
    """The GPU of a pool's machines.

    Attributes:
        name: as its driver tells it and a report's provenance names it.
        architecture: `sm_89`, ...
    """

    name: str
    architecture: str = Field(pattern=r"^sm_\d+$")


class Pools(Frozen):
    """The settings of work pools: stage -> place, and what they share.

    Attributes:
        stages: places that differ from the defaults.
        images: an image's full name, with `{image}` for its short name.
        networks: the names that `inside` and `outside` have on the workers' side, by default those of the stack that
            $ENGINERY_STACK names.
        devices: pool -> the processor that its machines have, as a report's provenance names it: `validate` and `bench`
            record it. Without an entry a pool's machines are taken to be like the one that plans.
        gpus: pool -> the GPU that its machines have; plans for it are executed and judged there. Without an entry the
            GPU is that of the machine that plans, if it has one.
        no_worker_seconds: how long a step waits for a pool to have a live worker.
        start_seconds: how long a submitted step may take to start before it is submitted again.
        attempts: how often a step whose container was lost is started.
    """

    stages: Mapping[str, Place] = Field(default_factory=dict)
    images: str = "enginery/{image}:0.1.0"
    networks: Mapping[str, str] = Field(
        default_factory=lambda: {"inside": f"{stack_name()}-stages", "outside": f"{stack_name()}-outside"}
    )
    devices: Mapping[str, str] = Field(default_factory=dict)
    gpus: Mapping[str, Gpu] = Field(default_factory=dict)
    no_worker_seconds: float = Field(60, gt=0)
    start_seconds: float = Field(600, gt=0)
    attempts: int = Field(3, ge=1)

    def place(self, name: str) -> Place:
        """Where a stage runs."""
        return self.stages.get(name) or _DEFAULTS.get(name) or Place()

    def image(self, name: str, params: Params | None = None) -> str:
        """The full name of the image that a stage runs in; with other params it may be another."""
        definition = stage(name)
        asked = definition.image if params is None else definition.image_of(params)
        return self.images.format(image=self.place(name).image or asked.value)

    def job_variables(self, name: str, params: Params | None = None) -> dict[str, Any]:
        """What a stage's flow run asks of the job template of its pool."""
        place = self.place(name)
        return {
            **place.job_variables,
            "image": self.image(name, params),
            "network": self.networks[place.network],
            "memory_bytes": place.memory_bytes,
            "seconds": int(place.minutes * 60) + 120,
        }

    def device(self, name: str, target: str) -> str:
        """The device of a stage's pool that a target is, empty where the settings name none."""
        pool = self.place(name).pool
        if not on_gpu(target):
            return self.devices.get(pool, "")
        return self.gpus[pool].name if pool in self.gpus else ""

    def gpu(self) -> str:
        """The architecture of the GPU where artifacts are measured, empty for none."""
        pool = self.place("validate").pool
        return self.gpus[pool].architecture if pool in self.gpus else gpu_architecture()


def load_pools(path: str | None = None) -> Pools:
    """The settings in a YAML file or s3:// URI, by default what $ENGINERY_POOLS names; defaults without one.

    A stage's entry changes the fields that it names; the others keep their defaults.

    Raises:
        StageError: the file cannot be read, or says what is not understood.
    """
    path = path if path is not None else os.environ.get("ENGINERY_POOLS", "")
    if not path:
        return Pools()
    try:
        said = yaml.safe_load(_text(path)) or {}
        merged = {
            name: {**(_DEFAULTS.get(name) or Place()).model_dump(), **(place or {})}
            for name, place in (said.get("stages") or {}).items()
        }
        pools = Pools.model_validate({**said, "stages": merged})
    except OSError as error:
        raise StageError(f"the pools' settings {path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValidationError, AttributeError, TypeError) as error:
        raise StageError(f"the pools' settings {path} are not understood: {error}") from error
    if unknown := sorted(set(pools.stages) - set(STAGES)):
        raise StageError(
            f"{path} places stages that are not there", measured=", ".join(unknown), limit=", ".join(STAGES)
        )
    return pools


def _text(path: str) -> str:
    if not path.startswith("s3://"):
        return Path(path).read_text(encoding="utf-8")
    from stages.adapters.s3.client import fetch_object, parse

    with TemporaryDirectory() as folder:
        fetch_object(*parse(path), Path(folder, "pools.yaml"), lambda _: None)
        return Path(folder, "pools.yaml").read_text(encoding="utf-8")


def judging_gpu(settings: Settings) -> str:
    """The architecture of the GPU where a run's artifacts are measured, empty for none.

    Raises:
        StageError: the pools' settings cannot be read.
    """
    return load_pools().gpu() if settings.launcher == "pool" else gpu_architecture()


def devices(settings: Settings) -> Callable[[str, str], str]:
    """(stage, target) -> the device it is where a run's steps compute, empty where that is this machine's."""
    return load_pools().device if settings.launcher == "pool" else lambda _stage, _target: ""
