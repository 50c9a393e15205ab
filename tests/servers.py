"""Servers on 127.0.0.1 for tests: a web server that can be told to misbehave, and a proxy that does so by itself."""

from __future__ import annotations

import http.client
import random
import re
import socket
import threading
import time
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
    `secret`: what the address must hold behind a question mark, else the answer is 403.
    `statuses`: one taken by each GET in turn, instead of an answer.
    """

    files: dict[str, bytes]
    ranges: str = "answered"
    says_length: bool = True
    is_chunked: bool = False
    secret: str = ""
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


FAULTS = ("500", "503", "hang", "cut", "short")


@dataclass
class FaultyProxy:
    """A proxy before another server. Of the GETs of objects (and of no listing) it spoils a `share`, by `chance`.

    `500`, `503`: an answer of that status; `hang`: none for `hang_s`; `cut`: half the body, then the connection ends;
    `short`: half the body, said to be all of it. Keys that contain `always` get a 503 every time.
    """

    target: str
    share: float
    chance: random.Random
    hang_s: float = 3.0
    always: str = "\0"
    done: list[str] = field(default_factory=list)
    url: str = ""

    def fault(self, method: str, path: str) -> str:
        key = path.partition("?")[0].strip("/")
        if method != "GET" or "/" not in key:
            return ""
        if self.always in key:
            return "503"
        fault = self.chance.choice(FAULTS) if self.chance.random() < self.share else ""
        self.done.append(fault)
        return fault


@contextmanager
def faulty(proxy: FaultyProxy) -> Iterator[FaultyProxy]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _proxy_handler(proxy))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


def _proxy_handler(proxy: FaultyProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy.fault(self.command, self.path)
            if fault == "hang":
                time.sleep(proxy.hang_s)
                self.close_connection = True
                return
            if fault.isdigit():
                status, headers, answer = int(fault), [], b""
            else:
                host = proxy.target.removeprefix("http://")
                connection = http.client.HTTPConnection(host, timeout=60)
                connection.request(self.command, self.path, body, dict(self.headers.items()))
                response = connection.getresponse()
                status, headers, answer = response.status, response.getheaders(), response.read()
                connection.close()
            length = len(answer)
            if self.command == "HEAD":
                length = int(dict(headers).get("Content-Length") or 0)
            if fault in ("cut", "short"):
                answer = answer[: length // 2]
                length = len(answer) if fault == "short" else length
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "connection", "transfer-encoding", "server", "date"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer)
            self.close_connection = self.close_connection or fault == "cut"

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):
                super().handle()

    return Handler


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
            if site.secret not in self.path.partition("?")[2]:
                return self._refuse(403)
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
