"""What the kernel says of memory: the limit of this container, its peak, and how many processes it killed.

Control groups, version 2 and version 1; outside a container, the machine.
"""

from __future__ import annotations

import os
from pathlib import Path

_GROUPS = (
    # version 2: (limit, peak, events)
    ("memory.max", "memory.peak", "memory.events"),
    # version 1
    ("memory/memory.limit_in_bytes", "memory/memory.max_usage_in_bytes", "memory/memory.oom_control"),
)
_ROOT = Path("/sys/fs/cgroup")


def memory_limit_bytes(root: Path = _ROOT) -> int:
    """The memory that processes here may use together."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(found for limit, _, _ in _GROUPS if (found := _number(root / limit)))])


def memory_peak_bytes(root: Path = _ROOT) -> int:
    """The most that processes of this container used together; 0 where the kernel does not say."""
    return max(_number(root / peak) for _, peak, _ in _GROUPS)


def out_of_memory_kills(root: Path = _ROOT, vmstat: Path = Path("/proc/vmstat")) -> int:
    """Processes killed so far because memory ran out: in this container where that is counted, else on the machine."""
    for _, _, events in _GROUPS:
        if (found := _oom_kills(root / events)) is not None:
            return found
    return _oom_kills(vmstat) or 0


def _oom_kills(path: Path) -> int | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == ["oom_kill"]), None)


def _number(path: Path) -> int:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0
