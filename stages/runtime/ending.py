"""The end of a process that has loaded large libraries."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """End as `sys.exit` does, but for taking apart what is loaded: of torch or MLflow that takes a third of a second.

    Threads are waited for, what was registered for the end runs, and what was written is flushed; where that fails, as
    on a full disk, it is said and the code is not 0.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # tells pools of threads to end, and waits for them
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads any more
        code = code or 1
    except OSError as error:
        with suppress(OSError, ValueError):
            sys.stderr.write(f"error: what was said could not be written: {error.strerror}\n")
        code = code or 1
    except ValueError:  # closed before
        pass
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)
