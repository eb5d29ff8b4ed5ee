"""A page that follows runs while they go on, served to this machine alone."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from beit3_dist.opening import one_line
from beit3_dist.reports.page import Shown, contents, page

HOST = "127.0.0.1"
EVERY_S = 2.0
"""Seconds between looks into the run folders."""

log = logging.getLogger(__name__)


class Following:
    """Reads the runs again and again, in a thread of its own."""

    def __init__(self, runs: Sequence[Shown], plugins: Sequence[str]) -> None:
        self._runs, self._plugins = runs, plugins
        self._version, self._lock = 0, threading.Lock()
        self._told: set[str] = set()
        self._tell()

    def _tell(self) -> None:
        shown = contents(self._runs, live=True) | {"version": f"{self._version + 1}"}
        answer = page(shown), json.dumps(shown, allow_nan=False).encode()
        with self._lock:
            self._version += 1
            self._page, self._data = answer

    @property
    def page(self) -> bytes:
        """The page as of now."""
        with self._lock:
            return self._page.encode()

    def data(self, version: str) -> bytes | None:
        """What the page shows now; None where `version` is that."""
        with self._lock:
            return None if version == str(self._version) else self._data

    def follow(self, ending: threading.Event) -> None:
        """Until the end. What cannot be read is said once, and the page goes on with what it has."""
        while not ending.wait(EVERY_S):
            try:
                if any([run.read() for run in self._runs]):  # each reads
                    self._tell()
                if any([run.look(self._plugins) for run in self._runs]):
                    self._tell()
            except Exception as error:  # in a thread, of which nobody would see that it has ended
                words = one_line(error) if isinstance(error, (ValueError, OSError)) else f"{error!r}"
                if words not in self._told:
                    self._told.add(words)
                    log.warning("%s", words)


@contextmanager
def server_of(
    runs: Sequence[Shown], plugins: Sequence[str], port: int, ending: threading.Event
) -> Iterator[ThreadingHTTPServer]:
    """A server of the page, which follows the runs until `ending`. Raises ValueError where the port cannot be had."""
    following = Following(runs, plugins)
    try:
        opened = _Server((HOST, port), _Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port {port}: {error}: name another one, or 0 for any that is free") from error
    with opened as server:
        server.following = following
        follower = threading.Thread(target=following.follow, args=(ending,), daemon=True)
        follower.start()
        try:
            yield server
        finally:
            ending.set()
            follower.join(timeout=5)


def serve(runs: Sequence[Shown], plugins: Sequence[str], port: int) -> None:
    """Serves the page until Ctrl-C. Raises ValueError where the port cannot be had."""
    with server_of(runs, plugins, port, threading.Event()) as server:
        number = f"{len(runs)} run{'s' * (len(runs) > 1)}"
        print(f"http://{HOST}:{server.server_port}/ follows {number}; Ctrl-C ends it", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    following: Following

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing of a browser that has gone before its answer was whole."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:  # noqa: N802 (the library's name)
        """The page, or what it shows now."""
        # A page of another origin may have its name lead here: it shall not read what runs hold.
        names = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
        if self.headers.get("Host") not in names:
            return self._answer(403, "text/plain", b"this page is for this machine alone\n")
        url = urlsplit(self.path)
        if url.path == "/":
            return self._answer(200, "text/html; charset=utf-8", self.server.following.page)
        if url.path == "/data":
            data = self.server.following.data(parse_qs(url.query).get("version", [""])[0])
            return self._answer(204 if data is None else 200, "application/json", data or b"")
        return self._answer(404, "text/plain", b"there is only the page at /\n")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the library's name)
        """Nothing: requests come every other second."""
