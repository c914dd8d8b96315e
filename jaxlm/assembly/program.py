"""A `Run` becomes the parts of its program: names become functions and data here, and nowhere below."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly import choices, continual_methods, distillation, teacher_fit
from jaxlm.assembly import earlier as earlier_tasks
from jaxlm.assembly.choices import Choices
from jaxlm.assembly.model_source import Source
from jaxlm.assembly.run_objective import BoundObjective, bind_run
from jaxlm.core import config, config_io, registry, spec, tree
from jaxlm.data import loader, packing, replay
from jaxlm.models import MODELS
from jaxlm.models.model import Model, SharingModel, TappedModel
from jaxlm.nn import matmul, pipeline
from jaxlm.nn.layout import Layout, batch_sharding, check_batch
from jaxlm.objectives import OBJECTIVES
from jaxlm.objectives.objective import DeviceBatch, ExampleReader, Objective, Sums, TextPairs, Tokenizer
from jaxlm.runtime import compiler_options as compiler
from jaxlm.runtime import mesh as meshes
from jaxlm.runtime import processes
from jaxlm.runtime.given import Given
from jaxlm.training import optimizers, step
from jaxlm.training.distributed import replicas
from jaxlm.training.distributed.fragments import Fragments
from jaxlm.training.kept_zeros import keep_zeros
from jaxlm.weights import matrices, parametrization
from jaxlm.weights.adapters import adapted

HOURS = 3600.0  # how long barriers wait: a process that has died is found at once, so only one that hangs takes so long
LARGE = 1 << 20  # elements from which a weight must not rest unsharded on a mesh that could shard it


@dataclass(frozen=True)
class Program:
    """A program is everything of a run that isn't weights or data."""

    run: config.Run
    mesh: jax.sharding.Mesh | None
    layout: Layout
    specs: Any
    model: Model
    adapter: adapted.Adapted
    objective: BoundObjective
    optimizer: optimizers.Optimizer
    choices: Choices
    """The choices that were made, and why."""
    earlier: earlier_tasks.Earlier = dataclasses.field(default_factory=earlier_tasks.nothing)
    """The tasks that the model learned before, and what keeps them."""
    compiler_options: dict[str, compiler.Option] = dataclasses.field(default_factory=dict)
    """The options that the train step is compiled with."""
    teacher: distillation.Distillation | None = None
    """What is learned from a teacher; None: there is none, or nothing is learned here."""

    @property
    def notes(self) -> dict[str, str]:
        """Returns the choices as people read them: printed once and stored in the run."""
        notes = self.choices.describe(self.one_document) | self.earlier.describe()
        if self.apart:
            notes["workers"] = replicas.describe(self.run, self.fragments)
        return notes if self.teacher is None else notes | self.teacher.describe()

    @property
    def tokens(self) -> Tokenizer:
        """Returns the tokenizer."""
        return self.objective.tokenizer

    def loss(self, weights: Any, batch: DeviceBatch, key: jax.Array | None, memory: Any = None) -> Sums:
        """Computes the objective's sums; in training (with a `key`) with the adapter's penalty, and what keeps earlier
        tasks."""
        own, earlier = replay.parted(batch)
        model = self.sharing() if key is not None and self.earlier.compares and self.draws_nothing else self.model
        sums = self._own_loss(model, weights, own, key, memory) if own else {}
        return (sums | self.earlier.replayed(model, weights, batch, key)) if earlier else sums

    @property
    def draws_nothing(self) -> bool:
        """Returns whether the states of the model are the same with a key as without: its settings and its adapter's
        name their dropout, and it is 0."""
        model, adapter = (
            [value for name, value in config_io.flatten(part).items() if name == "dropout"]
            for part in (self.run.model, self.run.adapter)
        )
        return bool(model) and not any([*model, *adapter])

    def sharing(self) -> Model:
        """Returns the model for one trace of what needs its states several times, such as a loss and predictions."""
        m = self.model
        return SharingModel(m.family, m.config, m.specs, m.shard, m.adapter, m.ids_in_use, self._read_names)

    @property
    def _read_names(self) -> frozenset[str]:
        """The names at the top of the weights that the model's states depend on."""
        return frozenset([*self.adapter.base, "adapter"])

    def _own_loss(self, model: Model, weights: Any, batch: DeviceBatch, key: jax.Array | None, memory: Any) -> Sums:
        """Computes the sums of the new rows."""
        batch, known, is_sampled = distillation.own_leaves(batch)
        student = model if key is None or self.teacher is None else self.teacher.student(self.model, self._read_names)
        sums = self.objective.loss(student, weights, batch, key)
        if key is None:
            return sums
        # Sums like the others, divided by the whole batch's weight outside.
        name, total = next(iter(self.objective.totals(batch).items()))
        added: dict[str, Any] = {}
        apart: Sums = {}
        labels = 1.0
        if self.teacher is not None and isinstance(student, TappedModel):
            labels = 0.0 if is_sampled else self.teacher.c.labels
            taught = None if memory is None else memory.get(distillation.MEMORY)
            added, apart = self.teacher.losses(student, weights, taught, batch, known, self.objective)
        if (penalty := self.adapter.penalty(weights)) is not None:
            added["adapter_penalty"] = penalty * total
        if self.earlier.needs_teacher:
            added |= self.earlier.kept(model, weights, memory["teacher"], batch, self.objective)
        scale = 1 - self.earlier.share if self.earlier.replays and not self.earlier.projects else 1.0
        for loss, values in sums.items():
            values |= added if loss == name else {}
            more = sum(added.values(), jnp.zeros(())) if loss == name else 0.0
            own = labels * values["loss"] if labels else jnp.zeros(())  # without a gradient of its own
            sums = sums | {loss: values | {"loss": scale * (own + more)}}
        return sums | {loss: values | {"loss": scale * values["loss"]} for loss, values in apart.items()}

    def totals(self, batch: DeviceBatch) -> dict[str, jax.Array]:
        """Computes the total weight of each loss over a whole batch, earlier rows included."""
        own, earlier = replay.parted(batch)
        totals = self.objective.totals(own) | ({} if self.teacher is None else self.teacher.totals(own))
        return (totals | self.earlier.totals(batch)) if earlier else totals

    @property
    def parameters(self) -> tuple[int, int]:
        """The numbers of all parameters and of those that are trained, at whatever width they rest."""
        added = {name: s for name, s in self.specs.items() if name not in self.adapter.base}
        flat = tree.flatten(self.specs, spec.is_spec)
        trained = sum(math.prod(s.shape) for path, s in flat.items() if self.optimizer.trainable(path))
        return spec.count(self.adapter.base) + spec.count(added), trained

    @property
    def added(self) -> tuple[int, int]:
        """Returns the number and the bytes of the weights beyond the model's own: heads and adapters."""
        added = {name: s for name, s in self.specs.items() if name not in self.adapter.base}
        leaves = jax.tree.leaves(spec.abstract(added))
        return spec.count(added), sum(x.size * x.dtype.itemsize for x in leaves)

    @property
    def whole(self) -> Any:
        """The sharding of what every device holds whole."""
        return meshes.replicated(self.mesh)

    @property
    def state_shardings(self) -> step.State:
        """Returns the sharding of every leaf of the state."""
        if self.apart:
            return replicas.shardings(self.run.distributed, self.fragments, self._one_sharding, self.whole)
        return self._one_sharding

    @property
    def _one_sharding(self) -> step.State:
        """The sharding of the state of one worker, or of the only one."""
        weight_shardings, moments = self._weight_shardings
        host = "optimizer" in self.run.execution.offload
        trained, _ = tree.partition(weight_shardings, self.optimizer.trainable)
        return step.shardings(
            self.specs, weight_shardings, self.optimizer, self.run.optim.ema > 0, self.whole, moments, host
        ).replace(tracks=self.earlier.tracks_like(trained, masks=trained))

    @property
    def apart(self) -> bool:
        """Returns whether workers train apart within the program."""
        return self.run.distributed.method == "diloco"

    @property
    def workers(self) -> int:
        """Returns how many workers train apart; 1: all devices train together."""
        return replicas.workers(self.run)

    @cached_property
    def fragments(self) -> Fragments:
        """The parts of the trained weights that are exchanged in turn."""
        trained, _ = tree.partition(self.specs, self.optimizer.trainable)
        return Fragments.of(trained, self.run.distributed.fragments)

    @property
    def _weight_shardings(self) -> tuple[Any, Any]:
        """The shardings of the weights, and of the optimizer's state of them."""
        return (
            self.layout.shardings(self.specs, self.mesh),
            self.layout.shardings(self.specs, self.mesh, self.layout.moments),
        )

    def init(self) -> step.State:
        """Makes fresh weights and optimizer state, each leaf on its own devices."""
        with meshes.on_mesh(self.mesh):
            return self._make()(jax.random.key(self.run.seed), {})

    def init_from(self, weights: Any) -> step.State:
        """Makes a fresh state around weights; those that aren't in `weights` are fresh too."""
        rests = tree.flatten(self.specs, spec.is_spec)
        # Where numbers come to rest in fewer bits, their memory can't be used again.
        same = all(path in rests and rests[path].dtype == w.dtype for path, w in tree.flatten(weights).items())
        with meshes.on_mesh(self.mesh):
            return self._make(donate_argnums=1 if same else ())(jax.random.key(self.run.seed), weights)

    def _make(self, **how: Any) -> Any:
        """Returns the jitted `(key, given weights) → state`, which runs once."""
        options = compiler.run_once(meshes.platform())
        return jax.jit(self._fresh, out_shardings=self.state_shardings, compiler_options=options, **how)

    def _fresh(self, key: jax.Array, given: Any) -> step.State:
        made = self.adapter.init(self.specs, key, self.adapter.prompt_ids(self.tokens), given)
        trainable, frozen = tree.partition(made, self.optimizer.trainable)
        tracks = self.earlier.tracks(trainable)
        one = step.start(trainable, frozen, self.optimizer, self.run.optim.ema > 0, tracks)
        return replicas.begin(self.run.distributed, self.fragments, one, self.workers) if self.apart else one

    def abstract_state(self) -> step.State:
        """Returns the shapes, dtypes and shardings of the state, to which a checkpoint is restored."""
        return jax.tree.map(
            lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home),
            jax.eval_shape(lambda: self._fresh(jax.random.key(0), {})),
            self.state_shardings,
        )

    def batch_shardings(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Returns the shardings of a batch's leaves `[micro, rows, …]` from the leaves of this process."""

        def length(name: str) -> int:
            prefix, _, plain = name.rpartition("/")
            if plain not in packing.BY_POSITION:
                return -1
            return self.earlier.tasks[replay.task_of(name)].seq_len if prefix else self.run.train.seq_len

        return {name: batch_sharding(self.layout, self.mesh, x.shape, length(name)) for name, x in batch.items()}

    def rows(self, batch_size: int) -> list[int] | None:
        """Returns the rows of a micro-batch that this process must make; None: all."""
        if self.mesh is None or jax.process_count() == 1:
            return None
        return loader.addressable_rows(batch_sharding(self.layout, self.mesh, (1, batch_size), -1), batch_size)

    @property
    def new_rows(self) -> int:
        """The rows of a micro-batch that are new ones."""
        return (self.run.train.batch_size - self.earlier.rows) // self.run.train.micro_batches

    @property
    def multiple(self) -> int:
        """The number that a batch's rows must be a multiple of."""
        return row_multiple(self.run, self.layout, self.mesh)

    @property
    def shortens_rows(self) -> bool:
        """Returns whether rows may be shorter than `train.seq_len`: where devices split them, all have that length."""
        return self.layout.ways("stream", self.mesh) == 1

    def to_device(self, batch: dict[str, np.ndarray], rows: list[int] | None) -> DeviceBatch:
        """Places a batch on the devices, with less padding where the objective allows that and one process has all."""
        own, _ = replay.parted(batch)
        earlier = {name: leaf for name, leaf in batch.items() if name not in own}
        padding = self.objective.padding if rows is None else "keep"
        if "teacher_rest" in own and own["teacher_rest"].shape[-1] > 1:  # predictions of positions of a row
            padding = "keep"
        if own and padding == "pack":
            workers = self.workers if self.apart else 1
            own = packing.pack_batch(own, self.multiple, workers, halved=self.shortens_rows)
        elif own and padding == "trim" and self.shortens_rows:
            own = packing.trim_padding(own)
        batch = own | earlier
        return cast(DeviceBatch, loader.to_device(batch, self.batch_shardings(batch), rows))

    def train_step(self, send: tuple[int, ...] = ()) -> Any:
        """Returns the jitted `(state, batch) → (state, metrics)`, state donated; `.lower(…).compile()` it.

        Where workers train apart, metrics are those of each, and the program also exchanges the fragments to `send`.
        """
        c, shardings, host = self.run.optim, None, "optimizer" in self.run.execution.offload
        head, train = self.objective.specs(self.run.model.width), self.run.train
        if self.mesh is not None:
            shardings = step.UpdateShardings.of(self.run.mesh.zero, *self._weight_shardings, self.optimizer)
        keeping = self.earlier.keeping(train.batch_size, self.specs, head, train.steps)

        def update(numbers: Any, state: step.State, batch: DeviceBatch, *worker: jax.Array) -> tuple[step.State, Any]:
            seed, given = numbers
            own = optimizer(self.run, self.specs, self.adapter, self.earlier, given)
            f: Any = step.make_train_step(
                self._for_step().loss, self.totals, own, seed=seed, clip=c.clip, ema=c.ema, shardings=shardings,
                host=host, keeping=keeping,
            )  # fmt: skip
            return (self._apart(f, send) if self.apart else f)(state, batch, *worker)

        numbers = np.uint32(self.run.seed % 2**32), optimizers.numbers(c, train.steps)
        out = (self.state_shardings, None)
        jitted = jax.jit(update, donate_argnums=1, out_shardings=out, compiler_options=self.compiler_options or None)
        return Given(jitted, numbers)

    def _for_step(self) -> "Program":
        """Returns the program whose loss is the train step's: it knows whether rows are one document each, and that of
        a worker doesn't cut its batch over the workers' axis."""
        layout = dataclasses.replace(self.layout, one_document=self.one_document)
        if self.apart:
            batch = tuple(a for a in self.layout.over("batch") if a != replicas.AXIS)
            layout = dataclasses.replace(layout, compute={**self.layout.compute, "batch": batch})
        return dataclasses.replace(self, layout=layout, model=dataclasses.replace(self.model, shard=layout))

    @property
    def one_document(self) -> bool:
        """Returns whether each row that is trained on is one document, as windows of text are that aren't cut where
        documents end. Rows of earlier tasks and of a teacher's data may be others."""
        windows = not self.run.data.document_mask and self.objective.records == "packed"
        return windows and self.objective.padding == "keep" and self.teacher is None and not self.earlier.tasks

    def _apart(self, one: Any, send: tuple[int, ...]) -> Any:
        """Returns the step of all workers, which also exchanges the fragments to `send` from the weights before it, so
        that they may travel while it computes."""
        together = replicas.for_all(one, self.workers, self.mesh)

        def update(state: step.State, batch: DeviceBatch) -> tuple[step.State, Any]:
            new, metrics = together(state, batch)
            return (self._exchanged(new, state.params, send, metrics["finite"]) if send else new), metrics

        return update

    def _exchanged(self, state: step.State, before: Any, numbers: tuple[int, ...], beside: Any = None) -> step.State:
        c = self.run.distributed
        return replicas.exchange(c, self.fragments, state, before, numbers, self._one_sharding, self.mesh, beside)

    def exchange(self, exchanged: tuple[int, ...], taken: tuple[int, ...]) -> Any:
        """Returns the jitted `state → state`, donated, in which workers take up fragments that were sent before
        (`taken`), and then exchange others and take them up."""
        c = self.run.distributed

        def f(state: step.State) -> step.State:
            state = replicas.take_up(c, self.fragments, state, taken)
            state = self._exchanged(state, state.params, exchanged)
            return replicas.take_up(c, self.fragments, state, exchanged)

        return jax.jit(f, donate_argnums=0, out_shardings=self.state_shardings)

    @cached_property
    def predict(self) -> Any:
        """The jitted `(weights, batch) → predictions` of objectives that make them."""
        return jax.jit(partial(self.objective.predict, self.model), out_shardings=self.whole)

    def flops_per_token(self) -> dict[str, float]:
        """Returns the FLOPs of one of a row's `seq_len` tokens: those of the experts that it meets, and in an
        encoder-decoder also the decoder's, which runs over `target_positions` other tokens a row.

        What stands above the layers is multiplied where the vocabulary is predicted; a task's own head, of a few
        numbers for each, is left out. A third of the work on a frozen weight, its gradient, isn't done, and two thirds
        where gradients reach nothing that is trained.
        """
        from jaxlm.training import progress

        c, trained = self.run.model, self.optimizer.trainable
        flat = tree.flatten(self.adapter.base, spec.is_spec)
        if "adapter" in self.specs:
            flat |= tree.flatten(self.specs["adapter"], spec.is_spec, prefix="adapter/")
        above = f"adapter/{matrices.HEAD}/"
        below = {
            path for path, s in flat.items()
            if "layers" in s.axes or s.below_layers or (path.startswith("adapter/") and not path.startswith(above))
        }  # fmt: skip
        backward = any(map(trained, below))
        share = 1.0
        if self.run.train.seq_len:
            share = self.objective.target_positions / self.run.train.seq_len

        def work(path: str) -> float:
            return (1 + backward + trained(path)) / 3

        def met(path: str, s: spec.Spec) -> float:
            name, in_layers = path.rpartition("/")[2], "layers" in s.axes
            if not s.is_matrix or s.role in ("table", "head") or (path.startswith("adapter/") and not in_layers):
                return 0.0
            part = c.moe.top_k / c.moe.experts if "experts" in s.axes else 1.0
            on_targets = not in_layers or ("decoder/" in path and name not in ("cross_k", "cross_v"))
            return part * math.prod(s.shape) * (share if on_targets else 1.0) * work(path)

        products = sum(met(path, s) for path, s in flat.items())
        for path, n in self.adapter.products().items():
            through = 1.0 if path == f"{above}b" else work(path)  # gradients pass it to reach a
            products += (share if path.startswith(above) or "decoder/" in path else 1.0) * n * through
        heads = [path for path, s in flat.items() if s.role == "head"] or ["embed"]
        head = share * c.vocab * c.width * work(heads[0])
        width = self.model.family.attention_width(c) // c.layers
        return progress.flops_per_token(
            round(products + head), c.layers, width, self.run.train.seq_len, backward=backward
        )


def row_multiple(run: config.Run, layout: Layout, mesh: jax.sharding.Mesh | None) -> int:
    """Returns the number that a micro-batch's rows must be a multiple of."""
    ways, train = layout.ways("batch", mesh), run.train
    if run.distributed.method == "diloco":  # those of one device have rows of their own
        ways *= replicas.workers(run) // (1 if mesh is None else mesh.shape[replicas.AXIS])
    if mesh is None or mesh.shape[pipeline.AXIS] == 1:
        return ways
    return ways * pipeline.micro_batches(layout, mesh, train.batch_size // train.micro_batches)


def program(
    run: config.Run, tokens: Any, template: str | None = None, earlier: Sequence[earlier_tasks.Task] = (),
    teacher: Source | None = None,
) -> Program:  # fmt: skip
    """Checks the run against its tokenizer and the devices, and puts its functions together. `template`: the chat
    template of the run's model, or None. `earlier`: the tasks that the model learned before. `teacher`: the run's, for
    training; None where nothing is learned from one."""
    config_io.check(run)
    continual_methods.check(run.continual, run)
    family, objective = MODELS.of(run.model), bind_run(run, tokens, template)
    _check_pair(objective.objective, run)
    objective.check()
    positions = run.model.positions
    rows = {"train.seq_len": run.train.seq_len}
    if family.kind == "encoder_decoder":
        rows["objective.target_len"] = objective.target_positions
    for name, length in rows.items():
        if positions is not None and length > positions:
            raise ValueError(f"{name}: {length} is longer than model.positions {positions}")
    used = objective.vocab_size
    if not used <= run.model.vocab < used + max(1024, used // 64):
        more = f" and the {used - tokens.vocab_size} that objective adds" if used > tokens.vocab_size else ""
        raise ValueError(
            f"model.vocab: {run.model.vocab} does not fit the tokenizer's {tokens.vocab_size} tokens{more}; "
            f"set model.vocab to {-(-used // 128) * 128} (some padding is fine)"
        )
    _ = objective.window_length  # refuses a row that is too short for any text
    mesh = meshes.make_mesh(run.mesh)
    layout = Layout.of(run.mesh, run.execution)
    check_batch(run.train, layout, mesh)
    replicas.check(run, 1 if mesh is None else mesh.shape[replicas.AXIS], layout.ways("batch", mesh))
    adapter = adapted.Adapted(run.adapter, family, run.model, run.compression)
    kept = continual_methods.replay_rows(run, len(earlier), row_multiple(run, layout, mesh))
    before = earlier_tasks.bound(run, earlier, tokens, kept)
    heads = objective.specs(run.model.width) | before.specs(run.model.width)
    specs = adapter.specs() | heads
    if run.transfer.method != "none":
        _check_transfer(run, bool(heads), teacher is not None)
        specs |= parametrization.scaled(run.transfer, family, run.model)[0]
    taught = None
    if teacher is not None:
        taught = teacher_fit.bound(run, teacher, objective, Model(family, run.model, adapter.base, layout))
        taught.shardings(mesh)
        specs |= taught.head_specs()
    layout.shardings(specs, mesh, layout.moments)  # refuses what doesn't divide, before any data is touched
    layout.check_sharded(specs, mesh, run.mesh.replicated, LARGE)
    own = optimizer(run, specs, adapter, before)
    device = meshes.local_device()
    needed = matmul.gpu_options(run.execution) if device.platform == "gpu" else {}
    options = {**needed, **compiler.options(run.execution.flags, device)}
    made = choices.choose(run, family, layout, mesh, specs, adapter, own, options)
    model = Model(family, run.model, adapter.base | heads, layout, adapter if adapter.changes else None, used)
    p = Program(run, mesh, layout, specs, model, adapter, objective, own, made, before, options, taught)
    if p.apart and mesh is not None:
        trained, _ = tree.partition(specs, own.trainable)
        first = {path: s.axes[0] for path, s in tree.flatten(trained, spec.is_spec).items()}
        p.fragments.check(trained, {path: layout.ways(axis, mesh, layout.store) for path, axis in first.items()})
    return p


def once_a_shape(program: Any, what: str) -> tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]:
    """Returns the jitted `(state, batch) → …` to run, and what gives it compiled for a batch.

    Processes wait for each other before a new program first runs: one that compiles while the others find theirs in a
    cache would be missed by a collective on CPUs after 30 s.
    """
    compiled: dict[tuple, Any] = {}

    def get(state: Any, batch: Any) -> Any:
        shapes = tuple((name, leaf.shape) for name, leaf in sorted(batch.items()))
        if shapes not in compiled:
            compiled[shapes] = program.lower(state, batch).compile()
            processes.barrier(what, HOURS)
        return compiled[shapes]

    return lambda state, batch: get(state, batch)(state, batch), get


def optimizer(
    run: config.Run, specs: Any, adapter: adapted.Adapted, earlier: earlier_tasks.Earlier,
    given: optimizers.Numbers | None = None,
) -> optimizers.Optimizer:  # fmt: skip
    """Returns the optimizer of a run's weights; it moves what the adapter and earlier tasks leave to it. `given`: the
    numbers to use instead of those in the run's settings."""
    c, steps, wrap = run.optim, run.train.steps, adapter.wrap_optimizer
    if zeros := {path for path, how in run.compression.by_path().items() if how.is_array}:
        wrap = lambda tx, steps: keep_zeros(adapter.wrap_optimizer(tx, steps), zeros)  # noqa: E731
    trainable = lambda path: adapter.trainable(path) and earlier.trainable(path)  # noqa: E731
    scales = parametrization.scaled(run.transfer, adapter.family, run.model)[1]
    return optimizers.make(
        c, steps, specs, trainable=trainable, rate_of=adapter.rate, scales=scales, wrap=wrap, given=given
    )


def _check_transfer(run: config.Run, heads: bool, taught: bool) -> None:
    """Refuses to take settings from a smaller model for anything but training all weights of one that predicts tokens.
    ValueError: the run asks for more."""
    asked = {
        "adapter": (run.adapter != config.Adapter(), "train all weights"),
        "compression.weights": (bool(run.compression.weights), "leave them out"),
        "continual.methods": (bool(run.continual.methods), "leave them out"),
        "objective": (heads, "choose one that adds no head to the model"),
        "distill.teacher": (taught, "leave it out"),
    }
    for name, (used, remedy) in asked.items():
        if used:
            raise ValueError(
                f"{name}: transfer.method {run.transfer.method} is for pretraining, and how this changes with the "
                f"width isn't known; {remedy}, or set transfer.method to none"
            )


def _check_pair(objective: Objective, run: config.Run) -> None:
    """Refuses to train a model for what its kind can't learn: an encoder, for one, sees the tokens that come next."""
    kind = MODELS.of(run.model).kind
    if kind not in objective.models:
        name, kinds = registry.name_of(run.objective), " or ".join(objective.models)
        fitting = ", ".join(name for name, other in OBJECTIVES.items() if kind in other.models)
        raise ValueError(
            f"objective: {name} trains a model of kind {kinds}, and {registry.name_of(run.model)} is of kind "
            f"{kind}; choose {fitting or 'another model'}"
        )
    if isinstance(objective.records, TextPairs | ExampleReader) and run.data.compare_compression:
        raise ValueError("data.compare_compression: is for plain text, not for examples; turn it off")
