"""`enginery serve` in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(model: str | Path, *options: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server that is ready, and its process, which ends with the block."""
    words = [sys.executable, "-m", "flows", "serve", str(model), "--port", "0", *map(str, options)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        try:
            said = child.stdout.readline()
            found = re.search(r"http://\S+:\d+(?=/v1)", said)
            assert found, said + child.stdout.read()
            yield found[0], child
        finally:
            child.terminate()
            child.wait(30)
