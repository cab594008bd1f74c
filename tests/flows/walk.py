"""The command with a listener on every call: in which order a run enters the rooms of `flows`.

python -m tests.flows.walk OUT.json run ... does what `enginery run ...` does, and writes to OUT.json the rooms in the
order of their first entry, and what of `recipe` was called after `pipeline` had been entered. What runs while a module
is imported enters no room.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import FrameType

from flows.cli import main


class Walk:
    """What a profiler's hook keeps."""

    def __init__(self) -> None:
        self.rooms: list[str] = []
        self.late: list[str] = []

    def hear(self, frame: FrameType, event: str, _what: object) -> None:
        """See sys.setprofile."""
        if event != "call":
            return
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith("flows.") or name.count(".") < 2:
            return
        room = name.split(".")[1]
        seen = room in self.rooms
        if (seen and not (room == "recipe" and "pipeline" in self.rooms)) or importing(frame):
            return
        if seen:
            self.late.append(f"{name}.{frame.f_code.co_name}")
        else:
            self.rooms.append(room)


def importing(frame: FrameType | None) -> bool:
    """Whether a call comes from a module's own body."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") != "__main__":
            return True
        frame = frame.f_back
    return False


if __name__ == "__main__":
    walk = Walk()
    threading.setprofile(walk.hear)
    sys.setprofile(walk.hear)
    try:
        code = main(sys.argv[2:])
    finally:
        sys.setprofile(None)
        Path(sys.argv[1]).write_text(json.dumps({"rooms": walk.rooms, "late": walk.late}), encoding="utf-8")
    sys.exit(code)
