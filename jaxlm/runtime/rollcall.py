"""A line from every process to process 0, over which they call the roll, wait for each other, and learn who has gone.

JAX has a service of its own for this, but where a process never comes it aborts the others without a word about whom
they waited for, and that one has died it finds after a hundred seconds. Here process 0 listens at the coordinator's
address first; when all have come and agree it gives the port to JAX and keeps the connections. The end of a connection
is the end of its process, and the kernel tells of it within milliseconds.

Messages are JSON objects, one a line, with the key "say".
"""

import contextlib
import errno
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from jaxlm.runtime.launchers import Place

LONGEST = 1 << 20  # bytes of a message
STAY = 10.0  # seconds that a refusal waits for processes which come late, so that they hear of it too
TICK = 1.0  # seconds between a process's words about where it is
GRACE = 1.0  # seconds between a process's failure and telling of it: another's death may have been its cause


class ProcessError(RuntimeError):
    """Another process is missing, has died or is too late; says which."""


@dataclass
class _Line:
    """A process as process 0 knows it."""

    socket: socket.socket
    text: bytes = b""
    index: int = -1  # until it has said who it is
    host: str = ""
    agreed: dict[str, str] = field(default_factory=dict)
    step: int = -1

    def __str__(self) -> str:
        return f"process {self.index} ({self.host})"

    def tell(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # its end will be read
            self.socket.sendall(json.dumps(message).encode() + b"\n")


@dataclass
class _Failure:
    by: _Line
    reason: str
    status: int
    at: float


class Desk(threading.Thread):
    """Process 0's end of all lines."""

    def __init__(self, listener: socket.socket, count: int, seconds: float):
        super().__init__(name="roll call", daemon=True)
        self.steps: dict[int, int] = {}
        self._listener, self._count, self._seconds = listener, count, seconds
        self._until = time.monotonic() + seconds
        self._lines: dict[int, _Line] = {}
        self._places: dict[str, tuple[set[int], float, float]] = {}  # barrier: who is there, until when, its limit
        self._fault, self._fault_at = "", 0.0
        self._failure: _Failure | None = None
        self._going, self._over = False, False
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        os.register_at_fork(after_in_child=self.shut)

    def run(self) -> None:
        while not self._over:
            for key, _ in self._selector.select(0.05):
                if key.data is None:
                    self._accept()
                else:
                    self._hear(key.data)
            self._watch(time.monotonic())

    def close(self) -> None:
        """Process 0 is done: nobody need watch it any more."""
        self._tell(say="bye")
        self._over = True

    def shut(self) -> None:
        """Close every line; in a forked worker too, which must not hold them open beyond this process's end."""
        self._over = True
        for line in list(self._lines.values()):
            line.socket.close()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            accepted, _ = self._listener.accept()
            _prepare(accepted)
            self._selector.register(accepted, selectors.EVENT_READ, _Line(accepted))

    def _hear(self, line: _Line) -> None:
        try:
            data = line.socket.recv(1 << 16)
        except OSError:
            data = b""
        line.text += data
        *whole, line.text = line.text.split(b"\n")
        try:
            for text in whole:
                self._take(line, json.loads(text))
            fine = bool(data) and len(line.text) < LONGEST
        except (ValueError, KeyError, TypeError):  # not one of ours
            fine = False
        if not fine:
            self._drop(line)

    def _drop(self, line: _Line) -> None:
        self._selector.unregister(line.socket)
        line.socket.close()
        if self._lines.get(line.index) is line:
            del self._lines[line.index]
            if self._going:
                self._end(f"{line} has died", 1, line.index)

    def _take(self, line: _Line, message: dict) -> None:
        say = message["say"]
        if say == "here":
            line.index, line.host, line.agreed = message["index"], message["host"], message["agreed"]
            other = self._lines.setdefault(line.index, line)
            if other is not line:
                self._fault = self._fault or (
                    f"{other.host} and {line.host} both call themselves process {line.index}: number each differently"
                )
                line.tell(say="end", reason=self._fault, status=2, by=-1)
        elif line.index < 0:
            raise ValueError("who is it?")
        elif say == "step":
            self.steps[line.index] = message["step"]
        elif say == "at":
            there, *rest = self._places.get(message["place"]) or (
                set(), time.monotonic() + message["seconds"], message["seconds"])  # fmt: skip
            self._places[message["place"]] = (there | {line.index}, *rest)
        elif say == "failed" and self._failure is None:
            self._failure = _Failure(line, message["reason"], message["status"], time.monotonic())
        elif say == "bye":
            self._lines.pop(line.index, None)

    def _watch(self, now: float) -> None:
        if not self._going:
            self._call(now)
            return
        for place, (there, until, limit) in list(self._places.items()):
            if len(there) == self._count:
                del self._places[place]
                self._tell(say="on", place=place)
            elif now > until:
                missing = [str(line) for i, line in sorted(self._lines.items()) if i not in there]
                missing = missing or [f"process {i}, which has ended," for i in range(self._count) if i not in there]
                self._end(f"{few(missing)} did not come to {place.partition('#')[0]!r} within {limit:g} s", 1)
        if self._failure and now > self._failure.at + GRACE:
            failure = self._failure
            self._end(f"{failure.by} ended: {failure.reason}", failure.status, failure.by.index)

    def _call(self, now: float) -> None:
        """Who is here, and do they agree?"""
        self._fault = self._fault or self._difference()
        self._fault_at = self._fault_at or (now if self._fault else 0.0)
        here = {i: line for i, line in self._lines.items() if 0 <= i < self._count}
        complete = len(here) == self._count
        if self._fault and (complete or now > min(self._fault_at + STAY, self._until)):
            self._end(self._fault, 2)
        elif complete:
            self._selector.unregister(self._listener)
            self._listener.close()  # JAX listens here from now on
            self._going = True
            self._tell(say="go", hosts=[here[i].host for i in range(self._count)])
        elif now > self._until:
            missing = ", ".join(str(i) for i in range(self._count) if i not in here)
            there = few([f"{i} ({line.host})" for i, line in sorted(here.items())])
            self._end(
                f"{self._count - len(here)} of {self._count} processes did not come within {self._seconds:g} s: "
                f"{missing}; here: {there}; look for their own messages, or raise JAXLM_START_SECONDS", 1
            )  # fmt: skip

    def _difference(self) -> str:
        """The first field in which two processes differ, with who has what."""
        if len(self._lines) < 2:
            return ""
        first, *others = [line for _, line in sorted(self._lines.items())]
        for line in others:
            names = [*first.agreed, *(n for n in line.agreed if n not in first.agreed)]
            differing = [n for n in names if first.agreed.get(n) != line.agreed.get(n)]
            if differing:
                name, more = differing[0], f" (and {len(differing) - 1} fields more)" if differing[1:] else ""
                mine, theirs = (x.agreed.get(name, "not there") for x in (first, line))
                return (
                    f"{name} is {mine} on {first} and {theirs} on {line}{more}: "
                    "start all with the same config, overrides and packages"
                )
        return ""

    def _end(self, reason: str, status: int, by: int = -1) -> None:
        self._tell(say="end", reason=reason, status=status, by=by)
        self._over = True
        if not self._going:
            self._listener.close()

    def _tell(self, **message: Any) -> None:
        """Process 0 last: once it knows that all is over it ends, and this thread with it."""
        for line in sorted(self._lines.values(), key=lambda line: line.index, reverse=True):
            line.tell(**message)


class Roll:
    """This process's line. Made when all have come and agree; raises ValueError (refused) or ProcessError (missing).

    agreed: what must be the same on all processes, by name. end: called with a reason and an exit status, in a thread,
    when the run can't go on because of another process; by default it says so and exits.
    """

    def __init__(
        self, place: Place, agreed: Mapping[str, Any], seconds: float, end: Callable[[str, int], Any] | None = None
    ):
        self.place, self.last_words = place, ""
        self._end = end or self._exit
        self._lock, self._news = threading.Lock(), threading.Condition()
        self._passed: set[str] = set()
        self._visits: dict[str, int] = {}
        self.at, self._told = -1, -1
        self.left = False
        self._failed_here = threading.Event()
        self._text = b""
        self.desk = None
        if place.index == 0:
            listener = _listen(place.address)
            self.desk = Desk(listener, place.count, seconds)
            self.desk.start()
            # Its own name may lead through another door, or not be known yet.
            host, port = listener.getsockname()[:2]
            self.hosts = self._join("127.0.0.1" if host in ("::", "0.0.0.0") else host, port, agreed, seconds)
        else:
            host, _, port = place.address.rpartition(":")
            self.hosts = self._join(host.strip("[]"), int(port), agreed, seconds)
        self._socket.settimeout(TICK)
        os.register_at_fork(after_in_child=self._socket.close)
        threading.Thread(target=self._listen, name="roll", daemon=True).start()

    def _join(self, host: str, port: int, agreed: Mapping[str, Any], seconds: float) -> list[str]:
        """Say who this is until process 0 has heard all; gives their hosts."""
        hello = {"say": "here", "index": self.place.index, "host": socket.gethostname(),
                 "agreed": {name: repr(value) for name, value in agreed.items()}}  # fmt: skip
        until, why = time.monotonic() + seconds, "no answer"
        while (left := until - time.monotonic()) > 0:
            try:
                self._socket = socket.create_connection((host, port), min(left, 10))
                _prepare(self._socket)
                self._socket.settimeout(left + STAY + 10)  # process 0 has its own limit, and says whom it misses
                self._say(**hello)
                if (answer := self._read()).startswith(b'{"say":'):
                    return self._answered(json.loads(answer))
                why = "something else answers there, or it ended"
                self._socket.close()
            except OSError as error:
                why = error.strerror or str(error)
            time.sleep(min(0.2, max(0.0, until - time.monotonic())))
        raise ProcessError(
            f"processes: process 0 is not to be reached at {self.place.address} within {seconds:g} s ({why}): "
            f"this is process {self.place.index} of {self.place.count}, by {self.place.found}"
        )

    def _answered(self, answer: dict) -> list[str]:
        if answer["say"] == "end":
            self._socket.close()
            raise (ValueError if answer["status"] == 2 else ProcessError)(f"processes: {answer['reason']}")
        return answer["hosts"]

    # ---- after the roll

    def step(self, number: int) -> None:
        """This process has sent update `number` to its devices: where it is if the run gets stuck."""
        self.at = number

    def barrier(self, place: str, seconds: float) -> None:
        """Until all processes are at `place`. Some not within `seconds` of the first: all end."""
        with self._news:
            self._visits[place] = visit = self._visits.get(place, 0) + 1
            name = f"{place}#{visit}"
            self._say(say="at", place=name, seconds=seconds)
            self._news.wait_for(lambda: name in self._passed or self.left, seconds + 30)
            if name not in self._passed:
                raise ProcessError(f"process 0 ({self.hosts[0]}) does not answer at {place!r}")
            self._passed.discard(name)

    def fail(self, reason: str, status: int) -> None:
        """Tell the others that this process can't go on, and why. Returns when they know, unless another's death comes
        to light as the cause: then `end` is called instead."""
        self._say(say="failed", reason=reason, status=status)
        self._failed_here.wait(GRACE + 5)

    def leave(self) -> None:
        """This process is done, in good order."""
        if not self.left:
            self.left = True
            self._say(say="bye")
            if self.desk:
                self.desk.close()

    def close(self) -> None:
        """As the end of this process would."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self.desk:
            self.desk.join(5)
            self.desk.shut()

    def _listen(self) -> None:
        while True:
            try:
                text = self._read()
            except OSError:
                text = b""
            if self.left:
                return
            if not text:
                self._end(f"process 0 ({self.hosts[0]}) has died", 1)
                return
            message = json.loads(text)
            if message["say"] == "on":
                with self._news:
                    self._passed.add(message["place"])
                    self._news.notify_all()
            elif message["say"] == "bye":
                self.left = True
                return
            elif message["say"] == "end":
                if message["by"] == self.place.index:
                    self._failed_here.set()
                else:
                    self._end(message["reason"], message["status"])
                return

    def _read(self) -> bytes:
        """The next message; empty: there will be none. Tells now and then where this process is."""
        while b"\n" not in self._text:
            try:
                more = self._socket.recv(1 << 16)
            except TimeoutError:
                if self._socket.gettimeout() != TICK:
                    raise
                if self.at != self._told:
                    self._told = self.at
                    self._say(say="step", step=self.at)
                continue
            if not more:
                return b""
            self._text += more
        message, _, self._text = self._text.partition(b"\n")
        return message

    def _say(self, **message: Any) -> None:
        with self._lock, contextlib.suppress(OSError):  # its end will be read
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _exit(self, reason: str, status: int) -> NoReturn:
        print(f"jaxlm: {reason}{f'; {self.last_words}' if self.last_words else ''}", file=sys.stderr, flush=True)
        if self.desk:
            time.sleep(0.5)  # let the others read why, before they see this process end
        leave_at_once(status)


def leave_at_once(status: int) -> NoReturn:
    """Without waiting for devices, threads or JAX's own farewell, which would wait for the dead."""
    import multiprocessing

    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    os._exit(status)


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0].strip("[]")
    ways = [bind] if bind else ["127.0.0.1"] if _loopback(host) else ["::", "0.0.0.0"]
    for i, way in enumerate(ways):
        both = way == "::" and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if ":" in way else socket.AF_INET
        try:
            return socket.create_server((way, int(port)), family=family, dualstack_ipv6=both, backlog=4096)
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and i + 1 < len(ways):
                continue  # a machine without IPv6
            raise ValueError(
                f"processes: process 0 can't listen at {way} port {port} ({error.strerror}): "
                "set JAX_COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT to what is free there"
            ) from None
    raise AssertionError


def _loopback(host: str) -> bool:
    return host.startswith("127.") or host == "localhost"


def _prepare(line: socket.socket) -> None:
    """A host that vanishes without a word is found out within a minute."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 60_000)):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
