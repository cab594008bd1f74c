"""A proxy on loopback that breaks long answers off, as bad networks do."""

from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit


class CuttingProxy:
    """Passes requests on to `endpoint`; of an answer's body only the first `after_bytes` arrive."""

    def __init__(self, endpoint: str, after_bytes: int) -> None:
        self.ranges: list[str] = []
        self.sent: list[int] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def relay(self) -> None:
                upstream = http.client.HTTPConnection(urlsplit(endpoint).netloc)
                headers = {name: value for name, value in self.headers.items()}
                upstream.request(self.command, self.path, headers=headers)
                answer = upstream.getresponse()
                data = answer.read()
                if self.command == "GET":
                    proxy.ranges.append(self.headers.get("Range", ""))
                    proxy.sent.append(min(len(data), after_bytes))
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[:after_bytes])
                if len(data) > after_bytes:
                    self.close_connection = True
                upstream.close()

            do_GET = do_HEAD = relay

            def log_message(self, *_: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> CuttingProxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
