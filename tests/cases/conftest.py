"""What `make cases` says besides: which cases the day has, and how many passed and failed as the last line."""

from __future__ import annotations

import os

import pytest

from tests.cases.day import ASKED, today


def pytest_configure(config: pytest.Config) -> None:
    """Settle the day before worker processes begin."""
    today()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The last words; a case that fails twice, in itself and in cleaning up, has failed once."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or config.option.markexpr != "case" or hasattr(config, "workerinput"):
        return
    seen = {kind: {one.nodeid for one in reporter.stats.get(kind, ())} for kind in ("passed", "failed", "error")}
    failed = seen["failed"] | seen["error"]
    if os.environ.get(ASKED) == "third":
        cases = [node for node in seen["passed"] | failed if "test_cases.py" in node]
        names = sorted(node.rpartition("[")[2][:2] for node in cases)
        reporter.write_line(f"the third of day {today()}: {', '.join(names)}")
    reporter.write_line(f"{len(seen['passed'] - failed)} passed, {len(failed)} failed")
