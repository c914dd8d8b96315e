"""The roll call, over real sockets with a thread for each process: who is missing, who differs, who has gone."""

import contextlib
import json
import re
import socket
import threading
import time

import pytest

from jaxlm.runtime import rollcall_server
from jaxlm.runtime.launchers import Place
from jaxlm.runtime.rollcall import Member, ProcessError


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Crew:
    """Processes as threads: `rolls[i]` or `errors[i]` is what became of number i, `ends[i]` what ended it later."""

    def __init__(self, count: int, numbers=None, seconds: float = 20.0, agreed=None):
        self.port, self.count = free_port(), count
        self.rolls: dict = {}
        self.errors: dict = {}
        self.ends: dict = {i: [] for i in range(count)}
        numbers = range(count) if numbers is None else numbers
        threads = [
            threading.Thread(target=self.join, args=(at, i, seconds, (agreed or {}).get(at, {})))
            for at, i in enumerate(numbers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

    def join(self, at: int, index: int, seconds: float, agreed: dict) -> None:
        place = Place("hand", self.count, index, f"127.0.0.1:{self.port}")
        try:
            self.rolls[at] = Member(place, agreed, seconds, lambda *end: self.ends[index].append(end))
        except (ValueError, ProcessError) as error:
            self.errors[at] = error

    def wait_for(self, index: int, seconds: float = 10.0) -> tuple[str, int]:
        until = time.monotonic() + seconds
        while not self.ends[index]:
            assert time.monotonic() < until, f"{index} never ended"
            time.sleep(0.01)
        return self.ends[index][0]

    def close(self) -> None:
        for roll in self.rolls.values():
            roll.leave()
            roll.close()


@pytest.fixture
def crew():
    with contextlib.ExitStack() as stack:

        def make(*args, **kwargs):
            made = Crew(*args, **kwargs)
            stack.callback(made.close)
            return made

        yield make


def test_all_come_and_part_in_good_order(crew):
    four = crew(4)
    assert not four.errors and {tuple(roll.hosts) for roll in four.rolls.values()} == {(socket.gethostname(),) * 4}
    for i in (2, 1, 3, 0):
        four.rolls[i].leave()
    time.sleep(0.2)
    assert not any(four.ends.values())
    # The port is free for JAX although the lines once went through it.
    with socket.create_server(("127.0.0.1", four.port)):
        pass


def test_those_who_never_come_are_named_to_all_who_came(crew):
    some = crew(4, numbers=[0, 2], seconds=1.0)
    assert not some.rolls
    for error in some.errors.values():
        assert isinstance(error, ProcessError)
        assert f"2 of 4 processes did not come within 1 s: 1, 3; here: 0 ({socket.gethostname()}), 2" in str(error)


def test_without_process_0_its_address_is_named(crew):
    (error,) = crew(2, numbers=[1], seconds=0.5).errors.values()
    assert isinstance(error, ProcessError)
    assert "process 0 is not to be reached at 127.0.0.1:" in str(error) and "refused" in str(error)
    assert "process 1 of 2, by hand" in str(error)


def test_the_first_differing_field_is_named_with_who_has_what(crew):
    same = {"jax": "1", "optim.lr": 0.1, "seed": 0}
    three = crew(3, agreed={0: same, 1: same, 2: same | {"optim.lr": 0.2, "seed": 1}})
    assert len(three.errors) == 3
    for error in three.errors.values():
        assert isinstance(error, ValueError)
        # whoever of the first two came before process 2
        assert re.search(r"optim\.lr is 0\.1 on process [01] \(.*and 0\.2 on process 2 \(", str(error))
        assert "(and 1 fields more)" in str(error)


def test_a_field_that_only_one_has_is_a_difference(crew):
    two = crew(2, agreed={1: {"more": 1}})
    assert "more is not there on process 0" in str(two.errors[0])


def test_two_with_the_same_number_are_refused(crew):
    twice = crew(3, numbers=[0, 1, 1], seconds=1.0)
    assert len(twice.errors) == 3
    assert all("both call themselves process 1" in str(error) for error in twice.errors.values())


def test_strangers_at_the_port_are_no_processes(crew):
    port = free_port()
    place = lambda i: Place("hand", 2, i, f"127.0.0.1:{port}")  # noqa: E731
    made: dict = {}
    first = threading.Thread(target=lambda: made.update({0: Member(place(0), {}, 20, print)}))
    first.start()
    for words in (b"GET / HTTP/1.1\r\n\r\n", json.dumps({"say": "step", "step": 1}).encode() + b"\n", b"[]\n"):
        with contextlib.suppress(ConnectionError), _to(port) as stranger:
            stranger.sendall(words)
            assert stranger.recv(100) == b""  # hung up on
    made[1] = Member(place(1), {}, 20, print)
    first.join(20)
    for roll in made.values():
        roll.leave()
        roll.close()


def _to(port: int) -> socket.socket:
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port))
        time.sleep(0.02)
    raise AssertionError("nobody listens")


def test_the_dead_are_named_to_the_living(crew):
    three = crew(3)
    three.rolls[1].close()  # what the kernel does to a killed process's lines
    for i in (0, 2):
        assert three.wait_for(i) == (f"process 1 ({socket.gethostname()}) has died", 1)


def test_the_death_of_process_0_is_named(crew):
    two = crew(2)
    two.rolls[0].left = True
    two.rolls[0].server.close_sockets()
    assert two.wait_for(1) == (f"process 0 ({socket.gethostname()}) has died", 1)


def test_a_failure_is_told_to_the_others_with_its_status(crew):
    two = crew(2)
    two.rolls[1].fail("data: no such file", 2)
    assert two.wait_for(0) == (f"process 1 ({socket.gethostname()}) ended: data: no such file", 2)
    assert not two.ends[1]  # it says so itself


def test_a_death_is_the_reason_where_failures_follow_from_it(crew):
    three = crew(3)
    failing = threading.Thread(target=three.rolls[0].fail, args=("connection reset by peer", 1))
    failing.start()
    time.sleep(0.2)
    three.rolls[2].close()
    for i in (0, 1):
        assert "process 2 (" in three.wait_for(i)[0]
    failing.join(20)


def test_barriers_let_all_pass_and_name_who_is_late(crew):
    three = crew(3)

    def wait(i: int, place: str, seconds: float) -> None:
        with contextlib.suppress(ProcessError):  # long after this test, of those who wait in vain
            three.rolls[i].barrier(place, seconds)

    def together(place: str, seconds: float, who) -> list[threading.Thread]:
        threads = [threading.Thread(target=wait, args=(i, place, seconds), daemon=True) for i in who]
        for thread in threads:
            thread.start()
        return threads

    for _ in range(2):  # the same place twice is two places
        threads = together("saved", 10.0, range(3))
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    together("saved", 0.3, (0, 2))
    for i in range(3):
        reason, status = three.wait_for(i)
        assert (reason, status) == (f"process 1 ({socket.gethostname()}) did not come to 'saved' within 0.3 s", 1)


def test_process_0_knows_where_each_is(crew, monkeypatch):
    two = crew(2)
    two.rolls[1].step(7)
    until = time.monotonic() + 10
    while two.rolls[0].server.steps.get(1) != 7:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_port_that_is_taken_is_a_fault_of_the_user():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"can't listen at 127.0.0.1 port {port} .*JAX_COORDINATOR_PORT"):
            rollcall_server.listen(f"127.0.0.1:{port}")


def test_process_0_hears_of_the_end_last(crew, monkeypatch):
    """It ends at once, and would take the thread that tells the others with it."""
    sent, send = [], rollcall_server.Connection.send
    monkeypatch.setattr(
        rollcall_server.Connection, "send", lambda c, **m: (sent.append((m["say"], c.index)), send(c, **m))
    )
    crew(3, agreed={1: {"lr": "1"}, 2: {"lr": "1"}})
    ends = [index for say, index in sent if say == "end"]
    assert sorted(ends) == [0, 1, 2] and ends[-1] == 0
