"""The manifests with secrets beside them."""

from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.infra.manifests import KUBERNETES, kustomize


@pytest.fixture(scope="session")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifests with secrets beside them."""
    copied = tmp_path_factory.mktemp("infra") / "kubernetes"
    shutil.copytree(KUBERNETES, copied, ignore=shutil.ignore_patterns("secrets/*.env"))
    subprocess.run(["sh", copied / "secrets" / "generate"], check=True, timeout=10)
    return copied


@pytest.fixture(scope="session")
def secrets(copied: Path) -> dict[str, dict[str, str]]:
    """Secret -> key -> value."""
    built = yaml.safe_load_all(kustomize(copied / "secrets"))
    return {one["metadata"]["name"]: {k: base64.b64decode(v).decode() for k, v in one["data"].items()} for one in built}
