"""A scorer says how likely a model finds texts: many requests at once, sorted by length, padded to few sizes.

B rows, P positions of a row, N scored positions at its end, V vocabulary, S source positions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.inference.decode import sources
from jaxlm.models.model import Model
from jaxlm.nn import losses

LOGITS = 1 << 28  # elements of a batch's logits, which bound its rows


class Request(NamedTuple):
    """A request asks for the likelihood of `continuation` after `context`; both are token ids, neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """A score is the log likelihood of a continuation, in nats, and whether each of its tokens was the likeliest."""

    log_likelihood: float
    greedy: bool


class Scorer:
    """A scorer holds the programs of one model, one for each pair of padded lengths.

    It takes at most `rows` requests at a time. Rows have at most `longest` positions: contexts lose their beginning
    where they don't fit, which `truncated` counts.
    """

    def __init__(self, model: Model, params: Any, rows: int = 16, longest: int | None = None) -> None:
        if not model.family.generates:
            raise ValueError("eval: this model is an encoder; it does not say how likely a text is")
        self.model, self.params, self.rows = model, params, rows
        self.longest = min(n for n in (longest, model.config.positions, 1 << 30) if n is not None)
        self.truncated = 0
        self._run = jax.jit(partial(_score, model))

    def __call__(self, requests: Sequence[Request]) -> list[Score]:
        """Returns the scores in the order of the requests; a continuation that is empty or too long is a ValueError."""
        requests = [self._truncated(r) for r in requests]
        out: list[Score | None] = [None] * len(requests)
        pending: list[tuple[list[int], Any]] = []  # the device gets its next batch before we wait for the last one

        def collect() -> None:
            for members, scores in pending:
                for i, total, greedy in zip(members, *jax.device_get(scores), strict=False):
                    out[i] = Score(float(total), bool(greedy))
            pending.clear()

        for members, B, P, N in self._batches(requests):
            batch = self._padded([requests[i] for i in members], B, P, N)
            scores = self._run(self.params, batch)
            collect()
            pending.append((members, scores))
        collect()
        assert all(out), "a request was left out"
        return out  # type: ignore[return-value]

    def _truncated(self, r: Request) -> Request:
        if not r.context or not r.continuation:
            raise ValueError("eval: a request without context or continuation can't be scored")
        if self.model.family.kind == "encoder_decoder":
            room, over = self.longest, len(r.continuation) - self.longest
        else:  # a row ends before the last token, which is only predicted
            room, over = self.longest + 1 - len(r.continuation), len(r.continuation) - self.longest
        if over > 0:
            raise ValueError(f"eval: a continuation has {len(r.continuation)} tokens, the model {self.longest} places")
        self.truncated += len(r.context) > room
        return Request(r.context[-room:], r.continuation)

    def _batches(self, requests: Sequence[Request]) -> Iterator[tuple[list[int], int, int, int]]:
        """Yields (members, B, P, N), the longest first: where memory is too small, the error then comes at once."""
        seq2seq = self.model.family.kind == "encoder_decoder"
        devices = _batch_devices(self.model)
        sizes = [
            (
                size(len(r.continuation), 4),
                size(len(r.context) if seq2seq else len(r.context) + len(r.continuation) - 1, 32),
            )
            for r in requests
        ]
        order = sorted(range(len(requests)), key=lambda i: (sizes[i][1], sizes[i][0]), reverse=True)
        while order:
            N, P = sizes[order[0]]
            limit = max(1, min(self.rows, LOGITS // (N * self.model.config.vocab)))
            same = [i for i in order if sizes[i] == (N, P)][:limit]
            taken = set(same)
            order = [i for i in order if i not in taken]
            B = min(limit, 1 << (len(same) - 1).bit_length())
            yield same, -(-B // devices) * devices, min(P, self.longest), min(N, self.longest)

    def _padded(self, requests: Sequence[Request], B: int, P: int, N: int) -> dict[str, np.ndarray]:
        """Returns a batch whose rows end with the continuations; the first request fills it up to B rows."""
        requests = [*requests, *[requests[0]] * (B - len(requests))]
        out = {name: np.zeros((B, N), np.int32) for name in ("targets", "weights")}
        for i, r in enumerate(requests):
            out["targets"][i, N - len(r.continuation) :] = r.continuation
            out["weights"][i, N - len(r.continuation) :] = 1
        if self.model.family.kind == "encoder_decoder":
            start = self.model.config.target_start
            texts: list[Sequence[int]] = [[start, *r.continuation[:-1]] for r in requests]
            out |= sources([r.context for r in requests])
            P = N
        else:
            texts = [[*r.context, *r.continuation[:-1]] for r in requests]
        out |= {name: np.zeros((B, P), np.int32) for name in ("tokens", "positions", "segments")}
        for i, text in enumerate(texts):
            out["tokens"][i, P - len(text) :] = text
            out["positions"][i, P - len(text) :] = np.arange(len(text))
            out["segments"][i, P - len(text) :] = 1
        return out


def size(n: int, least: int) -> int:
    """Rounds `n` up to one of few sizes: `least`, twice that …, from the fourth on with one in between."""
    power = max(least, 1 << (n - 1).bit_length())
    between = power * 3 // 4
    return between if power >= 8 * least and n <= between else power


def _batch_devices(model: Model) -> int:
    """Counts the devices that share the rows of a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[a] for a in model.shard.compute["batch"])


def _score(model: Model, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns (log likelihood, whether greedy), each `[B]`."""
    batch = {name: model.shard(x, "batch", None) for name, x in batch.items()}
    targets_BN, real_BN = batch.pop("targets"), batch.pop("weights") > 0
    x_BND = model.forward(params, batch).x_BTD[:, -targets_BN.shape[1] :]
    z_BNV = losses.logits(model.readout(params, x_BND), model.shard)
    z_BNV = model.shard(z_BNV, "batch", None, None)
    at_BN1 = targets_BN[..., None]
    log_BN = jnp.take_along_axis(z_BNV, at_BN1, -1)[..., 0] - jax.nn.logsumexp(z_BNV, -1)
    greedy_B = ((z_BNV.argmax(-1) == targets_BN) | ~real_BN).all(-1)
    return jnp.where(real_BN, log_BN, 0.0).sum(-1), greedy_B


def windows(tokens: Sequence[int], prefix: int, longest: int) -> list[Request]:
    """Cuts a text of any length into requests whose log likelihoods add up to its own: each token is scored once.

    The first window begins with `prefix`; a later one is filled up on its left with what came before.
    """
    out = [Request([prefix], tokens[:longest])] if tokens else []
    for at in range(longest, len(tokens), longest):
        new = tokens[at : at + longest]
        first = at + len(new) - longest - 1
        out.append(Request(tokens[first:at], new))
    return out


def split(
    encode: Callable[[str], list[int]], encode_more: Callable[[str], list[int]], context: str, continuation: str
) -> Request:
    """Encodes both as they stand in the joined text; spaces that end the context belong to the continuation.

    Where a token spans the two, the continuation is encoded by itself, as text that goes on: by `encode_more`.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    before, whole = encode(stripped), encode(stripped + continuation)
    if whole[: len(before)] == before and len(whole) > len(before):
        return Request(before, whole[len(before) :])
    return Request(before, encode_more(continuation))
