"""Serves the board: a page and what it shows, to whoever may read it, and changes nothing."""

import gzip
import hashlib
import hmac
import http.server
import ipaddress
import json
import secrets
import socket
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlm.core import errors
from jaxlm.training.board import single_file
from jaxlm.training.board.runs import Runs
from jaxlm.training.log_table import AXES

PORT = 8011
TYPES = {".js": "text/javascript", ".css": "text/css", ".txt": "text/plain"}
FILES = (*single_file.SCRIPTS, *single_file.STYLES, single_file.LICENCE)
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # it is kept, but asked for with its tag
    "Vary": "Cookie, Accept-Encoding",
}
COOKIE = "jaxlm_board"
IDLE = 30.0
"""Seconds after which a connection that says nothing is closed."""
LONGEST_QUERY = 4096


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Server(http.server.ThreadingHTTPServer):
    """A Server answers requests for the runs of a folder, each in a thread of its own.

    Where it is bound to more than this machine, or `token` is given, every request needs the token: once in the
    address, from where a cookie takes it, or as a bearer token.
    """

    daemon_threads = True

    def __init__(self, runs: Runs, host: str = "127.0.0.1", port: int = PORT, token: str = "") -> None:
        """`port` 0: any that is free. ValueError: the address can't be had."""
        self.runs, self.host = runs, host
        self.token = token or ("" if is_loopback(host) else secrets.token_urlsafe(24))
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            why = errors.of_system(error) if isinstance(error, OSError) else str(error)
            raise ValueError(f"--host {host} --port {port}: {why}; --port 0 takes any that is free") from None

    @property
    def address(self) -> str:
        """Returns the address to open in a browser."""
        everywhere = self.host in ("", "0.0.0.0", "::")
        name = socket.gethostname() if everywhere else f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.server_port}/" + (f"?token={self.token}" if self.token else "")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that went away; other faults are shown."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Refused(Exception):
    """A request is refused with a status and a line."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


class Handler(http.server.BaseHTTPRequestHandler):
    """A Handler answers one connection's requests. All of them are GET: what they name is looked up among what is
    there, and never made a path of."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "jaxlm", ""
    timeout = IDLE

    def do_GET(self) -> None:
        """Answers a request."""
        try:
            self._answer()
        except Refused as error:
            self._send(error.status, f"{error}\n".encode(), "text/plain; charset=utf-8")

    def _answer(self) -> None:
        if len(self.path) > LONGEST_QUERY:
            raise Refused(414, "the address is too long")
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise Refused(400, "a request has no body here")
        address = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(address.query)
        one = lambda name: query.get(name, [""])[0]  # noqa: E731
        self._check_host()
        if self._admit(one("token")):
            return
        if address.path == "/":
            self._send(200, single_file.served().encode(), "text/html; charset=utf-8")
        elif address.path.startswith("/page/") and (name := address.path.removeprefix("/page/")) in FILES:
            self._send(200, (single_file.PAGE / name).read_bytes(), f"{TYPES[Path(name).suffix]}; charset=utf-8")
        elif address.path == "/api/runs":
            self._json(lambda: {"root": self.server.runs.root.name, "runs": self.server.runs.list()})
        elif address.path == "/api/run":
            self._json(lambda: self.server.runs.view(one("run"), one("since")))
        elif address.path == "/api/zoom" and one("axis") in AXES:
            low, high = _number(one("low")), _number(one("high"))
            self._json(lambda: self.server.runs.zoom(one("run"), one("axis"), low, high))
        else:
            raise Refused(404, "there is nothing here")

    def _check_host(self) -> None:
        """Refuses names of this machine that aren't its own where it is asked for without a token: a page of another
        site could have its name lead here."""
        name = urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        if not self.server.token and not is_loopback(name):
            raise Refused(421, "this board answers to 127.0.0.1 and localhost alone")

    def _admit(self, given: str) -> bool:
        """Lets who has the token pass; from an address it is taken into a cookie, and the address without it is
        answered with. Returns whether the request is answered."""
        token = self.server.token
        if not token:
            return False
        name = f"{COOKIE}_{self.server.server_port}"
        cookies = dict(part.strip().partition("=")[::2] for part in self.headers.get("Cookie", "").split(";"))
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if any(hmac.compare_digest(x.encode(), token.encode()) for x in (cookies.get(name, ""), bearer)):
            return False
        if not hmac.compare_digest(given.encode(), token.encode()):
            raise Refused(401, "this board needs its token: open the address that it printed when it was started")
        self._send(303, b"", "text/plain", {"Location": "/",
                   "Set-Cookie": f"{name}={token}; HttpOnly; SameSite=Strict; Path=/"})  # fmt: skip
        return True

    def _json(self, make: Callable[[], dict[str, Any]]) -> None:
        try:
            values = make()
        except KeyError:
            raise Refused(404, "there is no such run") from None
        text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        self._send(200, text.encode(), "application/json; charset=utf-8")

    def _send(self, status: int, body: bytes, kind: str, more: dict[str, str] | None = None) -> None:
        tag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
        if status == 200 and self.headers.get("If-None-Match") == tag:
            status, body = 304, b""
        headers = HEADERS | {"Content-Type": kind, "ETag": tag} | (more or {})
        if len(body) > 1024 and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, 1, mtime=0)
            headers["Content-Encoding"] = "gzip"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuses what is no GET, or no request at all."""
        self.close_connection = True
        body = b"GET is all that this board answers\n"
        self.send_response(405 if code == 501 else code)
        for name, value in (HEADERS | {"Allow": "GET", "Connection": "close"}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Logs no request: a page asks every few seconds."""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise Refused(400, "low and high are numbers") from None
