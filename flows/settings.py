"""How a run is run, as opposed to what it makes: the store, workers, threads, and where libraries keep their files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

from stages.adapters.connect import connect, default_store
from stages.runtime.artifacts import Store
from stages.runtime.contract import StageError

Launcher = Literal["process", "inline", "pool"]
_POOL_JOBS = 16
"""Steps that wait for their containers at once."""
LOCAL_SHARDS = "threads:"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that changes a run and none of its artifacts.

    Attributes:
        store: folder or s3:// URI where artifacts are sealed.
        jobs: steps that run at once.
        threads: threads of computation a step may use.
        output: folder for copies of the final artifacts, None for none.
        from_step: make this step and all that read it again.
        force: names of steps to make again.
        launcher: `process` runs each step in a child of its own, `inline` in this process, `pool` in the containers
            of Prefect's work pools.
        shards: where the parts of a step that can be divided are computed at once: `threads:N` for N parts on this
            machine, the address of a Dask scheduler, or empty for a step that does it all by itself.
    """

    store: str
    jobs: int = 1
    threads: int = 1
    output: Path | None = None
    from_step: str | None = None
    force: frozenset[str] = field(default_factory=frozenset)
    launcher: Launcher = "process"
    shards: str = ""

    def connect(self, *, reading: bool = False) -> Store:
        """Open the store; with `reading` nothing is made or written."""
        return connect(self.store, reading=reading)

    @property
    def scratch(self) -> Path:
        """The folder on this machine for drafts, records and databases."""
        return self.connect().scratch


def settle(
    *,
    store: str | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    launcher: str | None = None,
    shards: str | None = None,
) -> Settings:
    """Settings from what was asked, the environment and this machine; what one run is asked besides stays as it is.

    By default one step computes at a time, on all cores; with `pool`, where others compute, as many as wait.

    Raises:
        StageError: a count below one, or a launcher or shards that are not there.
    """
    launcher = _launcher(launcher or os.environ.get("ENGINERY_LAUNCHER") or "process")
    jobs = (_POOL_JOBS if launcher == "pool" else 1) if jobs is None else jobs
    if threads is None:
        threads = _count("ENGINERY_THREADS") or (cores() if launcher == "pool" else max(1, cores() // max(1, jobs)))
    for name, count in (("--jobs", jobs), ("--threads", threads)):
        if count < 1:
            raise StageError(f"{name} is a count", measured=count, limit="1 or more")
    return Settings(
        store=store or default_store(),
        jobs=jobs,
        threads=threads,
        launcher=launcher,
        shards=_shards(os.environ.get("ENGINERY_SHARDS", "") if shards is None else shards),
    )


def cores() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shards(where: str) -> str:
    if where and not re.fullmatch(rf"{LOCAL_SHARDS}[1-9]\d*|(tcp|tls|ucx|wss?)://\S+", where):
        raise StageError(
            "parts of a step cannot be computed there",
            measured=where,
            limit=f"{LOCAL_SHARDS}N, the address of a Dask scheduler such as tcp://dask:8786, or empty",
            remedy="Change $ENGINERY_SHARDS.",
        )
    return where


def _launcher(name: str) -> Launcher:
    for known in get_args(Launcher):
        if name == known:
            break
    else:
        raise StageError(f"there is no launcher {name!r}", limit=", ".join(get_args(Launcher)))
    if name == "pool" and not os.environ.get("PREFECT_API_URL"):
        raise StageError(
            "the launcher `pool` needs a Prefect server", remedy="Set PREFECT_API_URL, or leave --launcher out."
        )
    return cast(Launcher, name)


def _count(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    if text and not text.isdigit():
        raise StageError(f"${variable} is a count", measured=text, limit="1 or more")
    return int(text) if text else None


def environment(scratch: Path) -> Mapping[str, str]:
    """What libraries need to know, wherever the user said nothing: their files go below `scratch`, never into HOME.

    A HOME that may not be written to, or none at all, is common in containers and on shared machines.
    """
    homes = {
        "PREFECT_HOME": "prefect",
        "MPLCONFIGDIR": "matplotlib",
        "HF_HOME": "huggingface",
        "TORCH_HOME": "torch",
        "TORCHINDUCTOR_CACHE_DIR": "torch/inductor",
        "XDG_CACHE_HOME": "cache",
    }
    quiet = {
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Its client sleeps 2, 4, 8, ... s between tries, without a limit: `flows.prefect_api.retry` has the patience.
        "PREFECT_CLIENT_MAX_RETRIES": "3",
        "PREFECT_API_REQUEST_TIMEOUT": "30",
        # Prefect's shortest, and what the automation for lost runs counts on.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        # Its log lines go to Prefect's page; the terminal has ours.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {
        "MLFLOW_TRACKING_URI": f"sqlite:///{scratch / 'mlflow.db'}",
        **{name: str(scratch / folder) for name, folder in homes.items()},
        **quiet,
    }


def enter(settings: Settings) -> Path:
    """Set the environment's defaults for this process and its children; returns the scratch folder.

    It must run before mlflow, prefect, transformers or matplotlib are imported: they read it once.
    """
    scratch = settings.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    for name, value in environment(scratch).items():
        os.environ.setdefault(name, value)
    return scratch
