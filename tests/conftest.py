"""Fixtures that every room's tests share."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from stages import stage
from stages.runtime.artifacts import Store
from stages.runtime.execute import Outcome, execute, work_of
from stages.runtime.progress import Silent
from stages.runtime.stores import LocalObjects
from tests.cases.day import third

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A test is no clock: what takes how long is `make bench`'s, and machines are busy.
hypothesis.settings.register_profile("enginery", deadline=None)
hypothesis.settings.load_profile("enginery")

Seal = Callable[..., Outcome]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What asks for a real Prefect server is of the fault slice: one takes ten seconds to begin, and answers late.

    Where that slice is asked for, the files stay that the day has.
    """
    for item in items:
        if "prefect_api" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.fault)
    if config.option.markexpr != "fault":
        return  # what is of another slice, too, runs in that
    files = third(sorted({item.path for item in items if item.get_closest_marker("fault")}))
    later = [item for item in items if item.get_closest_marker("fault") and item.path not in files]
    if later:
        config.hook.pytest_deselected(items=later)
        items[:] = [item for item in items if item not in later]


def pytest_collection_finish() -> None:
    """Coverage does not look into torch's exporter: millions of calls, none of them ours, and thrice the time."""
    if sys.gettrace() is None or "torch" not in sys.modules:
        return
    import torch.onnx

    export = torch.onnx.export

    @functools.wraps(export)
    def untraced(*given: Any, **named: Any) -> Any:
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            return export(*given, **named)
        finally:
            sys.settrace(trace)

    torch.onnx.export = untraced


@pytest.fixture(scope="session")
def tiny() -> Path:
    """A tiny trained Llama (6 blocks, hidden 64, 768 tokens) in Hugging Face layout; read only."""
    from tests.tiny import tiny_llama

    return tiny_llama(cached_models())


@pytest.fixture(scope="session")
def knowing() -> Path:
    """A tiny Llama that knows some facts, with a beginning of text and a chat template; read only."""
    from tests.knowing import knowing_llama

    return knowing_llama(cached_models())


def cached_models() -> Path:
    """Where models stay that are trained once."""
    cache = Path(os.environ.get("ENGINERY_TEST_CACHE", Path(__file__).parents[1] / ".pytest_cache" / "models"))
    cache.mkdir(parents=True, exist_ok=True)
    return cache


@pytest.fixture(scope="session")
def reference() -> str:
    """English reference prose, 465 kB."""
    from tests.tiny import reference_text

    return reference_text()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty local store."""
    return Store(LocalObjects(tmp_path / "store"), tmp_path / "scratch")


@pytest.fixture
def seal(store: Store) -> Seal:
    """Run a stage inline: seal("share", {"method": "tie"}, model=fingerprint) -> Outcome."""
    return sealer(store)


def sealer(store: Store) -> Seal:
    """The function behind the `seal` fixture, for fixtures of a wider scope."""

    def run(name: str, params: Mapping[str, Any], **inputs: str) -> Outcome:
        from stages.adapters.connect import pins

        definition = stage(name)
        made = definition.params.model_validate(dict(params))
        if definition.pin:
            made = definition.pin(made, pins(store), Silent())
        return execute(definition, made, work_of(definition, made, inputs), store, Silent(), step=name)

    return run


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One store for a whole test session, for artifacts that are costly to make."""
    root = tmp_path_factory.mktemp("shared")
    return Store(LocalObjects(root / "store"), root / "scratch")


@pytest.fixture(scope="session")
def dense(shared_store: Store, tiny: Path) -> str:
    """Fingerprint of the tiny Llama, fetched into `shared_store`."""
    return sealer(shared_store)("fetch", {"source": tiny.as_uri()}).identity


@pytest.fixture(scope="session")
def topics(shared_store: Store) -> str:
    """Fingerprint of the reference prose as a corpus in `shared_store`."""
    splits = {"calibrate": 0.1, "train": 0.7, "validate": 0.1, "test": 0.1}
    return sealer(shared_store)("corpus", {"source": "pydoc://topics", "splits": splits}).identity
