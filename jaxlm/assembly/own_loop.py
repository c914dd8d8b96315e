"""A run gives its program to a training loop of one's own: state, batches, step and validation."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import jax

from jaxlm.assembly import continual_methods, corpus, moments, open_model, run_directory, teacher
from jaxlm.assembly import program as programs
from jaxlm.assembly.model_source import StartModel
from jaxlm.assembly.program import HOURS
from jaxlm.assembly.trained_run import RunDirectory
from jaxlm.assembly.updates import Updates
from jaxlm.core import config, config_io
from jaxlm.evaluation import perplexity
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.models.model import Model
from jaxlm.objectives.objective import DeviceBatch
from jaxlm.runtime import mesh, processes
from jaxlm.training.step import State


class Program:
    """A Program holds the functions of a run on this machine's devices, for a loop of one's own:

        program = jaxlm.Program(run)
        state = program.init()
        for batch in program.batches():
            state, metrics = program.step(state, batch)

    Metrics are arrays on the device: reading one waits for the step. Nothing is written but by `save`.
    """

    def __init__(self, run: config.Run) -> None:
        """Checks the run against the devices that are here; where a launcher started several processes, all of them
        make it with the same run. ValueError: a field of the run can't be met."""
        processes.start(config_io.flatten(run))
        if run.continual.methods:
            raise ValueError(
                "continual.methods: a loop of one's own keeps no earlier tasks; leave them out, or use train"
            )
        if run.start and continual_methods.separate(run):
            raise ValueError(
                "adapter: a loop of one's own keeps no adapters or columns of earlier tasks; leave `start` out, or use "
                "train"
            )
        if run.distill.cache or run.distill.on_policy.share:
            raise ValueError(
                "distill: in a loop of one's own the teacher reads each batch; leave distill.cache and "
                "distill.on_policy out, or use train"
            )
        self.run = run
        self._start = StartModel(run.start)
        tokens = open_model.load_tokenizer(run, self._start)
        template, taught = open_model.template_of(run, self._start), teacher.source(run)
        self.parts = programs.program(run, tokens, template, teacher=taught)
        self._updates: Updates | None = None

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """Returns the mesh that the program runs on; None: one device."""
        return self.parts.mesh

    @property
    def specs(self) -> Any:
        """Returns the specs of all weights: shapes, logical axes, initializers and roles."""
        return self.parts.specs

    @property
    def model(self) -> Model:
        """Returns the model's pure functions, which take weights and a batch."""
        return self.parts.model

    @property
    def tokenizer(self) -> Any:
        """Returns the tokenizer."""
        return self.parts.tokens

    def init(self) -> State:
        """Returns the state before the first update: fresh weights, or those of the model that the run starts from."""
        with mesh.on_mesh(self.mesh):
            return teacher.attached(self.parts, moments.first_state(self.parts, self._start), begins=None)

    @cached_property
    def corpus(self) -> corpus.Corpus:
        """Returns the training and validation data, tokenised."""
        return corpus.corpus(self.run.data, self.parts.objective)

    def batches(self, start: int = 0) -> Iterator[DeviceBatch]:
        """Yields the batches of the updates `start`, `start + 1`, … without end, on the devices. Leaves are
        `[micro, rows, seq]`; what a batch holds depends on the seed and its number alone."""
        c = self.run.train
        rows = self.parts.rows(c.batch_size // c.micro_batches)
        loader = corpus.training_loader(self.run, self.parts.objective, self.corpus, rows)
        for batch in loader.iterate(start):
            yield self.parts.to_device(batch, rows)

    def step(self, state: State, batch: DeviceBatch) -> tuple[State, dict[str, jax.Array]]:
        """Makes one update; returns the new state and the metrics, those of each worker ([W]) where workers train
        apart. The old state is given up (donated). Updates go on from the number of the first state."""
        with mesh.on_mesh(self.mesh):
            if self._updates is None:
                self._updates = Updates(self.parts, int(state.step))
            return self._updates(state, batch)

    @cached_property
    def _eval_step(self) -> Any:
        p = self.parts
        return perplexity.make_eval_step(p.loss, p.objective.totals, p.tokens.bytes_per_token, p.whole)

    def validate(self, state: State, batches: int = 0) -> dict[str, float]:
        """Returns the metrics of the validation data; on `batches` of each source if not 0."""
        with mesh.on_mesh(self.mesh):
            inputs = corpus.validation_batches(self.parts, self.corpus, batches)
            return perplexity.tally(self._eval_step, state.eval_params, inputs).figures()

    def save(self, state: State) -> RunDirectory:
        """Writes the run directory with a checkpoint of this state; every command then works on it.

        ValueError: the folder belongs to another run.
        """
        folder, p, step = self.run.folder, self.parts, int(state.step)
        run_directory.check_place(self.run)
        if jax.process_index() == 0 and not run_directory.claim(self.run):
            open_model.save_description(self.run, p.tokens, self._start)
        processes.barrier("the run directory", HOURS)
        with Checkpoints(folder / "checkpoints", keep=self.run.train.keep) as checkpoints, mesh.on_mesh(self.mesh):
            base = run_directory.frozen_base(p.adapter, state.all_params)
            if base and checkpoints.latest() is None:
                run_directory.write_base(folder, base)
            checkpoints.save(step, run_directory.saved(state, p.adapter), {"step": step}, wait=True)
        return RunDirectory(folder)
