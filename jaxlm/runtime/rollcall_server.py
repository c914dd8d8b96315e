"""Process 0's side of the roll call: it hears who is there, compares what they agree on, and tells all how it goes.

Messages are JSON objects, one a line, with a key "say". A process says `here` (who it is and what it runs), `step` (the
update it has sent to its devices), `at` (it waits at a barrier), `failed` (it can't go on) or `bye` (it is done).
Process 0 says `go` (all have come and agree), `on` (all are at a barrier), `end` (the run is over, and why) or `bye`
(it is done).
"""

import contextlib
import errno
import json
import os
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

MAX_MESSAGE_BYTES = 1 << 20
REFUSAL_SECONDS = 10.0  # a refusal waits so long for processes which come late, so that they hear of it too
FAILURE_SECONDS = 1.0  # a failure waits so long until it is told: another process's death may have been its cause


@dataclass
class Connection:
    """A connection is what process 0 knows of one process."""

    socket: socket.socket
    unread: bytes = b""
    index: int = -1  # until it has said who it is
    host: str = ""
    agreed: dict[str, str] = field(default_factory=dict)
    """Values that must be the same on all processes, by name."""

    def __str__(self) -> str:
        return f"process {self.index} ({self.host})"

    def send(self, **message: Any) -> None:
        """Sends a message, unless the connection has ended: then reading from it says so."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")


@dataclass
class _Failure:
    connection: Connection
    reason: str
    status: int
    at: float


class Server(threading.Thread):
    """The server is a thread of process 0 that serves the connections of all processes.

    It has `seconds` to call the roll of `count` processes. `steps` are the last updates that processes have sent.
    """

    def __init__(self, listener: socket.socket, count: int, seconds: float):
        super().__init__(name="roll call", daemon=True)
        self.steps: dict[int, int] = {}
        self._listener, self._count, self._seconds = listener, count, seconds
        self._deadline = time.monotonic() + seconds
        self._connections: dict[int, Connection] = {}
        self._barriers: dict[str, tuple[set[int], float, float]] = {}
        """Barriers by name: (who waits there, deadline, seconds that the first one allowed)."""
        self._fault, self._fault_at = "", 0.0
        self._failure: _Failure | None = None
        self._complete, self._over = False, False
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        os.register_at_fork(after_in_child=self.close_sockets)

    def run(self) -> None:
        """Serves until the run is over."""
        while not self._over:
            for key, _ in self._selector.select(0.05):
                if key.data is None:
                    self._accept()
                else:
                    self._receive(key.data)
            self._watch(time.monotonic())

    def announce_leaving(self) -> None:
        """Tells all that process 0 is done, so that they need not watch it any more."""
        self._broadcast(say="bye")
        self._over = True

    def close_sockets(self) -> None:
        """Closes every connection; in a forked worker too, which must not hold them open beyond this process's end."""
        self._over = True
        for connection in list(self._connections.values()):
            connection.socket.close()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            accepted, _ = self._listener.accept()
            configure_socket(accepted)
            self._selector.register(accepted, selectors.EVENT_READ, Connection(accepted))

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.socket.recv(1 << 16)
        except OSError:
            data = b""
        connection.unread += data
        *messages, connection.unread = connection.unread.split(b"\n")
        try:
            for text in messages:
                self._process_message(connection, json.loads(text))
            valid = bool(data) and len(connection.unread) < MAX_MESSAGE_BYTES
        except (ValueError, KeyError, TypeError):  # not a process of ours
            valid = False
        if not valid:
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()
        if self._connections.get(connection.index) is connection:
            del self._connections[connection.index]
            if self._complete:
                self._end(f"{connection} has died", 1, connection.index)

    def _process_message(self, connection: Connection, message: dict) -> None:
        say = message["say"]
        if say == "here":
            connection.index, connection.host, connection.agreed = message["index"], message["host"], message["agreed"]
            other = self._connections.setdefault(connection.index, connection)
            if other is not connection:
                self._fault = self._fault or (
                    f"{other.host} and {connection.host} both call themselves process {connection.index}: "
                    "number each differently"
                )
                connection.send(say="end", reason=self._fault, status=2, by=-1)
        elif connection.index < 0:
            raise ValueError("who is it?")
        elif say == "step":
            self.steps[connection.index] = message["step"]
        elif say == "at":
            waiting, *limits = self._barriers.get(message["place"]) or (
                set(), time.monotonic() + message["seconds"], message["seconds"])  # fmt: skip
            self._barriers[message["place"]] = (waiting | {connection.index}, *limits)
        elif say == "failed" and self._failure is None:
            self._failure = _Failure(connection, message["reason"], message["status"], time.monotonic())
        elif say == "bye":
            self._connections.pop(connection.index, None)

    def _watch(self, now: float) -> None:
        if not self._complete:
            self._call_roll(now)
            return
        for place, (waiting, deadline, seconds) in list(self._barriers.items()):
            if len(waiting) == self._count:
                del self._barriers[place]
                self._broadcast(say="on", place=place)
            elif now > deadline:
                missing = [str(connection) for i, connection in sorted(self._connections.items()) if i not in waiting]
                missing = missing or [f"process {i}, which has ended," for i in range(self._count) if i not in waiting]
                self._end(f"{few(missing)} did not come to {place.partition('#')[0]!r} within {seconds:g} s", 1)
        if self._failure and now > self._failure.at + FAILURE_SECONDS:
            failure = self._failure
            self._end(f"{failure.connection} ended: {failure.reason}", failure.status, failure.connection.index)

    def _call_roll(self, now: float) -> None:
        """Ends the roll call if all have come and agree, or if they don't and time is up."""
        self._fault = self._fault or self._difference()
        self._fault_at = self._fault_at or (now if self._fault else 0.0)
        present = {i: connection for i, connection in self._connections.items() if 0 <= i < self._count}
        complete = len(present) == self._count
        if self._fault and (complete or now > min(self._fault_at + REFUSAL_SECONDS, self._deadline)):
            self._end(self._fault, 2)
        elif complete:
            self._selector.unregister(self._listener)
            self._listener.close()  # JAX listens here from now on
            self._complete = True
            self._broadcast(say="go", hosts=[present[i].host for i in range(self._count)])
        elif now > self._deadline:
            missing = ", ".join(str(i) for i in range(self._count) if i not in present)
            arrived = few([f"{i} ({connection.host})" for i, connection in sorted(present.items())])
            self._end(
                f"{self._count - len(present)} of {self._count} processes did not come within {self._seconds:g} s: "
                f"{missing}; here: {arrived}; look for their own messages, or raise JAXLM_START_SECONDS", 1
            )  # fmt: skip

    def _difference(self) -> str:
        """Returns the first name whose value differs between two processes, with who has what; empty if all agree."""
        if len(self._connections) < 2:
            return ""
        first, *others = [connection for _, connection in sorted(self._connections.items())]
        for connection in others:
            names = [*first.agreed, *(n for n in connection.agreed if n not in first.agreed)]
            differing = [n for n in names if first.agreed.get(n) != connection.agreed.get(n)]
            if differing:
                name, others_differ = differing[0], f" (and {len(differing) - 1} fields more)" if differing[1:] else ""
                mine, theirs = (x.agreed.get(name, "not there") for x in (first, connection))
                return (
                    f"{name} is {mine} on {first} and {theirs} on {connection}{others_differ}: "
                    "start all with the same config, overrides and packages"
                )
        return ""

    def _end(self, reason: str, status: int, by: int = -1) -> None:
        self._broadcast(say="end", reason=reason, status=status, by=by)
        self._over = True
        if not self._complete:
            self._listener.close()

    def _broadcast(self, **message: Any) -> None:
        """Sends a message to all, process 0 last: once it hears that all is over it ends, and this thread with it."""
        for connection in sorted(self._connections.values(), key=lambda c: c.index, reverse=True):
            connection.send(**message)


def listen(address: str) -> socket.socket:
    """Returns a socket that listens for the processes at the port of HOST:PORT. Raises ValueError if it is taken."""
    host, _, port = address.rpartition(":")
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0].strip("[]")
    interfaces = [bind] if bind else ["127.0.0.1"] if _is_loopback(host) else ["::", "0.0.0.0"]
    for i, interface in enumerate(interfaces):
        both = interface == "::" and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if ":" in interface else socket.AF_INET
        try:
            return socket.create_server((interface, int(port)), family=family, dualstack_ipv6=both, backlog=4096)
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and i + 1 < len(interfaces):
                continue  # a machine without IPv6
            raise ValueError(
                f"processes: process 0 can't listen at {interface} port {port} ({error.strerror}): "
                "set JAX_COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT to what is free there"
            ) from None
    raise AssertionError


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "localhost"


def configure_socket(connection: socket.socket) -> None:
    """Sets options by which a host that vanishes without a word is noticed within a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 60_000)):
        if hasattr(socket, name):  # not every system has each of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def few(names: list[str]) -> str:
    """Returns the first eight names and how many more there are, as text."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
