import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from stages.runtime.ending import end_process
pool = ThreadPoolExecutor(1)
pool.submit(lambda: (time.sleep(0.3), print("from a thread")))
atexit.register(lambda: print("at the end"))
print("first")
end_process(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 3])
def test_process_ends_with_its_code_after_threads_and_what_was_registered(code):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(code)], capture_output=True, text=True, check=False)
    assert done.returncode == code and not done.stderr
    assert done.stdout.splitlines() == ["first", "from a thread", "at the end"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_said_and_no_success():
    command, plain = [sys.executable, "-c", PROGRAM, "0"], {"PYTHONPATH": str(Path.cwd())}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=plain)
    assert done.returncode == 1 and "could not be written: No space left" in done.stderr
