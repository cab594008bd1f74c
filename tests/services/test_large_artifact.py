"""An artifact of some gigabytes through a real S3 server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stages.adapters.s3.multipart import PART_BYTES
from tests.services.killing import kill_at, random_file, there_and_back

SIZE = int(float(os.environ.get("ENGINERY_TEST_ARTIFACT_GB", "3")) * 1e9)
PEAK_RSS_BYTES = 500e6


@pytest.mark.service
def test_artifact_of_gigabytes_survives_kills_on_both_ways_in_bounded_memory(s3_root: str, tmp_path: Path) -> None:
    random_file(tmp_path / "draft" / "weights", SIZE, os.urandom(PART_BYTES // 4 - 1))
    up, down = there_and_back(s3_root, tmp_path, PART_BYTES, kill_at(0.4, SIZE))
    assert up.kept >= 0.4 * SIZE and up.took["sent"] <= SIZE - up.kept
    assert down.kept >= 0.4 * SIZE and down.took["got"] == SIZE - down.kept
    for half, verb in ((up, "uploading"), (down, "downloading")):
        assert half.took["peak_rss_bytes"] < PEAK_RSS_BYTES
        assert half.took["notes"][0].startswith(f"{verb} {SIZE / 1e9:.1f} GB ")
        assert half.took["points"] == [[SIZE, SIZE]]
