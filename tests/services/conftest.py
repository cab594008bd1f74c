"""The S3 server of the adapters' tests, for what is too large for them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.stages.adapters.conftest import s3_endpoint, s3_root

__all__ = ["s3_endpoint", "s3_root"]


@pytest.fixture(scope="session", autouse=True)
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give the disk back after the server has ended: pytest keeps the folders of three sessions."""
    yield
    shutil.rmtree(tmp_path_factory.getbasetemp(), ignore_errors=True)
