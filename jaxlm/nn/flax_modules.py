"""Calls a user's Flax modules, linen and nnx alike, as functions of their weights.

B batch, T position.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxlm.core import tree
from jaxlm.nn.family import Batch, Key
from jaxlm.nn.logit_factors import depends
from jaxlm.nn.mask import Mask
from jaxlm.runtime.mesh import AXES

INPUTS: dict[str, str | None] = {
    **dict.fromkeys(("positions", "position_ids", "inputs_positions"), "positions"),
    **dict.fromkeys(("segments", "segment_ids", "inputs_segmentation", "decoder_segment_ids"), "segments"),
    **dict.fromkeys(("types", "token_type_ids"), "types"),
}
"""Arguments of `__call__` by their usual names, and what they are given."""
GIVEN = ("positions", "segments", "types", "mask", "mask_BTT")
"""What an argument can be given: arrays `[B, T]`; which positions each may attend to, bool `[B, 1, T, T]` as Flax's own
attention takes it, or `[B, T, T]`."""
FLAGS = {"deterministic": False, "train": True, "training": True, "is_training": True}
"""Arguments of `__call__` that say whether dropout is on, and their value when it is."""
FLOAT32 = jnp.dtype("float32")


class Description(NamedTuple):
    """A Description is what is known of a module before it has weights."""

    title: str
    """Name of its class."""
    given: Mapping[str, str | None]
    """What each argument of `__call__` after the tokens is given."""
    names: Mapping[str, tuple[Any, ...]]
    """Names of a weight's dimensions, of weights that have partitioning metadata."""
    hides_mesh: bool
    """Whether it must be traced as if there were no mesh, as its metadata names axes that no mesh here has."""


@dataclass(frozen=True)
class FlaxModules(ABC):
    """The modules that `make` makes, each of its config."""

    make: Callable[..., Any]
    inputs: Mapping[str, str | None]
    """What arguments of other names than `INPUTS` has are given: one of `GIVEN`, or None."""
    causal: bool
    """Whether a mask hides what comes later."""
    caller: ClassVar[str]
    """What messages call the function that the user called."""

    @abstractmethod
    def describe(self, c: Any, tokens_BT: jax.Array) -> Description:
        """Returns what is known of a config's module. ValueError: it can't be called, or keeps more than weights."""

    @abstractmethod
    def init(self, c: Any, key: jax.Array, tokens_BT: jax.Array) -> dict[str, jax.Array]:
        """Returns fresh weights by their paths."""

    @abstractmethod
    def call(self, c: Any, weights: Mapping[str, jax.Array], batch: Batch, key: Key, dtype: Any) -> Any:
        """Returns what the module with these weights returns; of a tuple the first element.

        `batch` has `tokens` and `segments`, and what else there is. With a `key` dropout is on.
        """

    @cached_property
    def _accepted(self) -> set[str]:
        make: Any = self.make
        if isinstance(make, type):  # the signature of nnx classes themselves says nothing
            make = make.__init__  # type: ignore[misc]
        return set(inspect.signature(make).parameters)

    @property
    def takes_dtype(self) -> bool:
        """Returns whether `make` is given the compute dtype."""
        return "dtype" in self._accepted

    def _made(self, c: Any, key: Key, dtype: Any, **more: Any) -> Any:
        """Returns the module; of dtype and deterministic `make` gets what it takes."""
        options = {"dtype": dtype, "deterministic": key is None}
        return self.make(c, **more, **{name: x for name, x in options.items() if name in self._accepted})

    def _given(self, module: Any) -> dict[str, str | None]:
        """Returns what each argument is given: one of `GIVEN`, the name of a flag, `rngs`, or None."""
        out: dict[str, str | None] = {}
        inputs, kind = INPUTS | dict(self.inputs), type(module)
        for name, parameter in list(inspect.signature(kind.__call__).parameters.items())[2:]:
            if name in FLAGS or name == "rngs":
                out[name] = name
            elif name in inputs:
                out[name] = inputs[name]
            elif parameter.default is parameter.empty and "VAR" not in parameter.kind.name:
                raise ValueError(
                    f"{self.caller}: inputs: {kind.__name__}.__call__ needs {name!r}; say what it is given, one of "
                    f"{', '.join(GIVEN)} or None"
                )
        if unknown := self.inputs.keys() - out.keys():
            raise ValueError(
                f"{self.caller}: inputs: {kind.__name__}.__call__ has no argument {min(unknown)!r}; drop it"
            )
        return out

    def _arguments(self, module: Any, batch: Batch, key: Key) -> dict[str, Any]:
        return {name: self._argument(what, batch, key) for name, what in self._given(module).items()}

    def _argument(self, what: str | None, batch: Batch, key: Key) -> Any:
        tokens_BT, segments_BT = batch["tokens"], batch["segments"]
        if what in FLAGS:
            return FLAGS[what] == (key is not None)
        if what == "rngs":
            return None if key is None else nnx.Rngs(key)
        if what == "positions":
            return batch.get(what, jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape))
        if what == "types":
            return batch.get(what, jnp.zeros_like(tokens_BT))
        if what in ("mask", "mask_BTT"):
            mask = Mask(self.causal, None, segments_BT, segments_BT, batch.get("prefix"))
            visible_BTT = mask.dense(0, tokens_BT.shape[1], 0, tokens_BT.shape[1])
            assert visible_BTT is not None
            return visible_BTT if what == "mask_BTT" else visible_BTT[:, None]
        return segments_BT if what == "segments" else None


class LinenModules(FlaxModules):
    """Modules of flax.linen: `make(config)`. Dropout draws from the stream `dropout`."""

    caller = "from_linen"

    def describe(self, c: Any, tokens_BT: jax.Array) -> Description:
        module = self._made(c, None, FLOAT32)
        given = self._given(module)
        variables = jax.eval_shape(lambda key, tokens: self._variables(c, key, tokens), jax.random.key(0), tokens_BT)
        if other := sorted(variables.keys() - {"params"}):
            raise ValueError(
                f"{self.caller}: {type(module).__name__} keeps {', '.join(other)} beside its weights, which a train "
                "step has no place for; leave them out, or compute them in __call__"
            )
        boxes = _flat(variables["params"], lambda x: isinstance(x, linen.meta.AxisMetadata))
        named = {path: x for path, x in boxes.items() if isinstance(x, linen.Partitioned)}
        on_mesh = [x.names for x in named.values() if not isinstance(x, linen.LogicallyPartitioned)]
        hides_mesh = any(name is not None and name not in AXES for names in on_mesh for name in names)
        return Description(type(module).__name__, given, {path: x.names for path, x in named.items()}, hides_mesh)

    def init(self, c: Any, key: jax.Array, tokens_BT: jax.Array) -> dict[str, jax.Array]:
        return _flat(linen.meta.unbox(self._variables(c, key, tokens_BT)["params"]))

    def call(self, c: Any, weights: Mapping[str, jax.Array], batch: Batch, key: Key, dtype: Any) -> Any:
        params: dict[str, Any] = {}
        for path, w in weights.items():
            params = tree.put(params, path, w)
        module, rngs = self._made(c, key, dtype), None if key is None else {"dropout": key}
        return _first(
            module.apply({"params": params}, batch["tokens"], rngs=rngs, **self._arguments(module, batch, key))
        )

    def _variables(self, c: Any, key: jax.Array, tokens_BT: jax.Array) -> Any:
        module, batch = self._made(c, None, FLOAT32), {"tokens": tokens_BT, "segments": tokens_BT}
        return module.init(key, tokens_BT, **self._arguments(module, batch, None))


class NnxModules(FlaxModules):
    """Modules of flax.nnx: `make(config, rngs=…)`. Dropout draws from the generators that the module was made with, and
    from `rngs` where its `__call__` takes them."""

    caller = "from_nnx"

    def describe(self, c: Any, tokens_BT: jax.Array) -> Description:
        made: list[Any] = []

        def other_values(key: jax.Array) -> list[Any]:
            made[:] = [self._module(c, key, None, FLOAT32)]
            return list(_others(made[0]).values())

        program = jax.make_jaxpr(other_values)(jax.random.key(0))
        (module,) = made
        for path, random in zip(_others(module), depends(program, {0}), strict=True):
            if random:
                raise ValueError(
                    f"{self.caller}: {path} is drawn at random and is no nnx.Param, so no checkpoint would hold it; "
                    "make it one, and keep it as it is by optim.freeze"
                )
        named = {path: v.get_metadata("out_sharding", None) for path, v in _weights(module).items()}
        names = {path: tuple(n) for path, n in named.items() if n is not None}
        return Description(type(module).__name__, self._given(module), names, False)

    def init(self, c: Any, key: jax.Array, tokens_BT: jax.Array) -> dict[str, jax.Array]:
        return {path: v.get_value() for path, v in _weights(self._module(c, key, None, FLOAT32)).items()}

    def call(self, c: Any, weights: Mapping[str, jax.Array], batch: Batch, key: Key, dtype: Any) -> Any:
        module = self._module(c, jax.random.key(0) if key is None else key, key, dtype)
        module.set_attributes(deterministic=key is None, use_running_average=key is None, raise_if_not_found=False)
        for path, v in _weights(module).items():
            v.set_value(weights[path])
        before = _others(module)
        out = module(batch["tokens"], **self._arguments(module, batch, key))
        for path, value in _others(module).items():
            if value is not before.get(path):
                raise ValueError(
                    f"{self.caller}: {path} changes when {type(module).__name__} is called, and a train step has no "
                    "place for a module's state; leave it out"
                )
        return _first(out)

    def _module(self, c: Any, init_key: jax.Array, key: Key, dtype: Any) -> Any:
        with nnx.use_eager_sharding(False):  # the names of a module's axes are not those of the mesh
            return self._made(c, key, dtype, rngs=nnx.Rngs(init_key))


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def _weights(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Returns a module's parameters by their paths."""
    return {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.variables(module, nnx.Param))}


def _others(module: nnx.Module) -> dict[str, Any]:
    """Returns the values of what else a module holds: neither parameters nor generators of random numbers."""
    found = nnx.to_flat_state(nnx.variables(module, nnx.Not(nnx.Any(nnx.Param, nnx.RngState))))
    return {"/".join(map(str, path)): v.get_value() if isinstance(v, nnx.Variable) else v for path, v in found}


def _flat(params: Any, is_leaf: Callable[[Any], bool] = lambda x: False) -> dict[str, Any]:
    found = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in found}
