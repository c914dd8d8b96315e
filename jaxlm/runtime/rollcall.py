"""Every process keeps a connection to process 0, by which they call the roll, meet at barriers, and learn who has died.

JAX has a service of its own for this, but if a process never comes, it aborts the others without a word about whom
they waited for, and it notices a death only after a hundred seconds. Here process 0 listens at the coordinator's
address first (see `rollcall_server`); when all have come and agree it gives the port to JAX and keeps the connections.
The end of a connection is the end of its process, and the kernel tells of it within milliseconds.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from jaxlm.runtime.launchers import Place
from jaxlm.runtime.rollcall_server import FAILURE_SECONDS, REFUSAL_SECONDS, Server, configure_socket, listen

STEP_SECONDS = 1.0  # between the messages in which a process says at which step it is


class ProcessError(RuntimeError):
    """Another process is missing, has died or is too late; the message says which."""


class Member:
    """A member is this process's part in the roll call; it exists once all processes have come and agree.

    agreed: what must be the same on all processes, by name. seconds: how long to wait for the others. end: called with
    a reason and an exit status, in a thread, if the run can't go on because of another process; by default it says so
    and exits. Raises ValueError if the processes don't fit together, and ProcessError if some never come.
    """

    def __init__(
        self, place: Place, agreed: Mapping[str, Any], seconds: float, end: Callable[[str, int], Any] | None = None
    ):
        self.place, self.exit_hint = place, ""
        self._end = end or self._exit
        self._lock, self._changed = threading.Lock(), threading.Condition()
        self._passed: set[str] = set()
        self._visits: dict[str, int] = {}
        self.last_step, self._reported_step = -1, -1
        self.left = False
        self._own_failure_known = threading.Event()
        self._unread = b""
        self.server = None
        if place.index == 0:
            listener = listen(place.address)
            self.server = Server(listener, place.count, seconds)
            self.server.start()
            # The host's own name may lead to another interface, or not be known yet.
            host, port = listener.getsockname()[:2]
            self.hosts = self._join("127.0.0.1" if host in ("::", "0.0.0.0") else host, port, agreed, seconds)
        else:
            host, _, port = place.address.rpartition(":")
            self.hosts = self._join(host.strip("[]"), int(port), agreed, seconds)
        self._socket.settimeout(STEP_SECONDS)
        os.register_at_fork(after_in_child=self._socket.close)
        threading.Thread(target=self._receive, name="roll", daemon=True).start()

    def _join(self, host: str, port: int, agreed: Mapping[str, Any], seconds: float) -> list[str]:
        """Says who this is until process 0 has heard all processes; returns their hosts."""
        hello = {"say": "here", "index": self.place.index, "host": socket.gethostname(),
                 "agreed": {name: repr(value) for name, value in agreed.items()}}  # fmt: skip
        deadline, problem = time.monotonic() + seconds, "no answer"
        while (remaining := deadline - time.monotonic()) > 0:
            try:
                self._socket = socket.create_connection((host, port), min(remaining, 10))
                configure_socket(self._socket)
                # Longer than process 0 waits: it says who is missing.
                self._socket.settimeout(remaining + REFUSAL_SECONDS + 10)
                self._send(**hello)
                if (answer := self._read()).startswith(b'{"say":'):
                    return self._hosts(json.loads(answer))
                problem = "something else answers there, or it ended"
                self._socket.close()
            except OSError as error:
                problem = error.strerror or str(error)
            time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
        raise ProcessError(
            f"processes: process 0 is not to be reached at {self.place.address} within {seconds:g} s ({problem}): "
            f"this is process {self.place.index} of {self.place.count}, by {self.place.launcher}"
        )

    def _hosts(self, answer: dict) -> list[str]:
        if answer["say"] == "end":
            self._socket.close()
            raise (ValueError if answer["status"] == 2 else ProcessError)(f"processes: {answer['reason']}")
        return answer["hosts"]

    # ---- after the roll

    def step(self, number: int) -> None:
        """Notes that this process has sent update `number` to its devices: where it is if the run gets stuck."""
        self.last_step = number

    def barrier(self, place: str, seconds: float) -> None:
        """Waits until all processes are at `place`. If some don't come within `seconds` of the first, all end."""
        with self._changed:
            self._visits[place] = visit = self._visits.get(place, 0) + 1
            name = f"{place}#{visit}"
            self._send(say="at", place=name, seconds=seconds)
            self._changed.wait_for(lambda: name in self._passed or self.left, seconds + 30)
            if name not in self._passed:
                raise ProcessError(f"process 0 ({self.hosts[0]}) does not answer at {place!r}")
            self._passed.discard(name)

    def fail(self, reason: str, status: int) -> None:
        """Tells the others that this process can't go on, and why.

        Returns when they know, unless another process's death turns out to be the cause: then `end` is called instead.
        """
        self._send(say="failed", reason=reason, status=status)
        self._own_failure_known.wait(FAILURE_SECONDS + 5)

    def leave(self) -> None:
        """Tells the others that this process is done, in good order."""
        if not self.left:
            self.left = True
            self._send(say="bye")
            if self.server:
                self.server.announce_leaving()

    def close(self) -> None:
        """Closes the connections, as the end of this process would."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self.server:
            self.server.join(5)
            self.server.close_sockets()

    def _receive(self) -> None:
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
                with self._changed:
                    self._passed.add(message["place"])
                    self._changed.notify_all()
            elif message["say"] == "bye":
                self.left = True
                return
            elif message["say"] == "end":
                if message["by"] == self.place.index:
                    self._own_failure_known.set()
                else:
                    self._end(message["reason"], message["status"])
                return

    def _read(self) -> bytes:
        """Returns the next message, empty if there will be none. Reports now and then at which step this process is."""
        while b"\n" not in self._unread:
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                if self._socket.gettimeout() != STEP_SECONDS:
                    raise
                if self.last_step != self._reported_step:
                    self._reported_step = self.last_step
                    self._send(say="step", step=self.last_step)
                continue
            if not data:
                return b""
            self._unread += data
        message, _, self._unread = self._unread.partition(b"\n")
        return message

    def _send(self, **message: Any) -> None:
        with self._lock, contextlib.suppress(OSError):  # the end of the connection will be read
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _exit(self, reason: str, status: int) -> NoReturn:
        print(f"jaxlm: {reason}{f'; {self.exit_hint}' if self.exit_hint else ''}", file=sys.stderr, flush=True)
        if self.server:
            time.sleep(0.5)  # so that the others read the reason before they see this process end
        leave_at_once(status)


def leave_at_once(status: int) -> NoReturn:
    """Ends this process at once. Devices, threads and JAX's own farewell would wait for processes that have died."""
    import multiprocessing

    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    os._exit(status)
