"""The most memory that a stage has taken."""

from __future__ import annotations

from pathlib import Path

_beside: list[int] = []
"""Peaks of processes that the stage has started."""


def tell_peak_beside(size_bytes: int) -> None:
    """A process that the stage started has taken so much while it waited: nobody else can tell that apart."""
    _beside.append(size_bytes)


def reset_peak_rss() -> None:
    """From here on a new peak is measured."""
    _beside.clear()
    # Writing 5 resets VmHWM (proc_pid_clear_refs(5)); without it an inline step would report an earlier step's peak.
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_rss_bytes() -> int:
    """Largest resident set since the stage began, of this process and the largest that it told of beside it."""
    return _own_peak_rss_bytes() + max(_beside, default=0)


def _own_peak_rss_bytes() -> int:
    """VmHWM, since ru_maxrss survives exec."""
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else ():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
