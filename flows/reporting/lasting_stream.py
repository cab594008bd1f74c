"""A terminal that may be closed while a run goes on: what is written to it then is lost, and nothing breaks."""

from __future__ import annotations

from contextlib import suppress
from typing import TextIO


class LastingStream:
    """A text stream whose other side may go."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:
        """The stream's."""
        return self._stream.encoding

    def write(self, text: str) -> int:
        """Write; a closed terminal or pipe takes nothing and says nothing."""
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Send what was written, if anybody is there."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Whether it is, or was, a terminal."""
        return not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        """The stream's descriptor."""
        return self._stream.fileno()
