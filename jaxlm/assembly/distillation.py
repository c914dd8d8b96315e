"""Holds what a run knows of its teacher: the teacher's model and head, which layers are compared, and the losses that a
step adds to those of the run's objective."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.assembly.model_source import Source
from jaxlm.assembly.run_objective import BoundObjective
from jaxlm.core import spec
from jaxlm.core.distillation import Distill
from jaxlm.data.teacher_logits import LEAVES
from jaxlm.models.model import Model, TappedModel
from jaxlm.nn.taps import HIDDEN
from jaxlm.objectives import OBJECTIVES, distill
from jaxlm.objectives.objective import DeviceBatch, Sums
from jaxlm.objectives.outputs import Predicted, Stored

PROJECTIONS = "distill"  # learned maps from the student's states to the teacher's stand at `distill/NUMBER`
MEMORY = "distill"  # the teacher's weights, in the memory of a state
LOSS = "teacher"  # the name of the losses on states and relations, whose total is the number of tokens
SAMPLED = "sampled"  # the leaf of a batch whose texts the student wrote
CACHED = tuple(LEAVES)  # leaves of a batch: what the teacher predicted, as `Stored` has it


@dataclass(frozen=True)
class Distillation:
    """A Distillation is a teacher bound to a run."""

    c: Distill
    source: Source
    model: Model
    """The teacher, with the layout of the run's mesh."""
    specs: Any
    """Of its weights as they are stored."""
    objective: Any
    """The settings that its predictions are read by; None: nobody reads them."""
    order: tuple[int, ...] | None
    """Where each class of the run stands among the teacher's; None: in the same place."""
    pairs: tuple[tuple[int, int], ...]
    """(student's layer, teacher's layer) whose hidden states are compared."""
    layers: tuple[int, int]
    """The layers whose relations are compared."""
    heads: int
    """Relation heads."""
    widths: tuple[int, int]
    used: int | None
    """Tokens in use, where predictions are over the vocabulary."""

    @property
    def place(self) -> str:
        """Returns where the teacher was found."""
        return self.c.teacher

    @property
    def wanted(self) -> frozenset[str]:
        """Returns the activations of layers that losses compare."""
        states = {HIDDEN} if "hidden" in self.c.losses else set()
        return frozenset(states | set(self.c.relations.of if "relations" in self.c.losses else ()))

    @property
    def reads_each_batch(self) -> bool:
        """Says whether the teacher reads the batches of a step; else its logits are part of them."""
        return not self.c.cache

    def describe(self) -> dict[str, str]:
        """Returns a line on what is learned from the teacher, for people."""
        labels = f" beside {self.c.labels:g} × the labels' loss" if self.c.labels else ", and nothing from the labels"
        parts = [f"{getattr(self.c, name).weight:g} × {self._said(name)}" for name in self.c.losses]
        where = f"; its logits lie in {self.c.cache}" if self.c.cache else ""
        policy = self.c.on_policy
        own = f"; {policy.share:.0%} of the updates are on texts that the student writes" if policy.share else ""
        return {"teacher": f"{self.place}: {', '.join(parts)}{labels}{where}{own}"}

    def _said(self, name: str) -> str:
        c = self.c
        if name == "logits":
            top = f" of the {c.logits.top_k} likeliest classes" if c.logits.top_k else ""
            return f"logits{top} ({c.logits.divergence}, T = {c.logits.temperature:g})"
        if name == "hidden":
            return f"hidden ({c.hidden.measure}, layers {' '.join(f'{a}={b}' for a, b in self.pairs)})"
        return f"relations of {''.join(c.relations.of)} (layer {self.layers[0]}={self.layers[1]}, {self.heads} heads)"

    def head_specs(self) -> dict[str, Any]:
        """Returns the specs of the learned maps between states of different widths."""
        mine, theirs = self.widths
        if "hidden" not in self.c.losses or not (self.c.hidden.project or mine != theirs):
            return {}
        one = spec.Spec((mine, theirs), ("embed", None), spec.fan_in(0))
        return {PROJECTIONS: {str(i): one for i in range(len(self.pairs))}}

    def shardings(self, mesh: jax.sharding.Mesh | None) -> Any:
        """Returns where the teacher's weights rest. ValueError: the mesh doesn't divide them."""
        try:
            return self.model.shard.shardings(self.specs, mesh)
        except ValueError as error:
            raise ValueError(f"distill.teacher: {self.place}: {error}") from error

    def memory_like(self, mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
        """Returns the shapes and shardings of what a step needs of the teacher, by its name in a state's memory."""
        return {MEMORY: spec.abstract(self.specs, self.shardings(mesh))} if self.reads_each_batch else {}

    def student(self, model: Model, reads: frozenset[str]) -> TappedModel:
        """Returns the student for one trace of the loss. `reads`: names at the top of the weights that its states
        depend on."""
        return _tapped(model, reads, self.wanted)

    def predictions(self, model: Model, weights: Any, batch: DeviceBatch) -> Predicted:
        """Computes the teacher's predictions, its classes in the order of the run's."""
        made = OBJECTIVES.of(self.objective).outputs
        assert made is not None
        found = made(self.objective, model, weights, batch)
        if self.order is None or not isinstance(found.logits, jax.Array):
            return found
        return found._replace(logits=jnp.take(found.logits, jnp.array(self.order), axis=-1))

    def losses(
        self, student: TappedModel, weights: Any, teacher: Any, batch: DeviceBatch, known: Stored | None,
        objective: BoundObjective,
    ) -> tuple[dict[str, jax.Array], Sums]:  # fmt: skip
        """Computes what is added to the objective's first loss, by name, and losses of their own total, with the
        weights applied. `teacher`: its weights, or None where `known` has its predictions."""
        c, own = self.c, dict[str, jax.Array]()
        other = _tapped(self.model, frozenset(self.specs), self.wanted)
        teacher = jax.lax.stop_gradient(teacher)
        if "logits" in c.losses:
            before = known if known is not None else self.predictions(other, teacher, batch)
            now = objective.outputs(student, weights, batch)
            own["distill"] = c.logits.weight * distill.logits(c.logits, before, now, self.used, student.shard)
        parts: dict[str, jax.Array] = {}
        if self.wanted:
            mine, theirs = (_seen(m, w, batch) for m, w in ((student, weights), (other, teacher)))
            if "hidden" in c.losses:
                maps = weights.get(PROJECTIONS, {})
                found = distill.hidden(c.hidden, self.pairs, maps, mine, theirs, student.shard)
                parts["hidden"] = c.hidden.weight * found
            if "relations" in c.losses:
                found = distill.relations(c.relations, self.layers, self.heads, mine, theirs, student.shard)
                parts["relations"] = c.relations.weight * found
        return own, ({LOSS: {"loss": sum(parts.values(), jnp.zeros(())), **parts}} if parts else {})

    def totals(self, batch: DeviceBatch) -> dict[str, jax.Array]:
        """Computes the total weights of the losses on states and relations."""
        return {LOSS: distill.real_tokens(batch)} if self.wanted else {}


def _tapped(m: Model, reads: frozenset[str], wanted: frozenset[str]) -> TappedModel:
    return TappedModel(m.family, m.config, m.specs, m.shard, m.adapter, m.ids_in_use, reads, wanted=wanted)


def _seen(model: TappedModel, weights: Any, batch: DeviceBatch) -> Any:
    """Returns what the layers did in the model's pass over a batch, which is made if nothing else made it."""
    if not model.seen:
        model.forward(weights, batch)
    return model.seen[0]


def own_leaves(batch: DeviceBatch) -> tuple[DeviceBatch, Stored | None, bool]:
    """Returns a batch without what belongs to distillation, what a teacher predicted of it or None, and whether the
    student wrote its texts."""
    plain: Any = {name: leaf for name, leaf in batch.items() if name not in (*CACHED, SAMPLED)}
    known = [batch[name] for name in CACHED if name in batch]  # type: ignore[literal-required]
    return plain, Stored(*known) if known else None, SAMPLED in batch
