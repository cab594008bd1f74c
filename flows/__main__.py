"""The way in: `python -m flows` is the `enginery` command. It listens for Ctrl-C before anything is loaded."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn

from flows.running import interruption


def command() -> NoReturn:
    """Run the command and end the process with its exit code."""
    with interruption.handled():
        try:
            from flows.cli import main
            from stages.runtime.ending import end_process

            code = main()
        # Before anything had begun. Python makes another error of an interrupt where a class is being made.
        except BaseException:
            if not interruption.asked():
                raise
            interruption.unwinding()
            interruption.say()
            code = interruption.CODE
        if code == interruption.CODE:
            # Python would wait for every thread that still waits for something, and nothing that they do counts now.
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(code)
    end_process(code)


if __name__ == "__main__":
    command()
