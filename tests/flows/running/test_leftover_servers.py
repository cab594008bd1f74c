"""Servers that lost their run are ended; all others live on."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from flows.running.leftover_servers import end_orphaned_servers

SLEEPS = "import os, time; os.close(1); time.sleep(60)"


def server(home, *, ephemeral="1"):
    """A process that looks like a temporary server; its number."""
    env = {"PATH": os.environ["PATH"], "PREFECT_HOME": home, "PREFECT__SERVER_EPHEMERAL": ephemeral}
    command = [sys.executable, "-S", "-c", SLEEPS, "prefect.server.api.server:create_app"]
    starter = "import os, sys; sys.argv.pop(0); pid = os.fork(); pid or os.execv(sys.argv[0], sys.argv); print(pid)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", starter, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return int(done.stdout)


@pytest.fixture
def ended():
    started = []
    yield started
    for pid in started:
        if psutil.pid_exists(pid):
            psutil.Process(pid).kill()


def gone(pid):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_orphans_only_lost_temporary_servers_of_this_home_end(tmp_path, ended):
    home = str(tmp_path)
    lost = server(home)
    others = [server(home + "2"), server(home, ephemeral="")]
    ended += [lost, *others]
    assert end_orphaned_servers(home) == 1
    assert gone(lost)
    assert all(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in others)
    assert end_orphaned_servers(home) == 0
