"""Settings of distributed optimizers: workers that train on their own for some steps, and a global optimizer that
brings them together. Nothing here imports jax.
"""

from dataclasses import dataclass, field
from typing import Literal

from jaxlm.core.ranges import BelowOne, Count, Natural, NonNegative, Positive, PositiveShare, Share


@dataclass(frozen=True)
class Outer:
    """Chooses the global (outer) optimizer. What it takes as a gradient is the delta: global weights minus the mean of
    the workers' weights."""

    name: Literal["nesterov", "sgd", "average", "adam", "delayed_nesterov"] = "nesterov"
    """nesterov: SGD with Nesterov momentum (DiLoCo, Douillard et al. 2023); sgd: SGD with plain momentum; average: the
    global weights become the workers' mean; adam: Adam (FedAdam, Reddi et al. 2021); delayed_nesterov: momentum joins
    once in `delay` updates (Liu et al. 2024), for workers that push one at a time."""
    lr: Positive = 0.7
    momentum: BelowOne = 0.9
    beta2: BelowOne = 0.99
    """adam: decay of the second moment; of the first it is `momentum`."""
    eps: Positive = 1e-8
    """adam: added to the root of the second moment."""
    delay: Count = 4
    """delayed_nesterov: updates whose mean delta enters the momentum; at least the number of workers."""


@dataclass(frozen=True)
class Server:
    """Says how a parameter server treats workers that are jobs of their own, and come and go."""

    mode: Literal["sync", "async", "stale"] = "sync"
    """sync: rounds that end when all workers have pushed, or when `quorum` of them have and `grace` has passed; async:
    each push is applied as it arrives; stale: as async, but no worker runs more than `bound` rounds ahead of the
    slowest one."""
    quorum: PositiveShare = 0.5
    """sync: share of the workers whose pushes a round needs at least."""
    grace: NonNegative = 30.0
    """Seconds that a round of sync waits for the others once its quorum is there, and that a server which has just
    started waits for workers before it says that there are too few."""
    timeout: Positive = 600.0
    """Seconds without a sign of life after which a worker is taken to be lost, and named."""
    wait: Positive = 1800.0
    """Seconds that the server waits for as many workers as it needs, at the start and later, and that a worker waits
    for a server that is away; then it ends, and the same command goes on."""
    bound: Natural = 2
    """stale: rounds that a worker may be ahead of the slowest one."""
    staleness: NonNegative = 0.5
    """p of 1 / (1 + s)^p, the weight of a push of s versions ago; 0: all weigh the same."""
    dynamic: bool = False
    """Give slow workers fewer local steps, in proportion to their speed, so that all push at about the same time."""
    shards: Count = 1
    """Processes over which the server's state is split."""
    checkpoint_every: Count = 1
    """Versions between the server's checkpoints."""
    keep: Count = 2
    """Checkpoints of the server that are retained."""


@dataclass(frozen=True)
class Distributed:
    """Says whether workers train apart for some steps between exchanges, and how they are brought together."""

    method: Literal["none", "diloco", "server"] = "none"
    """none: every update is one of all devices; diloco: workers within one program, each on its part of the mesh's
    `replica` axis; server: workers are jobs of their own, and push to a parameter server."""
    workers: Count | None = None
    """Workers, which share `train.batch_size`: each trains on its part of every batch. A multiple of `mesh.replica`;
    those of one device take turns. Default: `mesh.replica`."""
    every: Count = 30
    """Local steps (H) between two exchanges of a weight."""
    outer: Outer = field(default_factory=Outer)
    weigh: Literal["equal", "tokens"] = "equal"
    """The workers' weights in the mean: equal, or in proportion to the tokens that each has learned from."""
    compress: Literal["none", "bfloat16", "int8", "float4"] = "none"
    """Type in which deltas travel. int8 and float4 (E2M1) have a float32 scale for each block of 256 numbers."""
    error_decay: Share = 1.0
    """What a worker keeps of the error of a compressed delta, to add to its next one (error feedback); 0: nothing."""
    fragments: Count = 1
    """diloco: parts of the weights that are exchanged in turn, each every `every` steps (streaming DiLoCo)."""
    overlap: Natural = 0
    """diloco: steps between the exchange of a fragment and its use (τ): the exchange overlaps with the next step."""
    mix: BelowOne = 0.0
    """diloco: share of a worker's own weights that stays when it takes up the global ones (α)."""
    server: Server = field(default_factory=Server)
