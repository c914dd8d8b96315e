"""An `Adapted` puts an adapter on a model's weights: specs, first values, binding, penalties and merging."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import optax

from jaxlm.core import registry, tree
from jaxlm.core import spec as weights
from jaxlm.core.compression import Compression, Stored
from jaxlm.core.config import Adapter
from jaxlm.core.spec import is_spec, stacked
from jaxlm.nn import leaf
from jaxlm.nn.family import Family
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.runtime.mesh import platform
from jaxlm.weights import quantized, stored
from jaxlm.weights.adapters import METHODS, prompt
from jaxlm.weights.adapters.method import Method, TargetedAdapter
from jaxlm.weights.matrices import HEAD, TABLE, TABLE_PATTERNS, Matrix, matrices, select, stored_at
from jaxlm.weights.matrices import tables as tables_of
from jaxlm.weights.quantization_aware import Rounded


@dataclass(frozen=True)
class Adapted:
    """A family's model, its weights as they are stored, with the adapter that a run's settings `c` put on it."""

    c: Adapter
    family: Family
    config: Any
    compression: Compression = dataclasses.field(default_factory=Compression)

    @property
    def method(self) -> Method[Any]:
        return METHODS.of(self.c)

    @property
    def name(self) -> str:
        """The method's registered name."""
        return registry.name_of(self.c)

    @cached_property
    def base(self) -> Any:
        """The specs of the model's own weights, as published files have them."""
        return self.family.specs(self.config)

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        return matrices(self.family, self.config)

    @cached_property
    def compressed(self) -> dict[str, Stored]:
        """Returns how each compressed matrix is stored that isn't one array of numbers. ValueError: the model has no
        such matrix, or the format isn't known or doesn't fit it."""
        found = {}
        for path, how in self.compression.by_path().items():
            if path not in self.matrices:
                raise ValueError(f"compression.weights: this model's layers have no matrix {path}")
            if not how.is_array:
                found[path] = how
        if found and self.c.base != "float32":
            first, how = next(iter(found.items()))
            raise ValueError(f"adapter.base: {first} is stored as {how} already; leave it float32")
        return found

    def check_trained(self) -> None:
        """Refuses to train all weights of a model whose matrices are stored in few bits. ValueError: there are such."""
        rounded = {path: how for path, how in self.compressed.items() if how.format is not None}
        if rounded and type(self.c) is Adapter:
            path, how = next(iter(rounded.items()))
            raise ValueError(
                f"adapter: {path} is stored as {how}, which can't be trained; train an adapter on it, as `adapter` lora"
            )

    @cached_property
    def targets(self) -> dict[str, Matrix]:
        """Returns the matrices that get an adapter."""
        if not isinstance(self.c, TargetedAdapter):
            return {}
        patterns = tuple(t for t in self.c.targets if t not in TABLE_PATTERNS)
        if not patterns and self.c.targets:
            return {}
        patterns = patterns or self.method.targets
        if not self.matrices:
            raise ValueError(
                f"adapter: {self.name}: this model's layers have no matrices that adapters could be put on; choose "
                "bitfit or norms, which train weights of its own"
            )
        return select(self.matrices, patterns)

    @cached_property
    def tables(self) -> dict[str, Matrix]:
        """Returns the table of embeddings and the head, if they get an adapter."""
        names = set(self.c.targets if isinstance(self.c, TargetedAdapter) else ()) & TABLE_PATTERNS.keys()
        found = tables_of(self.family, self.config) if names else {}
        chosen = {TABLE_PATTERNS[name] for name in names}
        if chosen - found.keys() or (names and self.method.bind_table is None):
            raise ValueError(
                f"adapter.targets: {min(chosen)}: {self.name} can't be put on it in this model; leave it out, or put "
                "lora on a decoder"
            )
        return {path: m for path, m in found.items() if path in chosen}

    @property
    def num_virtual_tokens(self) -> int:
        """How many virtual tokens stand before each row."""
        return 0 if (virtual := self.method.virtual_tokens) is None else virtual.count(self.c)

    @property
    def num_common_keys(self) -> int:
        """How many keys every query of a row sees, whatever its segment."""
        return self.method.num_common_keys(self.c)

    def specs(self) -> dict[str, Any]:
        """Returns all weights as they are stored: the model's, and the adapter's."""
        c, method = self.c, self.method
        out = dict(self.base)
        if c.base != "float32":
            if not self.matrices:
                raise ValueError(
                    f"adapter.base: this model's layers have no matrices that could be stored as {c.base}; use float32"
                )
            if any(map(self.trainable, self.matrices)):
                raise ValueError(f"adapter.base: {c.base} weights can't be trained; choose a method, as `adapter` lora")
            for path, m in self.matrices.items():
                out = tree.put(out, path, quantized.specs(m.spec, m.ins, m.outs, c.base))
        for path, how in self.compressed.items():
            out = tree.put(out, path, stored.specs(self.matrices[path], how))
        adapter: dict[str, Any] = {}
        for path, target in self.targets.items():
            made = stacked(target.layers, method.specs(c, target), above=target.spec.layers_above)
            adapter = tree.put(adapter, path, made)
        for path, target in self.tables.items():
            made = {n: s._replace(below_layers=path == TABLE) for n, s in method.specs(c, target).items()}
            adapter = tree.put(adapter, path, made)
        if self.targets and (shared := method.shared(c, self.targets)):
            adapter["shared"] = shared
        if method.virtual_tokens is not None and self.num_virtual_tokens:
            if not is_spec(self.base.get("embed")):
                raise ValueError(
                    f"adapter: {self.name}: this model has no table `embed` that virtual tokens could be put into; "
                    "choose bitfit or norms, which train weights of its own"
                )
            adapter["prompt"] = method.virtual_tokens.specs(c, self.config.width)
        if method.trained_roles and not self._trained_base:
            raise ValueError(
                f"adapter: {self.name}: this model has no {method.trained_roles[0]}; choose another method"
            )
        return out | ({"adapter": adapter} if adapter else {})

    @cached_property
    def _trained_base(self) -> set[str]:
        """The paths of the base's own weights that are trained."""
        roles, base = self.method.trained_roles, self.base
        for path, how in self.compressed.items():
            if how.format is None:  # factors are trained as the matrix would be
                base = tree.put(base, path, stored.specs(self.matrices[path], how))
        return {path for path, s in tree.flatten(base, is_spec).items() if s.role in roles}

    def products(self) -> dict[str, int]:
        """Returns of weights under `adapter/` which are no layer's own how many numbers a token is multiplied with, by
        their paths: of those that targets share each target's part, of a table's update that which isn't looked up."""
        adapter = self.specs().get("adapter", {})
        out = {f"adapter/{path}/{name}": math.prod(s.shape) for path, m in self.tables.items()
               for name, s in tree.at(adapter, path).items() if (path, name) != (TABLE, "a")}  # fmt: skip
        for path, target in self.targets.items() if "shared" in adapter else ():
            own, shared = (weights.abstract(x) for x in (tree.at(adapter, path), adapter["shared"]))
            bind = partial(self.method.bind, self.c, target, None)
            made = jax.eval_shape(lambda own, shared, bind=bind: bind(own, shared, None), own, shared)
            arrays = jax.tree_util.tree_flatten_with_path(made)[0]
            out[f"adapter/shared/{path}"] = sum(
                math.prod(x.shape) for (field, *_), x in arrays if field.name not in (*own, *made.vectors)
            )
        return out

    def trainable(self, path: str) -> bool:
        """Returns whether a weight is trained. What is neither the model's nor the adapter's, a task's head, always
        is."""
        if path.startswith("adapter/"):
            return not path.startswith("adapter/shared/") and path.rpartition("/")[2] not in self.method.frozen
        return path in self._trained_base or path.split("/")[0] not in self.base

    def in_frozen_base(self, path: str) -> bool:
        """Returns whether a weight is the base's and stays as it was: a run stores it once, beside its checkpoints."""
        return path.split("/")[0] in self.base and not self.trainable(path)

    def rate(self, path: str) -> float:
        """Returns what a weight's learning rate is multiplied by."""
        return self.method.rate(self.c, path.rpartition("/")[2]) if path.startswith("adapter/") else 1.0

    def wrap_optimizer(self, tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        """Returns the optimizer with what the method does after each update."""
        return self.method.wrap_optimizer(self.c, tx, steps)

    @property
    def changes(self) -> bool:
        """Says whether the model has an adapter, or weights that aren't plain arrays."""
        return self.c != Adapter() or bool(self.compressed) or bool(self.compression.aware)

    def summary(self, specs: Any, trainable: Callable[[str], bool]) -> str:
        """Returns a line that says what is trained and of how many weights."""
        flat = tree.flatten(specs, is_spec)
        trained = sum(math.prod(s.shape) for path, s in flat.items() if trainable(path))
        whole = weights.count(self.base)
        names = [*self.targets, *self.tables]
        on = f" on {' '.join(names)}" if names else ""
        kinds = sorted({str(how) for how in self.compressed.values()} | {self.c.base} - {"float32"})
        stored = f", matrices of the layers as {' and '.join(kinds)}" if kinds else ""
        return (
            f"{self.name}{on}: {trained:,} weights are trained, {trained / whole:.2%} of the model's {whole:,}{stored}"
        )

    def prompt_ids(self, tokenizer: Any) -> list[int] | None:
        """Returns the tokens whose embeddings virtual tokens begin as; None: tokens at random, or nothing."""
        virtual, n = self.method.virtual_tokens, self.num_virtual_tokens
        if virtual is None or not virtual.text(self.c):
            return None
        ids = tokenizer.encode(virtual.text(self.c))
        return (ids * -(-n // max(1, len(ids))))[:n]

    def initial_values(
        self, params: Any, prompt_ids: Sequence[int] | None = None, key: jax.Array | None = None, fresh: bool = True
    ) -> Any:
        """Returns what weights are at the first step, from the model's own and an adapter, which may be `fresh`."""
        c, method = self.c, self.method
        out = dict(params)
        for path, m in self.matrices.items() if c.base != "float32" else ():
            if isinstance(tree.at(params, path), dict):  # has its few bits already
                continue
            out = tree.put(out, path, quantized.KINDS[c.base](tree.at(params, path), m.ins, m.outs))
        for path, how in self.compressed.items():
            if not isinstance(w := tree.at(params, path), dict):
                out = tree.put(out, path, stored.arrays(stored.nearest(self.matrices[path], how, w)))
        if not fresh:
            return out
        for path, target in self.targets.items() if method.initial_values is not None else ():
            assert method.initial_values is not None
            base = tree.at(params, path) if method.needs_whole_base else self._base_leaf(out, target)
            values = method.initial_values(c, target, base, tree.at(params["adapter"], path))
            out["adapter"] = tree.put(out["adapter"], path, values)
        if self.num_virtual_tokens:
            if prompt_ids is None:
                assert key is not None
                prompt_ids = jax.random.randint(key, (self.num_virtual_tokens,), 0, self.config.vocab)  # type: ignore[assignment]
            values = prompt.initial_rows(params["embed"], prompt_ids, params["adapter"]["prompt"])
            out["adapter"] = out["adapter"] | {"prompt": values}
        return out

    def init(self, specs: Any, key: jax.Array, prompt_ids: Sequence[int] | None = None, existing: Any = None) -> Any:
        """Returns fresh weights of `specs` (this model's and its heads') but for those that are `existing`; of an
        adapter that grows a part is."""
        existing = dict(existing or {})
        if "adapter" in existing and self.method.growth is not None:
            made = weights.init({"adapter": specs["adapter"]}, key)["adapter"]
            for path, x in tree.flatten(existing["adapter"]).items():
                made = tree.put(made, path, x)
            existing["adapter"] = made
        base = self.base if self.changes else {}  # else `specs` are the model's own
        made = weights.init({name: base.get(name, s) for name, s in specs.items() if name not in existing}, key)
        key = jax.random.fold_in(key, 1)
        return self.initial_values(made | existing, prompt_ids, key, fresh="adapter" not in existing)

    def grown(self, before: "Adapted", adapter: Any) -> Any:
        """Returns the part of an adapter that comes from `adapter`, which the model had before. ValueError: that was on
        other matrices."""
        growth = self.method.growth
        assert growth is not None
        if self.targets.keys() != before.targets.keys():
            raise ValueError(
                f"adapter.targets: {' '.join(self.targets)} here, and the adapter that this run starts from is on "
                f"{' '.join(before.targets)}; leave adapter.targets out"
            )
        out: dict[str, Any] = {}
        for path, target in self.targets.items():
            out = tree.put(out, path, growth.weights(self.c, before.c, target, tree.at(adapter, path)))
        return out

    def column(self, adapter: Any, number: int) -> Any:
        """Returns an adapter that grows by columns as it was when `number` was its newest."""
        growth = self.method.growth
        assert growth is not None and growth.columns is not None
        if growth.columns.last(self.c) == number:
            return adapter
        out: dict[str, Any] = {}
        for path in self.targets:
            out = tree.put(out, path, growth.columns.weights(tree.at(adapter, path), number))
        return out

    def _base_leaf(self, params: Any, m: Matrix) -> Any:
        w = tree.at(params, m.path)
        if isinstance(w, dict):
            how = self.compressed.get(m.path)
            return quantized.bound(w, m.outs) if how is None else stored.bound(m, how, w)
        return w

    def bind(self, params: Any, key: jax.Array | None = None) -> Any:
        """Returns the weights with every one as the leaf that does its work. What is bound already stays."""
        c, method = self.c, self.method
        out = {name: value for name, value in params.items() if name != "adapter"}
        adapter = params.get("adapter")
        trained_for = self.compression.aware_format()
        for path, m in self.matrices.items():
            w = tree.at(params, path)  # None: it is prepared for decoding, as an array for each layer
            if isinstance(w, dict):
                out = tree.put(out, path, self._base_leaf(out, m))
            elif trained_for is not None and isinstance(w, jax.Array) and m.spec.role == "matrix":
                out = tree.put(out, path, Rounded(w, trained_for, m.in_shape, m.out_shape))
        if adapter is None:
            return out
        n = len(self.targets)
        keys = [None] * n if key is None else jax.random.split(key, max(1, n))
        for (path, target), k in zip(self.targets.items(), keys, strict=False):
            bound = method.bind(c, target, tree.at(out, path), tree.at(adapter, path), adapter.get("shared", {}), k)
            out = tree.put(out, path, bound)
        for path in {stored_at(path, self.base) for path in self.tables}:
            assert method.bind_table is not None
            parts = [adapter.get(t) if stored_at(t, self.base) == path else None
                     for t in (TABLE, HEAD)]  # fmt: skip
            out[path] = method.bind_table(c, out[path], *parts)
        if method.virtual_tokens is not None and self.num_virtual_tokens:
            out["embed"] = prompt.Prompted(out["embed"], method.virtual_tokens.rows(adapter["prompt"]))
        return out

    def layout(self, shard: Layout) -> Layout:
        """Returns the layout for the model's own blocks, with a note of virtual tokens that every segment of a row
        sees: they are no mask of splash's."""
        asked = shard.execution.attention
        if not self.num_virtual_tokens or self.family.kind != "decoder":
            return shard
        shard = dataclasses.replace(shard, shared_keys=True)
        if asked in ("xla", "cudnn") or platform() != "tpu":
            return shard
        if asked == "splash":
            raise ValueError(
                f"execution.attention: splash has no keys that all queries see (`adapter` {self.name}); use auto or xla"
            )
        return dataclasses.replace(shard, execution=dataclasses.replace(shard.execution, attention="xla"))

    def with_virtual_tokens(self, batch: dict, cache: Any, shard: Layout) -> dict:
        """Returns the batch with virtual tokens before its rows: an encoder-decoder's before the source."""
        if not (n := self.num_virtual_tokens):
            return batch
        if self.family.kind == "encoder_decoder":
            names = ("source", "source_positions", "source_segments")
            return prompt.prepended(batch, names, self.config.vocab, n, False, shard) if "source" in batch else batch
        if cache is not None and not cache.fresh:
            return batch | {"positions": batch["positions"] + n}
        everyone = self.family.kind == "decoder"
        return prompt.prepended(batch, ("tokens", "positions", "segments"), self.config.vocab, n, everyone, shard)

    def without_virtual_tokens(self, out: Output, cache: Any, shard: Layout) -> Output:
        """Returns a model's output without what came of the virtual tokens."""
        n = self.num_virtual_tokens
        if not n or self.family.kind == "encoder_decoder" or (cache is not None and not cache.fresh):
            return out
        x_BTD = shard(out.x_BTD, "batch", None, None)[:, n:]
        return out.replace(x_BTD=shard(x_BTD, "batch", "seq", None))

    def penalty(self, params: Any) -> jax.Array | None:
        """Returns what is added to the mean loss; None: nothing."""
        return None if self.method.penalty is None else self.method.penalty(self.c, params)

    def merged(self, params: Any) -> Any:
        """Returns the model's own weights, dense and in float32, with the adapter in them."""
        if not self.method.mergeable:
            raise ValueError(f"adapter: {self.name} is no change of weights, so it can't be merged into them")
        bound = self.bind(params)
        out = {name: bound[name] for name in self.base}
        for path in self.matrices:
            w = tree.at(bound, path)
            if (bias := tree.at(out, f"{path}_bias")) is not None:
                out = tree.put(out, f"{path}_bias", leaf.leaf_of(w).dense_bias(bias))
            out = tree.put(out, path, leaf.dense(w))
        if self.tables:
            table, head = (bound[stored_at(t, self.base)] for t in (TABLE, HEAD))
            out |= {TABLE: leaf.dense(table), HEAD: leaf.dense_head(head)}
        return out

    @property
    def merged_config(self) -> Any:
        """The configuration of the model that `merged` makes: a head that had another update than its table is a head
        of its own."""
        tied = self.tables and HEAD not in self.base
        return dataclasses.replace(self.config, tied=False) if tied else self.config

    @property
    def disabled(self) -> "Adapted":
        """The base model alone, as it is stored."""
        return dataclasses.replace(self, c=Adapter(base=self.c.base))
