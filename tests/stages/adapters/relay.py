"""A relay on loopback that counts what passes, slows it down, and can go away in the middle."""

from __future__ import annotations

import socket
import threading
import time
from types import TracebackType
from urllib.parse import urlsplit


class Relay:
    """Passes bytes on to `endpoint`; after `until_bytes` both ways together, no server answers any more."""

    def __init__(self, endpoint: str, *, until_bytes: float = float("inf"), bytes_per_s: float = float("inf")) -> None:
        where = urlsplit(endpoint)
        self._to = (where.hostname, where.port)
        self._until, self._rate = until_bytes, bytes_per_s
        self._door = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self.sent = self.answered = 0
        self.url = f"http://127.0.0.1:{self._door.getsockname()[1]}"

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._door.accept()
                far = socket.create_connection(self._to)
            except OSError:
                return
            self._open += [near, far]
            threading.Thread(target=self._pass, args=(near, far, "sent"), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, "answered"), daemon=True).start()

    def _pass(self, here: socket.socket, there: socket.socket, counter: str) -> None:
        try:
            while data := here.recv(1 << 16):
                with self._lock:
                    setattr(self, counter, getattr(self, counter) + len(data))
                    time.sleep(len(data) / self._rate)
                    if self.sent + self.answered > self._until:
                        self._end()
                        return
                there.sendall(data)
            there.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def _end(self) -> None:
        # Closing a socket does not wake a thread that waits on it; shutting it down does.
        for one in (self._door, *self._open):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
            finally:
                one.close()
