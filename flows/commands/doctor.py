"""What this machine has of what the product can use: one line each, ok or missing with the remedy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from flows.settings import Settings
from stages.runtime.contract import Image, StageError
from stages.runtime.fingerprint import LIBRARIES, constraints

LEAST_FREE_BYTES = 10e9
"""A run on a model of some hundred million parameters keeps about this much."""


@dataclass(frozen=True)
class Line:
    """One thing looked for.

    Attributes:
        needed: without it nothing runs; the rest only widens what can be done.
    """

    name: str
    ok: bool
    text: str
    remedy: str = ""
    needed: bool = False


def diagnose(settings: Settings) -> Iterator[Line]:
    """Look at everything, cheapest first."""
    yield _python()
    yield _machine()
    yield from _store(settings)
    yield _versions()
    yield _onnxruntime()
    yield _gpu()
    yield _module(
        "tensorrt_rtx", "pip install the tensorrt-rtx of constraints.txt; without it no plan can be compiled."
    )
    yield _module("tensorrt", "Optional: NVIDIA's tensorrt, for targets that tensorrt_rtx has not, such as sm_90.")
    yield _docker()
    yield _service("MLflow tracking", os.environ.get("MLFLOW_TRACKING_URI", ""), "/health", "MLFLOW_TRACKING_URI")
    yield _service("Prefect", os.environ.get("PREFECT_API_URL", ""), "/health", "PREFECT_API_URL")
    yield from _aliases(settings)


def _python() -> Line:
    return Line("Python", True, platform.python_version(), needed=True)


def _machine() -> Line:
    memory = psutil.virtual_memory()
    text = f"{os.cpu_count()} cores, {memory.total / 1e9:.1f} GB memory, {memory.available / 1e9:.1f} GB available"
    return Line("processor and memory", True, text)


def _store(settings: Settings) -> Iterator[Line]:
    try:
        store = settings.connect()
        store.scratch.mkdir(parents=True, exist_ok=True)
    except (StageError, OSError) as error:
        yield Line("store", False, str(error), "Name another with --store or $ENGINERY_STORE.", needed=True)
        return
    yield Line("store", True, store.uri, needed=True)
    free = shutil.disk_usage(store.scratch).free
    enough = free >= LEAST_FREE_BYTES
    remedy = "" if enough else "Free space, run `enginery sweep`, or name a store on another disk."
    yield Line("disk", enough, f"{free / 1e9:.1f} GB free for {store.scratch}", remedy)


def _aliases(settings: Settings) -> Iterator[Line]:
    """Aliases that stand elsewhere than the journal says; MLflow is opened only where something was promoted."""
    from flows.registry.journal import models

    try:
        store = settings.connect()
        names = models(store.objects)
        if not names:
            return
        from flows.registry import projection
        from flows.tracking.connect import open_tracking

        found = projection.Registry(store.objects, open_tracking(store.scratch))
        moved = [one for name in names for one in projection.drift(found, name)]
        refused = [line for name in names for line in projection.refused(found.objects, name)]
    except StageError as error:
        yield Line("aliases", False, str(error), "Mend the store or MLflow, then look again.")
        return
    said = [
        f"{one.model}@{one.alias} is on {one.found or 'nothing'}, the journal says {one.journal or 'nothing'}"
        for one in moved
    ]
    remedy = "`enginery reconcile` puts them back." if moved else ""
    yield Line("aliases", not moved, "; ".join([*said, *refused]) or "where the promotion journal says", remedy)


def _versions() -> Line:
    pinned = constraints()
    wanted = {name for image in Image for name in LIBRARIES[image]} | {"prefect", "mlflow", "pydantic"}
    wrong = []
    for name in sorted(wanted & pinned.keys()):
        found = _version(name)
        if found.split("+")[0] != pinned[name].split("+")[0]:
            wrong.append(f"{name} {found} instead of {pinned[name]}")
    remedy = "Install the versions of constraints.txt, e.g. with `make install`." if wrong else ""
    text = "; ".join(wrong) or f"{len(wanted & pinned.keys())} libraries as in constraints.txt"
    return Line("versions", not wrong, text, remedy, needed=True)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _onnxruntime() -> Line:
    found = _version("onnxruntime")
    return Line(
        "onnxruntime", found != "absent", found, "" if found != "absent" else "Run `make install`.", needed=True
    )


def _gpu() -> Line:
    said = _said(["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader"])
    if said is None:
        return Line("GPU", False, "none that nvidia-smi knows", "Engines compile here all the same; a GPU judges them.")
    return Line("GPU", True, "; ".join(said.splitlines()))


def _module(name: str, remedy: str) -> Line:
    """Import in a child: a vendor's library that fails to load can take the process with it."""
    said = _said([sys.executable, "-c", f"import {name}; print({name}.__version__); {name}.Builder"])
    return Line(name, said is not None, said or "cannot be imported", "" if said else remedy)


def _docker() -> Line:
    if not shutil.which("docker"):
        return Line("Docker", False, "no docker command", "Optional: install Docker to run steps in containers.")
    said = _said(["docker", "version", "--format", "{{.Server.Version}}"])
    remedy = "Optional: start the Docker engine, and let this user reach it."
    return Line("Docker", said is not None, said or "the engine does not answer", "" if said else remedy)


def _said(command: list[str]) -> str | None:
    """Standard output of a command, None when it is absent, fails or says nothing within a minute."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


def _service(name: str, uri: str, path: str, variable: str) -> Line:
    if not uri:
        return Line(name, True, f"embedded; set {variable} for a server")
    if not uri.startswith(("http://", "https://")):
        return Line(name, True, f"embedded: {uri}")
    try:
        with urllib.request.urlopen(uri.rstrip("/") + path, timeout=10) as answer:  # noqa: S310 - http(s), checked above
            return Line(name, answer.status == 200, f"{uri} answers {answer.status}")
    except (urllib.error.URLError, OSError) as error:
        return Line(name, False, f"{uri}: {error}", f"Start it, or unset {variable} for the embedded one.", needed=True)
