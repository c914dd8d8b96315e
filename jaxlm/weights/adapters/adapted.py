"""A model's weights with an adapter on them: specs, first values, binding, penalties and merging."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import optax

from jaxlm.core import spec as weights
from jaxlm.core import tree
from jaxlm.core.config import Adapter
from jaxlm.core.spec import Role, is_spec, stacked
from jaxlm.nn.family import Family
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.runtime.mesh import platform
from jaxlm.weights import quantized
from jaxlm.weights.adapters import METHODS, adalora, prompt
from jaxlm.weights.sites import Site, chosen, matrices

PROMPTS = ("prompt", "p_tuning")


# Methods that train weights of the model itself: the roles of those.
OWN: dict[str, tuple[Role, ...]] = {
    "bitfit": ("bias", "norm_bias", "selection_bias"),
    "norms": ("norm", "norm_bias"),
}


@dataclass(frozen=True)
class Adapted:
    """A family's model with what a run adds to it."""

    c: Adapter
    family: Family
    config: Any

    @cached_property
    def base(self) -> Any:
        """The model's own weights, as published files have them."""
        return self.family.specs(self.config)

    @cached_property
    def every(self) -> dict[str, Site]:
        return matrices(self.family, self.config)

    @cached_property
    def sites(self) -> dict[str, Site]:
        if (method := METHODS.get(self.c.method)) is None:
            if self.c.targets:
                raise ValueError(f"adapter.targets: {self.c.method or 'training all weights'} has none; leave it out")
            return {}
        usual = method.TARGETS[self.c.method] if isinstance(method.TARGETS, dict) else method.TARGETS
        return chosen(self.every, self.c.targets or usual)

    @property
    def places(self) -> int:
        """Virtual tokens before each row."""
        return self.c.tokens if self.c.method in PROMPTS else 0

    @property
    def common(self) -> int:
        """Keys that every query of a row sees, whatever its segment."""
        return self.c.tokens if self.c.method in (*PROMPTS, "prefix") else 0

    def specs(self) -> dict[str, Any]:
        """All weights as they rest: the model's, and the adapter's."""
        c = self.c
        out = dict(self.base)
        if c.base != "float32":
            if not c.method:
                raise ValueError(f"adapter.base: {c.base} weights can't be trained; choose an adapter.method")
            for path, s in self.every.items():
                out = tree.put(out, path, quantized.specs(s.spec, s.ins, s.outs, c.base))
        own: dict[str, Any] = {}
        for path, s in self.sites.items():
            own = tree.put(own, path, stacked(s.layers, METHODS[c.method].specs(c, s)))
        if self.sites and hasattr(METHODS[c.method], "shared"):
            own |= {"shared": held} if (held := METHODS[c.method].shared(c, self.sites)) else {}
        if self.places:
            own["prompt"] = prompt.specs(c, self.config.width)
        if c.method in OWN and not self._own:
            raise ValueError(f"adapter.method: {c.method}: this model has no {OWN[c.method][0]}; choose another method")
        return out | ({"adapter": own} if own else {})

    @cached_property
    def _own(self) -> set[str]:
        """Returns the paths of the model's own weights that the method trains."""
        roles = OWN.get(self.c.method, ())
        return {path for path, s in tree.flatten(self.base, is_spec).items() if s.role in roles}

    def trainable(self, path: str) -> bool:
        """Whether a weight is. What is neither the model's nor the adapter's, a task's head, always is."""
        if not self.c.method:
            return True
        if path.startswith("adapter/"):
            frozen = getattr(METHODS.get(self.c.method), "FROZEN", ())
            return not path.startswith("adapter/shared/") and path.rpartition("/")[2] not in frozen
        if path in self._own:
            return True
        return path.split("/")[0] not in self.base

    def rests(self, path: str) -> bool:
        """Whether a weight is the base's and stays as it was: what a run keeps once, beside its checkpoints."""
        return bool(self.c.method) and path.split("/")[0] in self.base and not self.trainable(path)

    def rate(self, path: str) -> float:
        """What a weight's learning rate is multiplied by."""
        return self.c.b_lr if path.startswith("adapter/") and path.endswith("/b") else 1.0

    def allocator(self, tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        """The optimizer with what the method does after each update."""
        return adalora.allocating(tx, self.c, steps) if self.c.method == "adalora" else tx

    @property
    def changes(self) -> bool:
        """Whether the model's weights are anything but plain arrays."""
        return bool(self.c.method) or self.c.base != "float32"

    def told(self, specs: Any, trainable: Callable[[str], bool]) -> str:
        """What is trained of how many weights, in words."""
        c, flat = self.c, tree.flatten(specs, is_spec)
        trained = sum(math.prod(s.shape) for path, s in flat.items() if trainable(path))
        whole = weights.count(self.base)
        on = f" on {' '.join(self.sites)}" if self.sites else ""
        rests = f", matrices of the layers as {c.base}" if c.base != "float32" else ""
        return f"{c.method}{on}: {trained:,} weights are trained, {trained / whole:.2%} of the model's {whole:,}{rests}"

    def start(
        self, params: Any, prompt_ids: Sequence[int] | None = None, key: jax.Array | None = None, fresh: bool = True
    ) -> Any:
        """From the model's own weights and an adapter, `fresh` or not, to what they are at the first step."""
        c, method = self.c, METHODS.get(self.c.method)
        out = dict(params)
        for path, s in self.every.items() if c.base != "float32" else ():
            if isinstance(tree.at(params, path), dict):  # has its few bits already
                continue
            out = tree.put(out, path, quantized.KINDS[c.base](tree.at(params, path), s.ins, s.outs))
        if not fresh:
            return out
        if method is not None and hasattr(method, "start"):
            for path, s in self.sites.items():
                base = tree.at(params, path) if c.method == "pissa" else self._leaf(out, s)
                own = method.start(c, s, base, tree.at(params["adapter"], path))
                out["adapter"] = tree.put(out["adapter"], path, own)
        if self.places:
            if prompt_ids is None:
                assert key is not None
                prompt_ids = jax.random.randint(key, (self.places,), 0, self.config.vocab)  # type: ignore[assignment]
            own = prompt.start(params["embed"], prompt_ids, params["adapter"]["prompt"])
            out["adapter"] = out["adapter"] | {"prompt": own}
        return out

    def init(self, specs: Any, key: jax.Array, prompt_ids: Sequence[int] | None = None, given: Any = None) -> Any:
        """Fresh weights of `specs` (this model's and its heads') but for those that are `given`."""
        given = given or {}
        made = weights.init({name: self.base.get(name, s) for name, s in specs.items() if name not in given}, key)
        return self.start(made | given, prompt_ids, jax.random.fold_in(key, 1), fresh="adapter" not in given)

    def _leaf(self, params: Any, s: Site) -> Any:
        held = tree.at(params, s.path)
        return quantized.bound(held, s.outs) if isinstance(held, dict) else held

    def bind(self, params: Any, key: jax.Array | None = None) -> Any:
        """With every weight as the leaf that does its work. What is bound already stays."""
        c = self.c
        out = {name: value for name, value in params.items() if name != "adapter"}
        own = params.get("adapter")
        if c.base in ("nf4", "int8"):
            for path, s in self.every.items():
                if isinstance(tree.at(params, path), dict):
                    out = tree.put(out, path, self._leaf(out, s))
        if own is None:
            return out
        keys = [None] * len(self.sites) if key is None else jax.random.split(key, max(1, len(self.sites)))
        for (path, s), k in zip(self.sites.items(), keys, strict=False):
            leaf = METHODS[c.method].bind(c, s, tree.at(out, path), tree.at(own, path), own.get("shared", {}), k)
            out = tree.put(out, path, leaf)
        if self.places:
            out["embed"] = prompt.Prompted(out["embed"], prompt.rows(own["prompt"]))
        return out

    def layout(self, shard: Layout) -> Layout:
        """For the model's own blocks. Virtual tokens that every segment of a row sees are no mask of splash's."""
        asked = shard.execution.attention
        if not self.places or self.family.kind != "decoder" or asked in ("xla", "cudnn") or platform() != "tpu":
            return shard
        if asked == "splash":
            raise ValueError(
                f"execution.attention: splash has no keys that all queries see (adapter.method={self.c.method}); "
                "use auto or xla"
            )
        return dataclasses.replace(shard, execution=dataclasses.replace(shard.execution, attention="xla"))

    def read(self, batch: dict, cache: Any, shard: Layout) -> dict:
        """The batch with virtual tokens before its rows: an encoder-decoder's before the source."""
        if not (n := self.places):
            return batch
        if self.family.kind == "encoder_decoder":
            names = ("source", "source_positions", "source_segments")
            return prompt.before(batch, names, self.config.vocab, n, False, shard) if "source" in batch else batch
        if cache is not None and not cache.fresh:
            return batch | {"positions": batch["positions"] + n}
        everyone = self.family.kind == "decoder"
        return prompt.before(batch, ("tokens", "positions", "segments"), self.config.vocab, n, everyone, shard)

    def cut(self, out: Output, cache: Any, shard: Layout) -> Output:
        """Without what came of the virtual tokens."""
        if not self.places or self.family.kind == "encoder_decoder" or (cache is not None and not cache.fresh):
            return out
        x_BTD = shard(out.x_BTD, "batch", None, None)[:, self.places :]
        return out.replace(x_BTD=shard(x_BTD, "batch", "seq", None))

    def penalty(self, params: Any) -> jax.Array | None:
        """What is added to the mean loss."""
        return adalora.penalty(params, self.c.orthogonal) if self.c.method == "adalora" else None

    def merged(self, params: Any) -> Any:
        """The model's own weights, dense and in float32, with the adapter in them."""
        bound = self.bind(params)
        out = {name: bound[name] for name in self.base}
        if self.places or not all(hasattr(tree.at(bound, path), "merged") for path in self.sites):
            raise ValueError(
                f"adapter.method: {self.c.method} is no change of weights, so it can't be merged into them"
            )
        for path in self.every:
            leaf = tree.at(bound, path)
            if (
                path in self.sites
                and hasattr(leaf, "merged_bias")
                and (bias := tree.at(out, f"{path}_bias")) is not None
            ):
                out = tree.put(out, f"{path}_bias", leaf.merged_bias(bias))
            out = tree.put(out, path, leaf.merged() if path in self.sites else quantized.dense(leaf))
        return out

    @property
    def disabled(self) -> "Adapted":
        """The base model alone, as it rests."""
        return dataclasses.replace(self, c=Adapter(base=self.c.base))
