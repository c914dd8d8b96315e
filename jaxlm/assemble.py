"""From a `Run` to the parts of its program: names become functions and data here, and nowhere below."""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jaxlm import (
    attention,
    config,
    context,
    dispatch,
    flags,
    grouped,
    layers,
    optim,
    params,
    peft,
    pipeline,
    processes,
    sharding,
    slices,
    step,
    tree,
)
from jaxlm.attention import Mask
from jaxlm.data import cache as caches
from jaxlm.data import loader, packing, tokenizer
from jaxlm.data import vocabulary as vocabularies
from jaxlm.models import MODELS, Model
from jaxlm.objectives import OBJECTIVES

BASE = "base"  # folder of a run: the weights that its adapter rests on
LARGE = 1 << 20  # elements from which a weight must not rest unsharded on a mesh that could shard it


@dataclass(frozen=True)
class HostHalf:
    """The objective's host half with its tokenizer, as loader workers need it: picklable."""

    objective: str
    settings: Any
    tokens: Any
    row: dict[str, Any]
    """What a row must fit: see `objectives`."""

    def __call__(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return OBJECTIVES[self.objective].example(self.settings, record | self.row, self.tokens, rng)


@dataclass(frozen=True)
class Program:
    """Everything of a run that isn't weights or data."""

    run: config.Run
    tokens: Any
    mesh: jax.sharding.Mesh | None
    layout: sharding.Layout
    specs: Any
    model: Model
    adapter: peft.Adapted
    objective: ModuleType
    optimizer: optim.Optimizer
    notes: dict[str, str]
    """Choices that were made and why: printed once and stored in the run."""
    compiler_options: dict[str, flags.Option] = dataclasses.field(default_factory=dict)
    """Of the train step."""

    def loss(self, weights: Any, batch: dict, key: jax.Array | None) -> dict[str, dict[str, jax.Array]]:
        sums = self.objective.loss(self.run.objective, self.model, weights, batch, key)
        if key is None or (more := self.adapter.penalty(weights)) is None:
            return sums
        # A sum like the others, divided by the whole batch's weight outside.
        name, total = next(iter(self.objective.weights(batch).items()))
        mine = sums[name] | dict(loss=sums[name]["loss"] + more * total, adapter_penalty=more * total)
        return sums | {name: mine}

    @property
    def parameters(self) -> tuple[int, int]:
        """(all, those that are trained), however many numbers a few bits take at rest."""
        own = {name: s for name, s in self.specs.items() if name not in self.adapter.base}
        flat = tree.flatten(self.specs, params.is_spec)
        trained = sum(math.prod(s.shape) for path, s in flat.items() if self.optimizer.trainable(path))
        return params.count(self.adapter.base) + params.count(own), trained

    @property
    def whole(self) -> Any:
        return sharding.replicated(self.mesh)

    @property
    def state_shardings(self) -> step.State:
        homes, moments = self._homes
        host = "optimizer" in self.run.execution.offload
        return step.shardings(self.specs, homes, self.optimizer, self.run.optim.ema > 0, self.whole, moments, host)

    @property
    def _homes(self) -> tuple[Any, Any]:
        """Where weights rest, and where the optimizer's state of them does."""
        return (
            self.layout.shardings(self.specs, self.mesh),
            self.layout.shardings(self.specs, self.mesh, self.layout.moments),
        )

    def init(self) -> step.State:
        """Fresh weights and optimizer state, each leaf born on its own device."""
        with sharding.on_mesh(self.mesh):
            return jax.jit(self._fresh, out_shardings=self.state_shardings)(jax.random.key(self.run.seed), {})

    def init_from(self, weights: Any) -> step.State:
        """A fresh state around given weights; those that aren't given are fresh too."""
        rests = tree.flatten(self.specs, params.is_spec)
        # Where numbers come to rest in fewer bits, their memory can't be used again.
        same = all(path in rests and rests[path].dtype == w.dtype for path, w in tree.flatten(weights).items())
        with sharding.on_mesh(self.mesh):
            make = jax.jit(self._fresh, out_shardings=self.state_shardings, donate_argnums=1 if same else ())
            return make(jax.random.key(self.run.seed), weights)

    def _fresh(self, key: jax.Array, given: Any) -> step.State:
        ids = None
        if self.run.adapter.text:
            found = self.tokens.encode(self.run.adapter.text)
            ids = (found * -(-self.run.adapter.tokens // max(1, len(found))))[: self.run.adapter.tokens]
        made = self.adapter.init(self.specs, key, ids, given)
        trainable, frozen = tree.partition(made, self.optimizer.trainable)
        return step.start(trainable, frozen, self.optimizer, self.run.optim.ema > 0)

    def abstract_state(self) -> step.State:
        """Shapes, dtypes and shardings of the state: what a checkpoint is restored to."""
        return jax.tree.map(
            lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home),
            jax.eval_shape(lambda: self._fresh(jax.random.key(0), {})),
            self.state_shardings,
        )

    def batch_shardings(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Of a batch's leaves `[micro, rows, …]`, given the leaves of this process."""
        return {
            k: sharding.batch_sharding(self.layout, self.mesh, v.shape, self.run.train.seq_len)
            for k, v in batch.items()
        }

    def rows(self, batch_size: int) -> list[int] | None:
        """Rows of a micro-batch that this process must make; None: all."""
        if self.mesh is None or jax.process_count() == 1:
            return None
        return loader.rows_of(sharding.batch_sharding(self.layout, self.mesh, (1, batch_size), -1), batch_size)

    @property
    def _multiple(self) -> int:
        """What the number of a batch's rows must be a multiple of."""
        ways, train = self.layout.ways("batch", self.mesh), self.run.train
        if self.mesh is None or self.mesh.shape[pipeline.AXIS] == 1:
            return ways
        return ways * pipeline.micro_batches(self.layout, self.mesh, train.batch_size // train.micro_batches)

    def to_device(self, batch: dict[str, np.ndarray], rows: list[int] | None) -> dict[str, jax.Array]:
        """Texts of one row each go together in fewer where the objective doesn't mind and one process has them all."""
        if rows is None and getattr(self.objective, "packs", False):
            batch = packing.together(batch, self._multiple)
        elif rows is None and getattr(self.objective, "trims", False) and self.layout.ways("stream", self.mesh) == 1:
            batch = packing.trimmed(batch)
        return loader.to_device(batch, self.batch_shardings(batch), rows)

    def train_step(self) -> Any:
        """The jitted `(state, batch) → (state, metrics)`, state donated; `.lower(…).compile()` it."""
        c, places, host = self.run.optim, None, "optimizer" in self.run.execution.offload
        if self.mesh is not None:
            places = step.Places.of(self.run.mesh.zero, *self._homes, self.optimizer)
        f = step.make_train_step(
            self.loss, self.objective.weights, self.optimizer, seed=self.run.seed, clip=c.clip, ema=c.ema,
            places=places, host=host,
        )  # fmt: skip
        out = (self.state_shardings, None)
        return jax.jit(f, donate_argnums=0, out_shardings=out, compiler_options=self.compiler_options or None)

    @cached_property
    def predict(self) -> Any:
        """The jitted `(weights, batch) → predictions` of objectives that make them."""
        return jax.jit(partial(self.objective.predict, self.run.objective, self.model), out_shardings=self.whole)

    def flops_per_token(self) -> dict[str, float]:
        """Of one of a row's `seq_len` tokens: of a mixture of experts those that it meets, of an encoder-decoder its
        decoder too, which runs over `places` other tokens a row."""
        from jaxlm import log

        c, flat = self.run.model, tree.flatten(self.model.specs, params.is_spec)
        share = 1.0
        if self.run.train.seq_len and hasattr(self.objective, "places"):
            share = self.objective.places(self.run.objective, self.run.train.seq_len) / self.run.train.seq_len

        def met(path: str, s: params.Spec) -> float:
            name = path.rpartition("/")[2]
            if not s.is_matrix or name.endswith("bias") or name in ("embed", "position", "type", "head"):
                return 0.0
            part = c.moe.top_k / c.moe.experts if "experts" in s.axes else 1.0
            on_targets = path.startswith("decoder/") and name not in ("cross_k", "cross_v")
            return part * math.prod(s.shape) * (share if on_targets else 1.0)

        matrices = sum(met(path, s) for path, s in flat.items())
        width = self.model.family.attention_width(c) // c.layers
        return log.flops_per_token(int(matrices + share * c.vocab * c.width), c.layers, width, self.run.train.seq_len)


def read_config(folder: Path) -> config.Run:
    """The configuration of a run directory."""
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder}: not a run directory (it has no config.json)")
    try:
        return config.from_dict(json.loads(file.read_text()), MODELS, OBJECTIVES)
    except json.JSONDecodeError as e:
        raise ValueError(f"{file}: not JSON ({e}); restore it, or delete the run directory") from None


def program(run: config.Run, tokens: Any) -> Program:
    """Check the run against its tokenizer and the devices, and put its functions together."""
    family, objective = MODELS[config.family(run.model)], OBJECTIVES[config.family(run.objective)]
    _check_pair(family, objective, run)
    objective.check(run.objective, tokens)
    positions = getattr(run.model, "positions", None)
    rows = {"train.seq_len": run.train.seq_len}
    if family.kind == "encoder_decoder":
        rows["objective.target_len"] = objective.places(run.objective, run.train.seq_len)
    for name, length in rows.items():
        if positions is not None and length > positions:
            raise ValueError(f"{name}: {length} is longer than model.positions {positions}")
    used = vocabulary(run, tokens)
    if not used <= run.model.vocab < used + max(1024, used // 64):
        more = f" and the {used - tokens.vocab_size} that objective adds" if used > tokens.vocab_size else ""
        raise ValueError(
            f"model.vocab: {run.model.vocab} does not fit the tokenizer's {tokens.vocab_size} tokens{more}; "
            f"set model.vocab to {-(-used // 128) * 128} (some padding is fine)"
        )
    _window(run)
    mesh = sharding.make_mesh(run.mesh)
    layout = sharding.Layout.of(run.mesh, run.execution)
    sharding.check_batch(run.train, layout, mesh)
    adapter = peft.Adapted(run.adapter, family, run.model)
    heads = objective.specs(run.objective, run.model.width)
    specs = adapter.specs() | heads
    layout.shardings(specs, mesh, layout.moments)  # refuses what doesn't divide, before any data is touched
    layout.check_sharded(specs, mesh, run.mesh.replicated, LARGE)
    parts = layout.ways("seq", mesh)
    implementation, why = attention.choose(
        run.execution.attention, Mask(family.generates, common=adapter.common), False, None, run.execution.dtype,
        split=run.mesh.context_by if parts > 1 else "", lengths=(run.train.seq_len, run.train.seq_len),
    )  # fmt: skip
    on = sharding.devices()
    notes = {
        "devices": f"{len(on)} × {on[0].device_kind}",
        "mesh": "one device" if mesh is None else " × ".join(f"{a} {n}" for a, n in mesh.shape.items() if n > 1),
        "attention": f"{implementation} ({why})",
        "precision": f"float32 weights, {run.execution.dtype} compute",
        "layers": ("scanned" if layers.scanned(layout) else "unrolled") + f", remat {run.execution.remat}",
    }
    layers.remat_policy(run.execution)  # refuses what can't be offloaded
    if run.execution.offload:
        sharding.check_host_memory(on[0])
        notes["offload"] = f"{', '.join(run.execution.offload)} to the host's memory"
    if hasattr(run.model, "moe"):
        how = grouped.way()[1] if run.model.moe.capacity is None else f"capacity {run.model.moe.capacity:g}"
        notes["experts"] = how
        if mesh is not None and mesh.shape["expert"] > 1:
            sent, why = dispatch.way()
            travels = "expert" in layout.over("batch")
            notes["experts"] += f"; tokens travel ({sent}: {why})" if travels else "; every device has all tokens"
    if mesh is not None and (told := slices.told(mesh)):
        notes["slices"] = told
    if mesh is not None and mesh.shape["fsdp"] > 1:
        kept = ("the optimizer's state", "gradients", "weights")[: run.mesh.zero]
        notes["fsdp"] = f"shards {', '.join(kept)} (ZeRO {run.mesh.zero})"
    if parts > 1:
        notes["context"] = context.told(layout, parts)
    if (piped := pipeline.checked(layout, mesh, adapter.base, run.train)) is not None:
        notes["pipeline"] = piped
    if processes.told():
        notes["processes"] = processes.told()
    model = Model(family, run.model, adapter.base | heads, layout, adapter if adapter.changes else None)
    own = optimizer(run, specs, adapter)
    if adapter.changes:
        notes["adapter"] = adapter.told(specs, own.trainable)
    for group in sorted(set(own.groups.values())):
        notes[f"optimizer: {group}"] = "on " + " ".join(p for p, g in own.groups.items() if g == group)
    asked = flags.options(run.execution.flags, sharding.own_device())
    if asked:
        notes["flags"] = flags.told(asked)
    return Program(run, tokens, mesh, layout, specs, model, adapter, objective, own, notes, asked)


def optimizer(run: config.Run, specs: Any, adapter: peft.Adapted) -> optim.Optimizer:
    """Of a run's weights; it moves what its adapter leaves to it."""
    c, steps = run.optim, run.train.steps
    return optim.make(c, steps, specs, trainable=adapter.trainable, rate_of=adapter.rate, wrap=adapter.allocator)


def vocabulary(run: config.Run, tokens: Any) -> int:
    """Ids in use: the tokenizer's, and what the objective adds."""
    objective = OBJECTIVES[config.family(run.objective)]
    return objective.vocab(run.objective, tokens) if hasattr(objective, "vocab") else tokens.vocab_size


def _check_pair(family: ModuleType, objective: ModuleType, run: config.Run) -> None:
    """Refuse to train a model for what its kind can't learn: an encoder, for one, sees the tokens that come next."""
    if family.kind not in objective.models:
        name, kinds = config.family(run.objective), " or ".join(objective.models)
        fitting = ", ".join(name for name, module in OBJECTIVES.items() if family.kind in module.models)
        raise ValueError(
            f"objective: {name} trains a model of kind {kinds}, and {config.family(run.model)} is of kind "
            f"{family.kind}; choose {fitting or 'another model'}"
        )
    if objective.records in ("texts", "examples") and run.data.compare_compression:
        raise ValueError("data.compare_compression: is for plain text, not for examples; turn it off")


def _window(run: config.Run) -> int:
    """Tokens of text in a record."""
    objective = OBJECTIVES[config.family(run.objective)]
    return objective.window(run.objective, run.train.seq_len) if hasattr(objective, "window") else run.train.seq_len


def text_field(run: config.Run) -> caches.sources.Field:
    """Where the text stands in records: in one field, or in two for an objective that learns one text from another."""
    objective = OBJECTIVES[config.family(run.objective)]
    return objective.fields(run.objective) if objective.records == "texts" else run.data.text_field


def load_tokenizer(run: config.Run, say: Callable[[str], None] = print) -> Any:
    """The run's own copy, else what `data.tokenizer` names, trained on the training text if it must be."""
    own = run.folder / "tokenizer"
    if own.is_dir():
        return tokenizer.load(str(own))
    kind, _, size = run.data.tokenizer.partition(":")
    if kind != "sentencepiece" or not size:
        return tokenizer.load(run.data.tokenizer)
    try:
        vocab = int(size)
    except ValueError:
        raise ValueError(f"data.tokenizer: {size!r} in {run.data.tokenizer!r} is not a vocabulary size") from None
    share = 0.0 if run.data.valid else run.data.holdout
    field = text_field(run)
    stamp = [(s.name, s.stamp) for source in run.data.train for s in caches.sources.shards(source, field=field)]
    name = hashlib.sha256(
        repr((run.data.train, field, share, vocab, stamp, vocabularies.TRAINER)).encode()
    ).hexdigest()[:16]
    path = Path(run.data.cache).expanduser() / "tokenizers" / f"{name}.model"
    if not path.exists() and jax.process_index() == 0:
        say(f"training a SentencePiece tokenizer of {vocab} pieces on {', '.join(run.data.train)} …")
        started = time.perf_counter()
        texts = (
            text for source in run.data.train for text in caches.texts(source, field=field, holdout=share, part="train")
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        vocabularies.train_sentencepiece(texts, path, vocab_size=vocab)
        say(f"tokenizer: {path} ({time.perf_counter() - started:.0f} s)")
    processes.barrier("the tokenizer", 6 * 3600)
    if not path.exists():
        raise ValueError(f"data.cache: process 0 has {path}, and this host hasn't; name a folder that all hosts share")
    return tokenizer.load(str(path))


@dataclass(frozen=True)
class Corpus:
    """Tokenised training and validation data of a run: caches, or for objectives that read their sources themselves
    lists of records."""

    train: list[Any]
    weights: list[float]
    valid: list[Any]


def corpus(run: config.Run, tokens: Any, template: str | None = None) -> Corpus:
    """Tokenise what isn't yet, and open it by memory map. `template`: the model's own, of chats."""
    share = 0.0 if run.data.valid else run.data.holdout
    if not run.data.valid and not share:
        raise ValueError("data.holdout: 0 leaves nothing to validate on; set it above 0 or name data.valid")
    if OBJECTIVES[config.family(run.objective)].records == "examples":
        return _examples(run, tokens, template)

    def prepared(source: str, holdout: float) -> dict[str, Path]:
        return caches.prepare(
            source,
            tokens,
            run.data.cache,
            field=text_field(run),
            holdout=holdout,
            workers=run.data.tokenize_workers,
            progress=jax.process_index() == 0,
        )

    parts = [prepared(source, share) for source in run.data.train]
    train = [caches.open_cache(p["train"]) for p in parts]
    valid_paths = [prepared(s, 0.0)["train"] for s in run.data.valid] or [p["valid"] for p in parts]
    valid = [caches.open_cache(p) for p in valid_paths]
    if OBJECTIVES[config.family(run.objective)].records == "texts" and jax.process_index() == 0:
        for source, part in zip([*run.data.train, *(run.data.valid or run.data.train)], [*train, *valid], strict=True):
            _warn_of_cuts(run, tokens, source, part)
        _warn_of_leaks(train, valid)
    return Corpus(train, _weights(run, [len(c.tokens) for c in train]), valid)


def _weights(run: config.Run, sizes: Sequence[int]) -> list[float]:
    """Of the training sources in the mixture."""
    weights = list(run.data.weights) or [float(n) for n in sizes]
    if len(weights) != len(sizes):
        raise ValueError(f"data.weights: {len(weights)} weights for {len(sizes)} training sources")
    return weights


def _examples(run: config.Run, tokens: Any, template: str | None) -> Corpus:
    objective, row = OBJECTIVES[config.family(run.objective)], _row(run) | {"template": template}

    def read(source: str) -> list[dict]:
        found, notes = objective.read(run.objective, source, tokens, row)
        for note in notes if jax.process_index() == 0 else ():
            print(note)
        return found

    train, valid = [read(source) for source in run.data.train], [read(source) for source in run.data.valid]
    if not valid:
        for i, items in enumerate(train):
            # What stands at one place of a file, such as the windows of a long text, stays together.
            of = [item.get("where", j) for j, item in enumerate(items)]
            places = list(dict.fromkeys(of))
            n = max(1, round(run.data.holdout * len(places)))
            if n == len(places):
                raise ValueError(
                    f"data.train: {run.data.train[i]} has too few examples to hold some out for validation"
                )
            held = {places[j] for j in np.random.default_rng(0).permutation(len(places))[:n]}
            valid.append([item for item, place in zip(items, of, strict=True) if place in held])
            train[i] = [item for item, place in zip(items, of, strict=True) if place not in held]
    if jax.process_index() == 0:
        _warn_of_leaks(train, valid)
    return Corpus(train, _weights(run, [len(items) for items in train]), valid)


def _warn_of_cuts(run: config.Run, tokens: Any, source: str, part: caches.Cache) -> None:
    """Texts that are too long lose their end."""
    lengths, kept, _, _ = _fitted(run, tokens, part)
    cut = (kept < lengths).sum(0)
    if cut.any():
        print(f"{source}: of {len(lengths):,} pairs {cut[0]:,} sources and {cut[1]:,} targets lose their end; "
              f"raise train.seq_len to keep it")  # fmt: skip


def _fitted(run: config.Run, tokens: Any, part: caches.Cache) -> tuple[Any, Any, Any, Any]:
    """Of texts, (lengths, what is kept of them, what they take, room)."""
    objective, kind = OBJECTIVES[config.family(run.objective)], MODELS[config.family(run.model)].kind
    lengths = packing.text_lengths(part, tokens.eos_id)
    return lengths, *objective.fit(run.objective, kind, run.train.seq_len, lengths)


def _warn_of_leaks(train: Sequence[Any], valid: Sequence[Any]) -> None:
    """Validation examples that are learned tell nothing."""
    seen = {key: where for part in train for key, where in _keys(part)}
    every = [found for part in valid for found in _keys(part)]
    if both := [(key, where) for key, where in every if key in seen]:
        key, where = both[0]
        first = f" (first: {where} is {seen[key]})" if where else ""
        print(f"{len(both):,} of {len(every):,} validation examples stand in the training data too{first}; scores on "
              "them tell nothing: remove them from one of the two")  # fmt: skip


def _keys(part: Any) -> Iterator[tuple[Any, str]]:
    """(what tells an example from others, where it stands or nothing) of a part of a corpus."""
    if isinstance(part, caches.Cache):
        yield from ((part.document(i).tobytes(), "") for i in range(len(part)))
        return
    for item in part:
        if "ids" in item:
            yield tuple(item["ids"]), item["where"]
        elif "texts" in item:
            yield from ((tuple(text[0]), "") for text in item["texts"])  # ids stand first


def records(run: config.Run, tokens: Any, part: Any) -> Any:
    """A part of a corpus as what the objective's host half takes."""
    objective = OBJECTIVES[config.family(run.objective)]
    if objective.records == "examples":
        return part
    if objective.records == "pairs":
        return packing.pairs(part, _window(run), run.seed)
    if objective.records == "packed":
        return packing.packed(part, _window(run), document_mask=run.data.document_mask)
    lengths, _, takes, rooms = _fitted(run, tokens, part)
    return packing.texts(part, lengths, takes, rooms, pack=run.objective.pack)


def _row(run: config.Run) -> dict[str, Any]:
    return {
        "seq_len": run.train.seq_len,
        "length": _window(run),
        "kind": MODELS[config.family(run.model)].kind,
        "decoder_start": getattr(run.model, "decoder_start", None),
    }


def host_half(run: config.Run, tokens: Any) -> HostHalf:
    return HostHalf(config.family(run.objective), run.objective, tokens, _row(run))


def prompts(run: config.Run, tokens: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[list[int]] | None]:
    """What a model of this run reads before it goes on from each text: prompts, and an encoder's sources or None."""
    objective = OBJECTIVES[config.family(run.objective)]
    if not hasattr(objective, "prompt"):
        return [[tokens.bos_id, *tokens.encode(text)] for text in texts], None
    found = [objective.prompt(run.objective, tokens, text, _row(run)) for text in texts]
    return [prompt for prompt, _ in found], [source for _, source in found if source is not None] or None


def predictions(p: Program, weights: Any, part: Any) -> list[np.ndarray]:
    """What the model says of each of a part's records, in their order; those of like length are read together."""
    order = sorted(range(len(part)), key=lambda i: len(part[i]["ids"]))
    given = [part[i] for i in order]
    size = p.run.train.batch_size // p.run.train.micro_batches
    rows, cut = p.rows(size), p.layout.ways("stream", p.mesh) == 1
    found: list[np.ndarray] = []
    for batch in loader.evaluation_batches(given, host_half(p.run, p.tokens), batch_size=size, rows=rows):
        batch = packing.trimmed(batch) if cut else batch
        placed = loader.to_device(batch, p.batch_shardings(batch), rows)
        found += list(jax.device_get(p.predict(weights, jax.tree.map(lambda x: x[0], placed))))
    there = dict(zip(order, found, strict=False))
    return [there[i] for i in range(len(part))]


def settled(run: config.Run) -> config.Run:
    """With what an objective takes from its training data, such as the names of labels."""
    objective = OBJECTIVES[config.family(run.objective)]
    if not hasattr(objective, "settle"):
        return run
    return dataclasses.replace(run, objective=objective.settle(run.objective, run.data.train))


def reads_both_ways(run: config.Run) -> bool:
    """Whether prompts are."""
    return getattr(OBJECTIVES[config.family(run.objective)], "both_ways", False)


def training_loader(run: config.Run, tokens: Any, data: Corpus, rows: list[int] | None) -> loader.Loader:
    return loader.Loader(
        [records(run, tokens, c) for c in data.train],
        data.weights,
        host_half(run, tokens),
        batch_size=run.train.batch_size,
        micro_batches=run.train.micro_batches,
        seed=run.seed,
        rows=rows,
        workers=run.data.workers,
    )


def validation_batches(p: Program, data: Corpus, limit: int = 0) -> Iterator[dict]:
    """On the devices: every validation record once, in order; `limit` batches of each source if not 0."""
    for part in data.valid:
        yield from _batches(p, part, limit)


def each_record(p: Program, data: Corpus) -> Iterator[Iterator[dict]]:
    """Of each part, training first: its records once, in order; the last batch is filled up."""
    for part in [*data.train, *data.valid]:
        yield _batches(p, part)


def _batches(p: Program, part: Any, limit: int = 0) -> Iterator[dict]:
    size = p.run.train.batch_size // p.run.train.micro_batches
    rows = p.rows(size)
    for batch in loader.evaluation_batches(
        records(p.run, p.tokens, part),
        host_half(p.run, p.tokens),
        batch_size=size,
        rows=rows,
        limit=limit * size if limit else None,
    ):
        yield p.to_device(batch, rows)


def saved(state: step.State, adapter: peft.Adapted) -> dict[str, Any]:
    """What a checkpoint holds: whole weights whatever is frozen, so that it opens without the run's configuration; but
    for a base that adapters rest on, which the run keeps once (`BASE`)."""
    own, _ = tree.partition(state.all_params, lambda path: not adapter.rests(path))
    return dict(step=state.step, params=own, opt=state.opt, ema=state.ema)


def restored(values: dict[str, Any], base: Any, optimizer: optim.Optimizer) -> step.State:
    """`base`: what `saved` left out; None: nothing."""
    whole = values["params"] if base is None else tree.merge(values["params"], base)
    trainable, frozen = tree.partition(whole, optimizer.trainable)
    return step.State(values["step"], trainable, frozen, values["opt"], values["ema"])
