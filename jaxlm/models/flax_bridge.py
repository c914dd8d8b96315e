"""A user's Flax module becomes a family: `from_linen` and `from_nnx`.

The module maps token ids `[B, T]` to logits `[B, T, V]`, or without a head to states `[B, T, D]`. Its program is
traced, and `forward` runs it up to the states that its head multiplies (`nn/logit_factors.py`): so a module takes part
in every objective, and the loss multiplies the vocabulary chunk by chunk as it does for our own models.

What a module does by itself stays with it: which activations it recomputes (`nn.remat`), whether it loops over layers
(`nn.scan`), how it attends. `make` is given `execution.dtype` as `dtype` if it takes such an argument; else the module
computes in what its own settings say.

B batch, T position, S position of a row that is read on, D model width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.extend import core

from jaxlm.core import tree
from jaxlm.core.spec import Init, Role, Spec
from jaxlm.core.weight_names import Name, same
from jaxlm.nn import leaf
from jaxlm.nn.cache import Cache, empty_cache, read_on, starts, write_rows
from jaxlm.nn.family import Batch, Family, Files, Key, Kind, ModelConfig, RunsItself
from jaxlm.nn.flax_modules import FLOAT32, GIVEN, Description, FlaxModules, LinenModules, NnxModules
from jaxlm.nn.flax_specs import AXES, named_axes, role_of, unnamed_axes
from jaxlm.nn.layers import Output, times
from jaxlm.nn.layout import STORE, Layout
from jaxlm.nn.logit_factors import LogitFactors, ending_at, logit_factors
from jaxlm.nn.losses import Readout

READ = ("tokens", "segments", "positions", "types", "prefix")
"""What of a batch modules may read."""


def from_nnx(
    make: Callable[..., nnx.Module],
    Config: type[ModelConfig],
    *,
    kind: Kind = "decoder",
    inputs: Mapping[str, str | None] | None = None,
    axes: Mapping[str, str | None] | None = None,
    roles: Mapping[str, Role] | None = None,
    shifts_inputs: bool = False,
    single_document: bool = False,
) -> Family:
    """Returns the family of the modules that `make(config, rngs=…)` makes.

    `Config` is a frozen dataclass that extends `ModelConfig`. `make` may also take `dtype` (`execution.dtype`) and
    `deterministic`. The module's `__call__` takes token ids first; of its other arguments those of the names in
    `INPUTS` and `FLAGS` of `nn/flax_modules.py` are given, and `rngs` in training. `inputs` says what further ones are
    given, one of `GIVEN` or None: `{"attention_mask": "mask_BTT", "cache": None}`. Where it returns a tuple, the first
    element counts.

    Weights keep the module's own paths, initializers and dtypes. Their logical axes come from partitioning metadata, a
    name a dimension: `axes` maps names that `AXES` of `nn/flax_specs.py` lacks, None to none. As by Flax's rules, a
    mesh axis cuts the first dimension of a weight that names it and no other. Without metadata tables and the head are
    laid out as our own, and of other matrices fsdp cuts the dimension that the largest power of two divides.
    `nn.Embed`'s `embedding` has the role `table`, `scale` and `bias` those of a norm and of biases, the matrix that
    makes the logits is the head; `roles` maps patterns of paths to other roles.

    `shifts_inputs`: the module moves its tokens to the right by itself, so that logits are those *of* each token (the
    lm1b example of Flax); it then reads one position more than a row has. `single_document`: a module that takes
    neither segments nor a mask can't keep documents of a row apart. It is refused unless this says that each row holds
    one, as with `data.document_mask` false; the states of a row that holds more are NaN, never a mixture.

    Modules have no cache of ours, so generating a token is a pass over its whole row. Adapters that put matrices beside
    a module's are refused.

    ValueError: an argument is wrong. What is wrong with a module is said when a run first asks for its weights.
    """
    modules = NnxModules(make, inputs or {}, kind == "decoder")
    return FlaxFamily(modules, Config, kind, axes or {}, roles or {}, shifts_inputs, single_document)


def from_linen(
    make: Callable[..., linen.Module],
    Config: type[ModelConfig],
    *,
    kind: Kind = "decoder",
    inputs: Mapping[str, str | None] | None = None,
    axes: Mapping[str, str | None] | None = None,
    roles: Mapping[str, Role] | None = None,
    shifts_inputs: bool = False,
    single_document: bool = False,
) -> Family:
    """Returns the family of the modules that `make(config)` makes; see `from_nnx` for the arguments.

    Dropout draws from the stream `dropout`. Collections other than `params` are refused.
    """
    modules = LinenModules(make, inputs or {}, kind == "decoder")
    return FlaxFamily(modules, Config, kind, axes or {}, roles or {}, shifts_inputs, single_document)


@dataclass(frozen=True)
class _Plan:
    """A plan is what is known of a config's module before it has weights."""

    module: Description
    paths: tuple[str, ...]
    """Of the weights, in the order in which programs take them."""
    factors: LogitFactors | None = None
    """What its logits are made of; None: it returns states."""
    specs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def reads(self, *names: str) -> bool:
        """Returns whether the module is given any of these."""
        return any(name in self.module.given.values() for name in names)

    @property
    def masks(self) -> bool:
        """Says whether the module is given a mask."""
        return self.reads("mask", "mask_BTT")

    @property
    def keeps_apart(self) -> bool:
        """Says whether the module can keep documents of a row apart."""
        return self.masks or self.reads("segments")


class FlaxFamily(RunsItself):
    """A FlaxFamily satisfies `Family` for the modules that one function makes."""

    MODEL_TYPES: tuple[str, ...] = ()
    FILES = Files()

    def __init__(
        self,
        modules: FlaxModules,
        Config: type[ModelConfig],
        kind: Kind,
        axes: Mapping[str, str | None],
        roles: Mapping[str, Role],
        shifts_inputs: bool,
        single_document: bool,
    ) -> None:
        self.modules, self.Config, self.kind, self.generates = modules, Config, kind, kind == "decoder"
        self.axes, self.roles = AXES | dict(axes), roles
        self.shifts_inputs, self.single_document = shifts_inputs, single_document
        self._plans: dict[Any, _Plan] = {}
        caller = modules.caller
        if not (issubclass(Config, ModelConfig) and dataclasses.is_dataclass(Config) and issubclass(Config, Hashable)):
            raise ValueError(f"{caller}: Config: {Config!r} extends no ModelConfig as a frozen dataclass; let it")
        if missing := [n for n in ("vocab", "layers", "width", "heads") if n not in dir(Config)]:
            raise ValueError(f"{caller}: Config: {Config.__name__} lacks {missing[0]}; add it with a default")
        for argument, used, known in (
            ("kind", {kind}, ("decoder", "encoder")),
            ("inputs", set(modules.inputs.values()) - {None}, GIVEN),
            ("axes", set(axes.values()) - {None}, tuple(STORE)),
            ("roles", set(roles.values()), get_args(Role)),
        ):
            if wrong := used - set(known):
                raise ValueError(f"{caller}: {argument}: {min(map(str, wrong))!r} is none of {', '.join(known)}")

    def attention_width(self, c: Any) -> int:
        return c.layers * c.width

    def names(self, c: Any) -> dict[str, Name]:
        """Returns the weights' own paths: there are no published files, and no matrices that adapters could be put
        on."""
        return {path: same(path) for path in self._plan(c).paths}

    def from_hf(self, values: dict[str, Any]) -> Any:
        raise ValueError("config.json: there are no published files of a Flax module")

    def to_hf(self, c: Any) -> dict[str, Any]:
        raise ValueError("model: a Flax module has no published format; use its run directory, or export stablehlo")

    def specs(self, c: Any) -> dict[str, Any]:
        return self._plan(c).specs

    def forward(
        self, c: Any, specs: Any, params: Any, batch: Batch, *, shard: Layout, key: Key = None,
        cache: Cache | None = None,
    ) -> Output:  # fmt: skip
        plan = self._plan(c)
        self._check(plan, params, batch, shard)
        batch = {name: batch[name] for name in READ if name in batch}
        batch.setdefault("segments", jnp.ones_like(batch["tokens"]))
        weights = _unstacked(plan, params)
        if cache is not None:
            return self._read_on(c, plan, weights, batch, cache, shard)
        if key is None and self.generates and not (plan.reads("positions") and plan.keeps_apart):
            # Rows that are padded on the left, as in evaluation, are read from their first token on.
            first_B = jnp.argmax(batch["segments"] > 0, 1)
            batch = _rolled(batch, -first_B)
            x_BTD = _rolled({"x": self._states(c, plan, weights, batch, shard, key)}, first_B)["x"]
        else:
            x_BTD = self._states(c, plan, weights, batch, shard, key)
        if not plan.keeps_apart:
            x_BTD = jnp.where(_single(batch["segments"], self.kind)[:, None, None], x_BTD, jnp.nan)
        return Output(shard(x_BTD, "batch", "seq", None))

    def readout(self, c: Any, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
        plan = self._plan(c)
        if (f := plan.factors) is None:
            raise ValueError(
                "model.head: this Flax module returns states and makes no logits; choose another objective"
            )
        path = plan.paths[f.head]
        w = shard.gather(tree.at(params, path), tree.at(plan.specs, path))
        bias_V = None if f.bias is None else tree.at(params, plan.paths[f.bias]).astype(jnp.float32) * f.bias_scale
        x_BTD = x_BTD.astype(shard.dtype)
        return Readout(x_BTD if f.scale == 1 else times(x_BTD, f.scale), w if f.vocab_first else w.T, bias_V, f.softcap)

    def init_cache(self, c: Any, rows: int, length: int, dtype: Any, slack: int = 0) -> Cache:
        """Returns a cache of the tokens themselves: a module has no cache that we know of, so each new token is a pass
        over the whole row."""
        if not self.generates:
            raise ValueError("model: an encoder has no cache, because it generates nothing; choose a model that does")
        stored = dict(tokens=jnp.zeros((rows, length), jnp.int32), prefix=jnp.zeros((rows, length), bool))
        return empty_cache([stored], rows, length)

    # What specs are made of.

    def _plan(self, c: Any) -> _Plan:
        if c not in self._plans:
            with _no_mesh():
                self._plans[c] = self._make_plan(c)
        return self._plans[c]

    def _make_plan(self, c: Any) -> _Plan:
        modules, shape = self.modules, (2, min(8, c.positions or 8))
        like: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
        module = modules.describe(c, like)
        made = jax.make_jaxpr(lambda key: modules.init(c, key, jnp.zeros(shape, jnp.int32)), return_shape=True)
        init, shapes = made(jax.random.key(0))
        plan = _Plan(module, tuple(sorted(shapes)))
        batch = {"tokens": like, "segments": like}
        program = self._program(c, plan, [shapes[path] for path in plan.paths], batch, None, FLOAT32)
        if c.head:
            try:
                plan = dataclasses.replace(plan, factors=logit_factors(program))
            except ValueError as e:
                raise ValueError(
                    f"{modules.caller}: the logits of {module.title} are not states times a weight: {e}; let __call__ "
                    "return x @ w (+ bias), or set the config's `head` to False and return states"
                ) from None
            assert plan.factors is not None
            _check_size("vocab", c.vocab, f"{module.title} makes logits of {{}} tokens", program)
            program = plan.factors.states
        _check_size("width", c.width, f"the states of {module.title} have width {{}}", program)
        return dataclasses.replace(plan, specs=self._make_specs(c, plan, init, shapes))

    def _make_specs(self, c: Any, plan: _Plan, init: core.ClosedJaxpr, shapes: Mapping[str, Any]) -> dict[str, Any]:
        head = None if plan.factors is None else plan.paths[plan.factors.head]
        roles = {path: role_of(path, plan.paths, head) for path in plan.paths}
        for pattern, role in self.roles.items():
            matches = tree.matcher((pattern,), plan.paths, f"{self.modules.caller}: roles")
            roles |= {path: role for path in plan.paths if matches(path)}
        out: dict[str, Any] = {}
        for i, path in enumerate(plan.paths):
            shape, role = shapes[path].shape, roles[path]
            if (names := plan.module.names.get(path)) is None:
                axes = unnamed_axes(shape, role, c.vocab)
            else:
                axes = named_axes(names, shape, self.axes, f"{self.modules.caller}: axes: {path}")
            s = Spec(shape, axes, _initializer(init, i), shapes[path].dtype, role, below_layers=role == "table")
            out = tree.put(out, path, s)
        return out

    # What forward is made of.

    def _program(self, c: Any, plan: _Plan, weights: list[Any], batch: Batch, key: Key, dtype: Any) -> core.ClosedJaxpr:
        """Returns the program of the module: from weights in the order of `plan.paths`, a batch and a dropout key."""

        def run(weights: list[Any], batch: Batch, key: Key) -> Any:
            return self.modules.call(c, dict(zip(plan.paths, weights, strict=True)), batch, key, dtype)

        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (weights, dict(batch), key))
        if not plan.module.hides_mesh:
            return jax.make_jaxpr(run)(*like)
        with _no_mesh():
            return jax.make_jaxpr(run)(*like)

    def _states(self, c: Any, plan: _Plan, weights: list[Any], batch: Batch, shard: Layout, key: Key) -> jax.Array:
        """Runs the module up to its states `[B, T, D]`."""
        batch = _longer(batch) if self.shifts_inputs else batch
        program = self._program(c, plan, weights, batch, key, shard.dtype)
        if plan.factors is None:
            program = ending_at(program, program.jaxpr.outvars)
        else:
            program = logit_factors(program).states
        (x,) = core.jaxpr_as_fun(program)(*jax.tree.leaves((weights, batch, key)))
        x_BTD = x.reshape(*batch["tokens"].shape, -1)
        return x_BTD[:, 1:] if self.shifts_inputs else x_BTD

    def _read_on(self, c: Any, plan: _Plan, weights: list[Any], batch: Batch, cache: Cache, shard: Layout) -> Output:
        """Reads the whole row of new tokens, those before them from the cache, and returns the new ones' states.

        A module reads each row from its first token on.
        """
        (B, T), (stored,) = batch["tokens"].shape, cache.layers
        after = read_on(cache, batch["segments"], (B, T))
        assert after is not None
        start_B = jnp.broadcast_to(starts(after, batch["segments"], T), B)
        length = after.real_BS.shape[1]
        stored = stored | {
            name: write_rows(stored[name], batch[name], start_B, 1) for name in stored.keys() & batch.keys()
        }
        real_BS = after.real_BS & (jnp.arange(length)[None] < jnp.broadcast_to(after.end, B)[:, None])
        first_B = jnp.argmax(real_BS, 1)
        row = {"tokens": stored["tokens"], "segments": real_BS.astype(jnp.int32)}
        row |= {"prefix": stored["prefix"]} if plan.masks else {}
        S = min(length, c.positions or length)
        x_BSD = self._states(c, plan, weights, {k: x[:, :S] for k, x in _rolled(row, -first_B).items()}, shard, None)
        at_BT = jnp.clip(start_B[:, None] + jnp.arange(T)[None] - first_B[:, None], 0, S - 1)
        x_BTD = jnp.take_along_axis(x_BSD, at_BT[..., None], axis=1)
        return Output(shard(x_BTD, "batch", "seq", None), cache=after.replace(layers=(stored,), fresh=False))

    def _check(self, plan: _Plan, params: Any, batch: Batch, shard: Layout) -> None:
        """Refuses what a module can't do with a batch."""
        caller, title = self.modules.caller, plan.module.title
        self._check_layout(plan, shard)
        if "prefix" in batch and not plan.masks:
            raise ValueError(
                f"{caller}: inputs: {title} takes no mask, so it can't read a prefix both ways; give it one"
            )
        if any(leaf.is_leaf(w) for w in jax.tree.leaves(params, is_leaf=leaf.is_leaf)):
            raise ValueError(
                "adapter: a Flax module multiplies its weights by itself, so they must be plain arrays; use none"
            )

    def check_layout(self, c: Any, shard: Layout) -> None:
        self._check_layout(self._plan(c), shard)

    def describe(self, c: Any, dtype: str) -> Mapping[str, str]:
        precision = f"{dtype} compute" if self.modules.takes_dtype else "as the module is written"
        return {
            "precision": precision,
            "layers": f"attention, loops and remat as {self._plan(c).module.title} is written",
        }

    def _check_layout(self, plan: _Plan, shard: Layout) -> None:
        caller, title = self.modules.caller, plan.module.title
        mesh, execution = shard.mesh, shard.execution
        if not plan.keeps_apart and not self.single_document:
            raise ValueError(
                f"data.document_mask: {title} takes neither segments nor a mask, so it can't keep documents of a row "
                "apart; let its __call__ take `segments`, or set data.document_mask to False and tell "
                f"{caller} single_document=True"
            )
        for wrong, message in (
            (mesh.axis_type != "auto", "mesh.axis_type: a Flax module states no types of sharding; use auto"),
            (mesh.stage > 1, "mesh.stage: a Flax module runs its layers by itself, not in stages; use 1"),
            (mesh.context_by != "gather", "mesh.context_by: a Flax module attends by itself; use gather"),
            (
                execution.attention not in ("auto", "xla"),
                "execution.attention: a Flax module attends by itself; use auto",
            ),
            (execution.remat != "none", "execution.remat: a Flax module has its own (nn.remat); use none"),
            (execution.scan is True, "execution.scan: a Flax module has its own loops (nn.scan); leave it out"),
        ):
            if wrong:
                raise ValueError(message)


def _check_size(field: str, size: int, says: str, program: core.ClosedJaxpr) -> None:
    found: Any = program.out_avals[0]
    if found.shape[-1] != size:
        raise ValueError(f"model.{field}: {size}, and {says.format(found.shape[-1])}; make them equal")


def _initializer(program: core.ClosedJaxpr, i: int) -> Init:
    """Returns what draws result `i` of a program that draws all weights, without what the others need."""

    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return core.jaxpr_as_fun(ending_at(program, [program.jaxpr.outvars[i]]))(key)[0]

    return init


def _unstacked(plan: _Plan, params: Any) -> list[Any]:
    """Returns the weights in the order of `plan.paths`.

    Decoding makes a tuple of stacked layers (`inference.decode.prepare`), which here are a stack again.
    """

    def find(part: Any, path: str) -> Any:
        if isinstance(part, tuple):
            return jnp.stack([find(layer, path) for layer in part])
        name, _, rest = path.partition("/")
        return find(part[name], rest) if path else part

    return [find(params, path) for path in plan.paths]


def _rolled(batch: Batch, by_B: jax.Array) -> dict[str, Any]:
    """Returns a batch with its rows moved to the right; what leaves them there comes back on the left."""

    def one(x: jax.Array) -> jax.Array:
        at_BT = (jnp.arange(x.shape[1])[None] - by_B[:, None]) % x.shape[1]
        return jnp.take_along_axis(x, at_BT.reshape(at_BT.shape + (1,) * (x.ndim - 2)), axis=1)

    return {name: one(x) for name, x in batch.items()}


def _single(segments_BT: jax.Array, kind: Kind) -> jax.Array:
    """Returns which rows hold one document that can be read without a mask: all of it, or for a decoder, which looks at
    nothing that comes later, all before the padding. Rows that are all padding count too."""
    fits = segments_BT == segments_BT[:, :1]
    if kind == "decoder":
        padding = segments_BT == 0
        stays = padding[:, 1:] | ~padding[:, :-1]
        fits = (fits | padding) & jnp.pad(stays, ((0, 0), (1, 0)), constant_values=True)
    return fits.all(1)


def _longer(batch: Batch) -> dict[str, Any]:
    """Returns a batch with a position more, and each document that padding follows with one of its own: what a module
    that shifts its inputs says after a document's last token, it says there."""
    out = {name: jnp.concatenate([x, x[:, -1:]], 1) for name, x in batch.items()}
    before = {name: jnp.pad(x, ((0, 0), (1, 0)), mode="edge") for name, x in batch.items()}
    more = (out["segments"] == 0).at[:, -1].set(True) & (before["segments"] > 0)
    new = before | {"tokens": jnp.ones_like(before["tokens"])}  # 0 would be padding to the lm1b example
    if "positions" in batch:
        new["positions"] = before["positions"] + 1
    return {name: jnp.where(more, new[name], x) for name, x in out.items()}


def _no_mesh() -> Any:
    """Returns a context in which programs are traced as if there were no mesh."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
