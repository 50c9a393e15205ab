"""Servers on 127.0.0.1 for tests: a web server that can be told to misbehave."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What a web server holds and how it behaves; changed by tests while it runs.

    `ranges`: answered with 206, `ignored`, or `refused` by the header `Accept-Ranges: none`.
    `cuts`: one number taken by each GET in turn: bytes of the body after which the connection is closed; None is whole.
    `is_chunked`: sends the body in one chunk, which a cut leaves incomplete.
    `statuses`: one taken by each GET in turn, instead of an answer.
    """

    files: dict[str, bytes]
    ranges: str = "answered"
    says_length: bool = True
    is_chunked: bool = False
    cuts: list[int | None] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    def gets(self) -> list[str | None]:
        """The `Range` of each GET so far."""
        return [range_ for method, range_ in self.requests if method == "GET"]


@contextmanager
def serve(site: Site) -> Iterator[Site]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(site))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()


def closed_url() -> str:
    """The address of a port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer("HEAD")

        def do_GET(self) -> None:
            self._answer("GET")

        def _answer(self, method: str) -> None:
            asked = self.headers.get("Range")
            site.requests.append((method, asked))
            if method == "GET" and site.statuses:
                return self._refuse(site.statuses.pop(0))
            body = site.files.get(self.path.partition("?")[0])
            if body is None:
                return self._refuse(404)
            total, status, content_range = len(body), 200, None
            if asked and site.ranges == "answered":
                first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", asked).groups()
                start = int(first) if first else max(0, total - int(last))
                end = min(int(last) + 1, total) if first and last else total
                if start >= total:
                    return self._refuse(416, f"bytes */{total}")
                body, status, content_range = body[start:end], 206, f"bytes {start}-{end - 1}/{total}"
            self.send_response(status)
            if site.is_chunked:
                self.send_header("Transfer-Encoding", "chunked")
                body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            elif site.says_length:
                self.send_header("Content-Length", str(len(body)))
            if content_range:
                self.send_header("Content-Range", content_range)
            if site.ranges != "ignored":
                self.send_header("Accept-Ranges", "none" if site.ranges == "refused" else "bytes")
            self.end_headers()
            if method == "GET":
                cut = site.cuts.pop(0) if site.cuts else None
                self.wfile.write(body[:cut])
            return None

        def _refuse(self, status: int, content_range: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # a client that has read enough
                super().handle()

    return Handler
