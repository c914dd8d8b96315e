"""The programs of an engine: pure functions of fixed shapes, all compiled when it starts.

Prompts are read in chunks into a row of their own, which is then put among the rows that run. Rows and the pages of the
prefix cache are caches of one kind: a page is a short row.

B running rows, S slots of a row, T tokens of a chunk, R directions of adapters, V vocabulary.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.inference.decode import prepare, whole_rows
from jaxlm.inference.engine import row_caches, sample
from jaxlm.inference.engine.row_caches import Layers
from jaxlm.models.model import Model
from jaxlm.nn.cache import SLOTS, Cache, with_own_ends
from jaxlm.nn.losses import logits
from jaxlm.runtime.mesh import NamedSharding, single_device_sharding
from jaxlm.weights.adapters import per_row


@dataclass(frozen=True)
class Shapes:
    """The shapes that programs are compiled for. `pairs` are the (rows, slots) that fit the cache."""

    pairs: tuple[tuple[int, int], ...]
    chunks: tuple[int, ...]
    pages: int
    page: int
    source: int
    """Tokens that an encoder reads; 0: there is none."""
    lookup: int = 0
    """Tokens that an answer guesses ahead."""

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(sorted({b for b, _ in self.pairs}))

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(sorted({s for _, s in self.pairs}))

    def pair(self, rows: int, length: int) -> tuple[int, int] | None:
        """Returns the smallest (rows, slots) that hold so many rows of a length, None where none does."""
        fitting = [(b, s) for b, s in self.pairs if b >= rows and s >= length]
        return min(fitting, key=lambda pair: (pair[1], pair[0]), default=None)


class Programs:
    """The compiled programs of one model; `used` is how many ids of the vocabulary are tokens.

    `compile` makes them all; a shape that isn't among them is an error, so that nothing is ever compiled later.
    """

    def __init__(self, model: Model, params: Any, shapes: Shapes, used: int, both_ways: bool, mesh: Any = None) -> None:
        self.model, self.shapes, self.used, self.both_ways = whole_rows(model), shapes, used, both_ways
        self._mesh = mesh
        ready = jax.jit(partial(prepare, self.model))
        here = all(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(params))
        self.params = ready(params) if here else self._described(jax.eval_shape(ready, params))
        """The weights as decoding reads them; their shapes, where the engine was given no more than these."""
        self._compiled: dict[tuple[Any, ...], Any] = {}

    # -------------------------------------------------------------------------------------------- what is called

    def empty(self, rows: int, length: int) -> Layers:
        """Returns the arrays of a cache of so many rows and slots, with room for what an encoder says."""
        return self._compiled["empty", rows, length]()

    def read(
        self, layers: Layers, end: int, tokens: Sequence[int], rows_1R: Any, source: Sequence[int] | None, prefix: bool
    ) -> tuple[jax.Array, Layers]:
        """Reads up to a chunk's tokens into a row and returns (states `[1, T, D]`, the row's arrays). With `prefix`,
        which a model that reads prompts both ways understands, each of them sees all of them."""
        T, S = min(n for n in self.shapes.chunks if n >= len(tokens)), row_caches.slots(layers)
        batch = dict(
            tokens=_padded(tokens, T)[None],
            segments=(np.arange(T) < len(tokens)).astype(np.int32)[None],
            positions=np.minimum(end + np.arange(T, dtype=np.int32), end + len(tokens) - 1)[None],
        )
        if source is not None:
            n = self.shapes.source
            batch |= dict(
                source=_padded(source, n)[None],
                source_segments=(np.arange(n) < len(source)).astype(np.int32)[None],
                source_positions=np.arange(n, dtype=np.int32)[None],
            )
        if self.both_ways:
            batch["prefix"] = (batch["segments"] > 0) & prefix
        return self._compiled["read", T, S](self.params, layers, np.array([end], np.int32), batch, rows_1R)

    def last_logits(self, x_1TD: jax.Array, count: int) -> jax.Array:
        """Returns the logits `[1, V]` after the last of `count` tokens."""
        return self._compiled["last", x_1TD.shape[1]](self.params, x_1TD, np.int32(count))

    def scores(self, x_1TD: jax.Array, next_T: Sequence[int]) -> Any:
        """Returns the log probabilities of the tokens that follow, `[T]`, and the likeliest ones with theirs."""
        T = x_1TD.shape[1]
        return self._compiled["score", T](self.params, x_1TD, _padded(next_T, T))

    def step(self, layers: Layers, end_B: Any, known: tuple[Any, Any, Any], active_B: Any, rows_BR: Any) -> Any:
        """Reads one more token of each active row and returns (logits `[B, V]`, the rows' arrays).

        `known` is (tokens, whether to take them, tokens of the step before): a row's token is on the host or still on
        its way.
        """
        key = "step", len(end_B), row_caches.slots(layers)
        return self._compiled[key](self.params, layers, end_B, known, active_B, rows_BR)

    def judge(self, layers: Layers, end_B: Any, tokens_BT: Any, counts_B: Any, rows_BR: Any) -> Any:
        """Reads `counts_B` tokens of each row and returns (the likeliest token after each of them with whether its
        logits were finite, the rows' arrays)."""
        return self._compiled["judge", len(end_B), row_caches.slots(layers)](
            self.params, layers, end_B, tokens_BT, counts_B, rows_BR
        )

    def greedy(self, z_BV: jax.Array) -> sample.Chosen:
        """Returns the likeliest token of each row."""
        return self._compiled["greedy", len(z_BV)](z_BV)

    def choose(self, z_BV: jax.Array, settings: sample.RowSettings, noted: bool) -> sample.Chosen:
        """Returns the tokens that rows choose by their own settings, with log probabilities if `noted`."""
        return self._compiled["choose", len(z_BV), settings.allowed.shape[1], noted](z_BV, settings)

    def insert(self, layers: Layers, row: Layers, at: int) -> Layers:
        """Returns running rows with a row in place `at`."""
        return self._compiled["insert", row_caches.slots(row), row_caches.rows(layers), row_caches.slots(layers)](
            layers, row, np.int32(at)
        )

    def extract(self, layers: Layers, at: int, length: int) -> Layers:
        """Returns a row of its own with the first `length` slots of the running row `at`."""
        return self._compiled["extract", row_caches.rows(layers), row_caches.slots(layers), length](
            layers, np.int32(at)
        )

    def load(self, pool: Layers, pages: Sequence[int], length: int) -> Layers:
        """Returns a row of `length` slots that begins with what pages hold."""
        return self._compiled["load", length](pool, _padded(pages, length // self.shapes.page))

    def store(self, pool: Layers, row: Layers, pages: Sequence[int]) -> Layers:
        """Returns the pool of pages with a row's tokens in `pages`: the first in the first, and so on; 0: nowhere."""
        S = row_caches.slots(row)
        return self._compiled["store", S](pool, row, _padded(pages, S // self.shapes.page))

    def chunk(self, tokens: int, at_once: bool = False) -> tuple[int, int]:
        """Returns the chunk with which to begin to read so many tokens, and how many of them it holds.

        It is the smallest that holds all, but where a third of it would be empty a smaller one that is full, unless
        they must be read `at_once`.
        """
        sizes = self.shapes.chunks
        whole = min((n for n in sizes if n >= tokens), default=sizes[-1])
        full = max((n for n in sizes if n <= tokens), default=whole)
        size = whole if at_once or 3 * tokens >= 2 * whole else full
        return size, min(size, tokens)

    # -------------------------------------------------------------------------------------------- how it is compiled

    def compile(self, rows_R: np.ndarray | None, progress: Callable[[int, int], None] | None = None) -> float:
        """Compiles every program and returns the seconds that it took. `rows_R` is the mask of a row without adapter;
        `progress` is told how many are done, and of how many."""
        began, jobs = time.monotonic(), dict(self._programs(rows_R))
        # Tracing holds the interpreter's lock and needs this thread's mesh; compiling does neither.
        lowered = ((name, job()) for name, job in jobs.items())
        with ThreadPoolExecutor(4) as pool:
            running = [(name, pool.submit(program.compile)) for name, program in lowered]
            for i, (name, program) in enumerate(running):
                self._compiled[name] = program.result()
                if progress is not None:
                    progress(i + 1, len(jobs))
        return time.monotonic() - began

    def lowered(self, *name: Any) -> Any:
        """Returns a program before it is compiled, such as `("step", rows, slots)`, to look at."""
        return dict(self._programs(None))[name]()

    def _programs(self, rows_R: np.ndarray | None) -> Iterable[tuple[tuple[Any, ...], Callable[[], Any]]]:
        """Yields the name of each program and what lowers it."""
        p, shapes = self.params, self.shapes
        D, V = self.model.config.width, self.model.config.vocab
        like = lambda shape, dtype: self._described(jax.ShapeDtypeStruct(shape, dtype))  # noqa: E731
        i32 = lambda *shape: like(shape, jnp.int32)  # noqa: E731
        masks = lambda B: None if rows_R is None else like((B, len(rows_R)), jnp.float32)  # noqa: E731
        x = lambda T: like((1, T, D), self._state_dtype)  # noqa: E731
        z = lambda B: like((B, V), jnp.float32)  # noqa: E731

        def lower(f: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Callable[[], Any]:
            placed = jax.tree.map(lambda x: x.sharding, self._described(jax.eval_shape(f, *args)))
            return partial(jax.jit(f, donate_argnums=donate, out_shardings=placed).lower, *args)

        pool = self.described(shapes.pages + 1, shapes.page) if shapes.pages else None
        sizes = {*shapes.pairs, *((1, S) for S in shapes.lengths)}
        for B, S in sizes | ({(shapes.pages + 1, shapes.page)} if shapes.pages else set()):
            yield ("empty", B, S), lower(partial(row_caches.empty, like=self.described(B, S)))
        for B, S in sorted(shapes.pairs, reverse=True):
            layers, bools = self.described(B, S), like((B,), jnp.bool_)
            known = i32(B), bools, i32(B)
            yield ("step", B, S), lower(self._step, p, layers, i32(B), known, bools, masks(B), donate=(1,))
            if shapes.lookup:
                tokens = i32(B, shapes.lookup + 1)
                yield ("judge", B, S), lower(self._judge, p, layers, i32(B), tokens, i32(B), masks(B), donate=(1,))
            for length in [s for s in shapes.lengths if s <= S]:
                row = self.described(1, length)
                yield ("insert", length, B, S), lower(row_caches.insert, layers, row, i32(), donate=(0,))
                yield ("extract", B, S, length), lower(partial(row_caches.extract, like=row), layers, i32())
        for S in shapes.lengths:
            row = self.described(1, S)
            for T in shapes.chunks:
                if T <= S:
                    batch = {name: i32(1, T) for name in ("tokens", "segments", "positions")}
                    if shapes.source:
                        names = ("source", "source_segments", "source_positions")
                        batch |= {name: i32(1, shapes.source) for name in names}
                    if self.both_ways:
                        batch["prefix"] = like((1, T), jnp.bool_)
                    yield ("read", T, S), lower(self._read, p, row, i32(1), batch, masks(1), donate=(1,))
            if pool is not None:
                yield ("load", S), lower(partial(row_caches.load, like=row), pool, i32(S // shapes.page))
                yield ("store", S), lower(row_caches.store, pool, row, i32(S // shapes.page), donate=(0,))
        for T in shapes.chunks:
            yield ("last", T), lower(self._last, p, x(T), i32())
            yield ("score", T), lower(self._score, p, x(T), i32(T))
        for B in sorted({1, *shapes.rows}):
            yield ("greedy", B), lower(partial(sample.greedy, used=self.used), z(B))
            for width, noted in itertools.product((1, V), (False, True)):
                settings = self._described(jax.eval_shape(partial(sample.arrays, [None] * B, width)))
                f = partial(sample.choose, used=self.used, noted=noted)
                yield ("choose", B, width, noted), lower(f, z(B), settings)

    def described(self, rows: int, length: int) -> Any:
        """Returns the shapes of a cache's arrays; all slots are kept, as rows have ends of their own."""
        dtype = self.model.shard.dtype

        def begun() -> Any:
            cache = with_own_ends(self.model.init_cache(rows, length, dtype, length))
            if not self.shapes.source:
                return cache.layers
            n = self.shapes.source
            batch = {name: jnp.zeros((rows, 1), jnp.int32) for name in ("tokens", "segments", "positions")}
            batch |= {f"source{part}": jnp.zeros((rows, n), jnp.int32) for part in ("", "_segments", "_positions")}
            out = self.model.forward(self.params, batch, cache=cache).cache
            assert out is not None
            return out.layers

        return self._described(jax.eval_shape(begun))

    def _described(self, arrays: Any) -> Any:
        """Returns shapes with where each array stands: on a mesh heads of cached keys and values where the layers have
        theirs, all else on every device. So each program finds what another left as it was compiled for."""
        if self._mesh is None:
            one = single_device_sharding()
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), arrays)

        def place(path: tuple[Any, ...], x: Any) -> Any:
            name = path[-1].key if path and isinstance(path[-1], jax.tree_util.DictKey) else None
            spec = self.model.shard.spec((None, "kv", None, None) if name in SLOTS else ())
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self._mesh, spec))

        return jax.tree_util.tree_map_with_path(place, arrays)

    @property
    def _state_dtype(self) -> Any:
        return self.model.shard.dtype

    def _cache(self, layers: Layers, end_B: jax.Array) -> Cache:
        return Cache(layers, end_B, jnp.zeros((len(end_B), row_caches.slots(layers)), bool), fresh=False)

    def _read(self, params: Any, layers: Layers, end_1: jax.Array, batch: dict, rows_1R: Any) -> Any:
        out = self.model.forward(per_row.for_rows(params, rows_1R), batch, cache=self._cache(layers, end_1))
        assert out.cache is not None
        return out.x_BTD.astype(self._state_dtype), out.cache.layers

    def _last(self, params: Any, x_1TD: jax.Array, count: jax.Array) -> jax.Array:
        x_11D = jax.lax.dynamic_slice_in_dim(x_1TD, count - 1, 1, axis=1)
        return self._logits(params, x_11D)[:, 0]

    def _score(self, params: Any, x_1TD: jax.Array, next_T: jax.Array) -> Any:
        p_TV = jax.nn.log_softmax(self._logits(params, x_1TD)[0], -1)
        own_T = jnp.take_along_axis(p_TV, next_T[:, None], -1)[:, 0]
        return own_T, jax.lax.top_k(p_TV, min(sample.MOST_TOP, p_TV.shape[-1]))

    def _step(self, params: Any, layers: Layers, end_B: Any, known: Any, active_B: Any, rows_BR: Any) -> Any:
        tokens_B, given_B, before_B = known
        tokens_B1 = jnp.where(given_B, tokens_B, before_B)[:, None]
        batch = dict(tokens=tokens_B1, positions=end_B[:, None], segments=active_B.astype(jnp.int32)[:, None])
        out = self.model.forward(per_row.for_rows(params, rows_BR), batch, cache=self._cache(layers, end_B))
        assert out.cache is not None
        return self._logits(params, out.x_BTD)[:, 0], out.cache.layers

    def _judge(
        self, params: Any, layers: Layers, end_B: jax.Array, tokens_BT: jax.Array, counts_B: jax.Array, rows_BR: Any
    ) -> Any:
        at_T = jnp.arange(tokens_BT.shape[1])[None]
        batch = dict(
            tokens=tokens_BT,
            positions=end_B[:, None] + jnp.minimum(at_T, jnp.maximum(counts_B[:, None] - 1, 0)),
            segments=(at_T < counts_B[:, None]).astype(jnp.int32),
        )
        out = self.model.forward(per_row.for_rows(params, rows_BR), batch, cache=self._cache(layers, end_B))
        assert out.cache is not None
        z_BTV = self._logits(params, out.x_BTD)
        return jax.vmap(partial(sample.greedy, used=self.used))(z_BTV), out.cache.layers

    def _logits(self, params: Any, x_BTD: jax.Array) -> jax.Array:
        z_BTV = logits(self.model.readout(params, x_BTD), self.model.shard)
        return self.model.shard(z_BTV.astype(jnp.float32), None, None, None)


def _padded(ids: Sequence[int], n: int) -> np.ndarray:
    out = np.zeros(n, np.int32)
    out[: len(ids)] = ids
    return out
