"""However a child is ended: native code, what it started and what it says hold up nobody."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flows.running import child_process
from flows.running.child_process import Launcher
from flows.running.order import Order
from flows.running.process_group import GRACE_S
from stages.runtime.contract import DoesNotFit, Interrupted, StageError
from stages.runtime.execute import work_of
from stages.runtime.fingerprint import ROOT, fingerprint
from stages.runtime.progress import Silent
from tests.flows.running.made_up_stages import FILLING, LINES, MADE_UP, STAGE, MadeUpParams, known, runs

pytestmark = pytest.mark.fault
SLACK_S = 5.0


def ordered(folder, do, name="one"):
    params = MadeUpParams(do=do, name=name, mark=str(folder / name))
    return Order(step=name, stage=STAGE, params=params, work=work_of(MADE_UP, params, {}))


@pytest.fixture
def launcher(store, tmp_path, monkeypatch):
    known(tmp_path, monkeypatch)
    return Launcher(store, "process", 1, tmp_path / "logs")


def appeared(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.02)
    return path


def pids(folder, name="one"):
    return [int(pid) for pid in appeared(folder / name).read_text().split()]


def gone(*numbers, within=SLACK_S):
    deadline = time.monotonic() + within
    while left := [pid for pid in numbers if runs(pid)]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.02)
    return True


class Holding(Silent):
    """Told when the stage sits in native code."""

    def __init__(self):
        self.holds = threading.Event()

    def note(self, text):
        self.holds.set()


def in_thread(launcher, order):
    errors, heard = [], Holding()

    def run():
        try:
            launcher.run(order, heard)
        except StageError as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert heard.holds.wait(60)
    time.sleep(0.3)  # from its word into the native call
    return thread, errors


def test_stage_in_native_code_beyond_its_limit_is_dead_within_the_grace_with_what_it_started(launcher, tmp_path):
    launcher.minutes = 6 / 60
    began = time.monotonic()
    with pytest.raises(DoesNotFit, match="longer than it may"):
        launcher.run(ordered(tmp_path, "hold"), Silent())
    assert time.monotonic() - began < 6 + GRACE_S + SLACK_S
    assert gone(*pids(tmp_path), within=1)


def test_stop_of_several_in_native_code_ends_all_at_once_and_what_they_started(launcher, store, tmp_path):
    orders = [ordered(tmp_path, "hold", name) for name in ("one", "two", "three")]
    threads = [in_thread(launcher, order) for order in orders]
    numbers = [pid for order in orders for pid in pids(tmp_path, order.step)]
    assert len({os.getsid(pid) for pid in numbers} - {os.getsid(0)}) == 3, "a terminal's signal reaches none of them"
    began = time.monotonic()
    launcher.stop()
    assert time.monotonic() - began < 2 * GRACE_S, "one after the other"
    assert gone(*numbers, within=1)
    for thread, errors in threads:
        thread.join(SLACK_S)
        assert isinstance(errors[0], Interrupted)
    assert store.manifest(fingerprint(orders[0].work)) is None


def test_stop_now_cuts_short_the_grace_of_a_stop_that_goes_on(launcher, tmp_path):
    thread, errors = in_thread(launcher, ordered(tmp_path, "hold"))
    first = threading.Thread(target=launcher.stop)
    first.start()
    time.sleep(0.2)
    assert all(map(runs, pids(tmp_path))) and first.is_alive()
    began = time.monotonic()
    launcher.stop(now=True)
    first.join(SLACK_S)
    assert time.monotonic() - began < GRACE_S / 2
    assert gone(*pids(tmp_path), within=1)
    thread.join(SLACK_S)
    assert isinstance(errors[0], Interrupted)


def test_interrupt_while_listening_ends_the_child_and_passes(launcher, tmp_path):
    class Interrupting(Silent):
        def note(self, text):
            time.sleep(0.3)  # from its word into the native call
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launcher.run(ordered(tmp_path, "hold"), Interrupting())
    assert gone(*pids(tmp_path), within=1)
    assert not launcher._running


def test_child_that_dies_takes_along_what_it_started(launcher, tmp_path):
    with pytest.raises(StageError, match="exit code 7"):
        launcher.run(ordered(tmp_path, "die"), Silent())
    assert gone(*pids(tmp_path), within=1)


def test_child_that_sealed_and_does_not_fold_up_is_ended_and_its_artifact_stands(launcher, tmp_path, monkeypatch):
    monkeypatch.setattr(child_process, "_TEARDOWN_S", 0.5)
    made = launcher.run(ordered(tmp_path, "stay"), Silent())
    assert made.manifest.metrics == {"letters": 7.0}
    assert gone(*pids(tmp_path), within=1)


def test_listener_that_does_not_return_stalls_no_stage_and_misses_nothing_but_steps_of_the_bar(launcher, tmp_path):
    class Slow(Silent):
        def __init__(self):
            self.notes, self.metrics, self.advances, self.threads = [], [], [], set()

        def note(self, text):
            if not self.notes:
                appeared(tmp_path / "one.said")
            self.notes.append(text)
            self.threads.add(threading.get_ident())

        def metric(self, name, value, step):
            self.metrics.append((name, value, step))

        def advanced(self, done, total):
            self.advances.append((done, total))

    slow = Slow()
    made = launcher.run(ordered(tmp_path, "talk"), slow)
    assert made.manifest.metrics == {"letters": 7.0}
    assert sum(map(len, slow.notes)) > 4 * 65536, "more than a pipe holds"
    assert slow.notes == [f"{line} {FILLING}" for line in range(LINES)]
    assert slow.metrics == [("loss", float(line), line) for line in range(LINES)]
    assert slow.advances[-1] == (LINES, LINES) and slow.advances == sorted(slow.advances)
    assert len(slow.advances) < 2 * LINES, "of two in a row one is told"
    assert slow.threads == {threading.get_ident()}


def test_line_that_is_no_event_is_an_error_that_names_it(launcher, tmp_path):
    with pytest.raises(StageError, match="no event") as told:
        launcher.run(ordered(tmp_path, "gabble"), Silent())
    assert told.value.measured == "'Segmentation fault, it says'"
    assert gone(*pids(tmp_path), within=1)


PARENT = """
import sys
from pathlib import Path
from flows.running.child_process import Launcher
from stages.adapters.connect import connect
from stages.runtime.progress import Silent
from tests.flows.running.test_process_group import ordered
folder = Path(sys.argv[1])
Launcher(connect(str(folder / "store")), "process", 1, folder / "logs").run(ordered(folder, "hold"), Silent())
"""


def test_parent_that_is_killed_leaves_neither_child_in_native_code_nor_what_that_started(tmp_path, monkeypatch):
    known(tmp_path, monkeypatch)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env={**os.environ, "PYTHONPATH": path})
    child, beside = pids(tmp_path)
    time.sleep(0.5)  # until it sits in native code
    guard = [one for one in Path("/proc").glob("[0-9]*/stat") if f" {child} {child} {child} " in one.read_text()]
    parent.kill()
    parent.wait()
    assert gone(child, beside)
    assert gone(*[int(one.parent.name) for one in guard]), "nor its guard"
