"""Says what workers that train apart send each other, or to a parameter server, and how long that takes over a link.

Bytes are theory's: with R replicas an all-reduce of float32 numbers sends 2 (R - 1) / R of their bytes, and an
all-gather of compressed ones R - 1 times them.
"""

import math
from dataclasses import dataclass

from jaxlm.assembly.distributed import terms
from jaxlm.assembly.program import Program
from jaxlm.core import config
from jaxlm.planning import roofline
from jaxlm.planning.targets import Target
from jaxlm.training.distributed import compression
from jaxlm.training.distributed.exchange import AXIS


@dataclass(frozen=True)
class Exchange:
    """An Exchange is what one round of workers sends: all of their weights once, after `every` steps of each."""

    workers: int
    every: int
    """Steps of a worker between two exchanges of a weight."""
    parts: int
    """Fragments that travel one after the other."""
    sent: float
    """Bytes that a device sends in a round, in one program; that all of a worker's send together, to a server."""
    sent_by_worker: float
    """Bytes that a worker sends in a round: with several on a device, those of one replica together."""
    received_by_worker: float
    largest: float
    """Bytes that a worker sends at one time: those of the largest fragment."""
    link: float
    """Bytes a second that a worker has to the others, or to the server, each way; 0: not known."""
    overlaps: bool
    """Whether a fragment travels during a step."""
    server_bytes: float = 0.0
    """Bytes of a parameter server's memory; 0: there is no server."""
    server_sent: float = 0.0
    """Bytes that a parameter server sends in a round; it receives what all workers send."""
    in_turn: int = 1
    """Workers whose exchanges follow one another, because they share the server's link."""

    @property
    def seconds(self) -> float | None:
        """The seconds that a round's exchanges take together; None: the link isn't known."""
        if not self.link:
            return None
        ways = self.sent_by_worker + (
            self.received_by_worker if self.server_bytes else 0.0
        )  # a server's answer follows
        return self.in_turn * ways / self.link

    def waited(self, step: float) -> float | None:
        """Returns the seconds of a round in which workers wait for the link, with steps of so many seconds."""
        if self.seconds is None:
            return None
        if not self.overlaps:
            return self.seconds
        longest, each = self.largest / self.link, self.seconds / self.parts
        return max(0.0, longest - step) + (self.parts - 1) * max(0.0, each - step)

    def share(self, step: float) -> float | None:
        """Returns the share of a round's time in which workers wait for the link, with steps of so many seconds."""
        waited = self.waited(step)
        return None if waited is None else waited / (self.every * step + waited)


def worker_run(run: config.Run) -> config.Run:
    """Returns the run whose step is planned: with a parameter server that of one worker, a job of its own.

    ValueError: the run can't be trained by workers and a server."""
    if run.distributed.method != "server":
        return run
    terms.check(run)
    return terms.worker_run(run, "worker")


def exchange(p: Program, t: Target, gbit: float | None = None) -> Exchange | None:
    """Returns what the workers of a program exchange on a target; None: all devices train together.

    `gbit`: Gbit/s of the link that a worker has to the others, or to the server; None: what the target's devices have
    between slices or nodes together, and one of its hosts to a server.
    """
    c = p.run.distributed
    if c.method == "none":
        return None
    sizes = dict(p.mesh.shape) if p.mesh is not None else {}
    link = None if gbit is None else gbit * 1e9 / 8
    numbers = p.fragments.sizes if c.method == "diloco" else (p.parameters[1],)
    if c.method == "server":
        assert c.workers is not None
        push, pull = compression.size(c.compress, numbers[0]), 4 * numbers[0]
        vectors = 1 + roofline.outer_vectors(p) + (c.server.mode == "sync")
        return Exchange(
            c.workers, c.every, 1, push, push, pull, push, t.chip.network * t.chip.host if link is None else link,
            False, 4.0 * numbers[0] * vectors, c.workers * pull, c.workers if c.server.mode == "sync" else 1,
        )  # fmt: skip
    count, replica_count = p.workers, sizes.get(AXIS, 1)
    devices = math.prod(sizes.values()) // replica_count
    local = count // replica_count

    def sent(n: int) -> float:
        if c.compress == "none":
            return 2 * (replica_count - 1) / replica_count * compression.size("none", n)
        return (replica_count - 1) * local * compression.size(c.compress, n)

    if link is None:
        link = devices * roofline.bandwidth(t, (AXIS,), sizes)[1] if replica_count > 1 and t.chip.network else 0.0
    whole = float(sum(map(sent, numbers)))
    return Exchange(
        count, c.every, len(numbers), whole / devices, whole, whole, float(max(map(sent, numbers))), link,
        c.overlap > 0,
    )  # fmt: skip
