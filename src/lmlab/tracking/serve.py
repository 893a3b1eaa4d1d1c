"""The page of all runs, served to this machine: made anew at each load, with the runs' pages and text files behind it.

It listens on 127.0.0.1 alone and only reads. A page of another site must not read it through the browser either: a Host
that is not this machine's own name is refused (a name of theirs may be pointed at 127.0.0.1: DNS rebinding), and answers
may be used by no other origin. Files are served by kind, from below the root alone; hidden ones, what a link leads out
to, weights and everything unknown are not there. The one script that runs is that of our pages: a page that came with
others' runs could read all that is served here, and tell it by going elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import urllib.parse
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lmlab.records import UserError
from lmlab.tracking import compare, report
from lmlab.tracking.index import INDEX, render
from lmlab.tracking.pages import Shell
from lmlab.tracking.results import entries_of
from lmlab.tracking.runs import Reader, Runs

HOST = "127.0.0.1"
NAMES = frozenset({"127.0.0.1", "localhost"})
"""Hosts that a request may name, with any port: behind an ssh tunnel it is another one."""
KINDS = {
    **dict.fromkeys((".txt", ".log", ".yaml", ".jsonl", ".csv", ".md"), "text/plain; charset=utf-8"),
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
}
"""Endings of the files that are served -> their media type."""
_POLICY = f"{Shell(live=True).policy}; img-src data: 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
_REPORT = "report.html"


class Server(ThreadingHTTPServer):
    """Serves the runs below ``root``; port 0 takes a free one (``server_address`` says which).

    Raises:
        UserError: ``root`` is no directory, or the port cannot be used.
    """

    daemon_threads = True

    def __init__(self, root: Path, port: int) -> None:
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise UserError(
                "no such directory", where=str(root), fix="give the folder of the runs, e.g. outputs"
            )
        if not 0 <= port < 1 << 16:
            raise UserError(f"{port} is no port", where="--port", fix="0 (any that is free) to 65535")
        self.making = threading.Lock()
        self._reader, self._made = Reader(self.root), (Runs(self.root), "")
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            what = f"port {port} cannot be used: {error.strerror}"
            raise UserError(
                what, where="--port", fix="choose another one, or 0 for any that is free"
            ) from error

    def page(self) -> str:
        """The page of all runs as they stand now."""
        with self.making:
            runs = self._reader.read()
            if not self._made[1] or runs != self._made[0]:
                self._made = (runs, render(runs, live=True))
            return self._made[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing where the client broke the line off: browsers do."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where the page of all runs is."""
        return f"http://{HOST}:{self.server_address[1]}/"


def serve(root: Path, *, port: int) -> int:
    """Serve until Ctrl-C; the exit code."""
    with Server(root, port) as server:
        print(f"runs: {server.url} (on this machine only; Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nended", file=sys.stderr)
    return 130


class _Handler(BaseHTTPRequestHandler):
    """One request. Only what is below the root is read, and nothing is written."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "lmlab", ""
    timeout = 30

    def do_GET(self) -> None:
        """The page of all runs, a run's page, or a file."""
        if not self._host_is_ours():
            return self._refuse(
                HTTPStatus.MISDIRECTED_REQUEST, "this server answers to 127.0.0.1 and localhost"
            )
        try:
            parts = self._parts()
            if parts in ([], [INDEX]):
                return self._page(self.server.page())
            if parts is None or (path := self._inside(parts)) is None:
                return self._refuse(HTTPStatus.NOT_FOUND, "nothing is served under this name")
            if path.name == _REPORT and (page := self._fresh(path)) is not None:
                return self._page(page)
            return self._file(path)
        except (ConnectionError, TimeoutError):  # they are gone
            self.close_connection = True

    do_HEAD = do_GET

    def _no(self) -> None:
        self.close_connection = True
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "this server only reads", Allow="GET, HEAD")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _no

    # --- what is asked for ----------------------------------------------------------------------------------------

    def _host_is_ours(self) -> bool:
        hosts = self.headers.get_all("Host") or []
        name, _, port = hosts[0].strip().lower().partition(":") if len(hosts) == 1 else ("", "", "")
        return name in NAMES and (not port or (port.isdecimal() and port.isascii()))

    def _parts(self) -> list[str] | None:
        """The path's parts; None if any of them is hidden, leads up, or is no name."""
        path = self.path.partition("?")[0].partition("#")[0]
        if not path.startswith("/"):
            return None
        parts = [urllib.parse.unquote(part, errors="surrogateescape") for part in path[1:].split("/")]
        if parts == [""]:
            return []
        bad = any(not part or part.startswith(".") or set(part) & set("/\\\0:") for part in parts)
        return None if bad else parts

    def _inside(self, parts: list[str]) -> Path | None:
        """The file, if it is of a known kind and really lies below the root, unhidden; it need not be there."""
        path = self.server.root.joinpath(*parts)
        try:
            real = path.resolve()
        except (OSError, RuntimeError, ValueError):
            return None
        if not real.is_relative_to(self.server.root):
            return None
        hidden = any(part.startswith(".") for part in real.relative_to(self.server.root).parts)
        known = real.suffix.lower() in KINDS and path.suffix.lower() in KINDS
        return real if known and not hidden else None

    # --- what is answered -----------------------------------------------------------------------------------------

    def _fresh(self, path: Path) -> str | None:
        """A run's or a sweep's page made now, where the one on disk is older than what it is made from or not there."""
        folder = path.parent
        source = folder / ("metrics.jsonl" if report.is_run(folder) else "results.csv")
        try:
            if path.is_file() and path.stat().st_mtime >= source.stat().st_mtime:
                return None
            with self.server.making:  # matplotlib's settings are the process's
                if report.is_run(folder):
                    return report.render(report.read_run(folder))
                return compare.render(entries_of(folder), title=folder.name, folder=folder)
        except (OSError, UserError):
            return None

    def _page(self, page: str) -> None:
        body = page.encode("utf-8", errors="backslashreplace")
        tag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
        if self.headers.get("If-None-Match") == tag:
            return self._head(HTTPStatus.NOT_MODIFIED, 0, KINDS[".html"], ETag=tag)
        self._head(HTTPStatus.OK, len(body), KINDS[".html"], ETag=tag)
        if self.command != "HEAD":
            self.wfile.write(body)
        return None

    def _file(self, path: Path) -> None:
        try:
            # A pipe would be waited for without end.
            file = open(path, "rb") if path.is_file() else None  # noqa: SIM115
        except OSError:
            file = None
        if file is None:
            return self._refuse(HTTPStatus.NOT_FOUND, "nothing is served under this name")
        with file:
            size = os.fstat(file.fileno()).st_size
            self._head(HTTPStatus.OK, size, KINDS[path.suffix.lower()])
            if self.command != "HEAD":
                part = _Part(file, size)
                while piece := part.read(PIECE):
                    self.wfile.write(piece)
                if part.left:  # it was cut meanwhile: the client must not wait for the rest
                    self.close_connection = True
        return None

    def _refuse(self, status: HTTPStatus, why: str, **headers: str) -> None:
        body = f"{status.value} {status.phrase}: {why}\n".encode()
        self._head(status, len(body), "text/plain; charset=utf-8", **headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: HTTPStatus, size: int, kind: str, **headers: str) -> None:
        self.send_response(status)
        told = {"Content-Type": kind, "Content-Length": str(size), "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
                "Content-Security-Policy": _POLICY, "Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer"}  # fmt: skip
        for name, value in (told | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is the user's."""


PIECE = 1 << 16


class _Part:
    """The first ``size`` bytes of a file that may grow while it is sent."""

    def __init__(self, file: Any, size: int) -> None:
        self._file, self.left = file, size

    def read(self, amount: int) -> bytes:
        """At most ``amount`` bytes more."""
        piece = self._file.read(min(amount, self.left))
        self.left -= len(piece)
        return piece
