"""A model is converted from one format into another, and shown to be still the same.

An adapter is merged into the weights on the way, or written alone as PEFT has it."""

import dataclasses
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly import input_squares, model_source, run_directory, task_heads
from jaxlm.assembly.model_source import Source
from jaxlm.assembly.open_model import Place, Pretrained, open_model, published_run
from jaxlm.core import config, config_io, errors, registry, tree
from jaxlm.core.paths import local
from jaxlm.data import tokenizer as tokenizers
from jaxlm.formats import (
    gguf,
    gguf_file_types,
    gguf_importance,
    gguf_tokenizer,
    gguf_write,
    hf_sidecars,
    huggingface,
    model_card,
    multimodal,
    quantization,
    stablehlo,
)
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.formats.hf_sidecars import Generation
from jaxlm.formats.peft import describe, load, open_files, save
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.family import Family
from jaxlm.nn.leaf import is_leaf
from jaxlm.objectives import OBJECTIVES
from jaxlm.objectives.objective import TaskHead
from jaxlm.runtime import mesh
from jaxlm.training import run_logs

FEW_BITS = tuple(quantization.WRITERS)
FORMATS = ("hf", *FEW_BITS, "gguf", "stablehlo", "peft")
# The dtypes of each format, the usual one first; None: each tensor's own, else float32.
DTYPES = {
    "hf": (None, *huggingface.EXPORTED),
    **dict.fromkeys(FEW_BITS, ("float32", "bfloat16", "float16")),
    "gguf": ("f16",),
    "stablehlo": stablehlo.DTYPES,
    "peft": ("float32",),
}
SHRUNK = "shrunk.json"  # what `jaxlm shrink` writes of a model beside it
# How far logits may move: root mean square of the difference over their deviation. Rounding stays far below.
TOLERANCE = {None: 1e-5, "float32": 1e-5, "float16": 1e-2, "f16": 1e-2, "bfloat16": 5e-2, "q8_0": 0.2}
HALF_SCALES = ("gptq", "awq")  # formats whose scales are float16 whatever the dtype
TOLERANCE_QUANTIZED = 0.7  # of fewer bits than 8; another model's logits are off by more than 1
ROWS, LENGTH = 2, 32  # of the probe


def import_model(place: str, target: str | Path) -> list[str]:
    """Writes a run directory that holds the model; returns a line on each thing written."""
    folder = fresh(target)
    with run_directory.removed_if_refused(folder):
        return _import(place, folder)


def _import(place: str, folder: Path) -> list[str]:
    p = open_model(place)
    run = dataclasses.replace(published_run(p.source), name=folder.resolve().name, out=str(folder.parent))
    notes = [f"tokenizer: {', '.join(p.source.save_text(folder / 'tokenizer'))}"]
    notes += p.source.save_advice(folder)
    with Checkpoints(folder / "checkpoints") as checkpoints, mesh.on_mesh(p.mesh):
        state = dict(step=jnp.zeros((), jnp.int32), params=p.params)
        checkpoints.save(0, state, {"step": 0, "imported": str(place)}, wait=True)
    notes.append(f"checkpoints: {sum(w.size for w in jax.tree.leaves(p.params)):,} parameters as float32")
    config_io.dump(run, folder / "config.json")
    return notes


def export(
    model: Place,
    target: str | Path,
    *,
    format: str = "hf",
    dtype: str | None = None,
    step: int | None = None,
    quantize: str | None = None,
    calibration: str | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """Writes the model; returns a line on each thing written, and how far its logits are from before.

    What was written is read again and compared; if it is another model, it is removed and that is an error. `quantize`
    is a type of GGUF file; `calibration` a source, or llama.cpp's importance matrix, that says how much columns count.
    """
    if format not in FORMATS:
        raise ValueError(f"format: unknown {format!r}{errors.nearest(format, FORMATS)}")
    known = DTYPES[format]
    dtype = dtype or known[0]
    if dtype not in known:
        hint = f"; did you mean --quantize {dtype}?" if format == "gguf" and dtype in gguf_file_types.QUANTIZED else ""
        raise ValueError(
            f"dtype: {dtype!r} is not for {format}{hint or '; choose one of ' + ', '.join(filter(None, known))}"
        )
    _check_quantize(format, quantize, calibration)
    dtype = quantize or dtype
    path = Path(target)
    if format == "gguf" and path.suffix != ".gguf":
        raise ValueError(f"{path}: name a file that ends in .gguf")
    fresh(path)
    if (kept := _importance_file(path, calibration)) is not None:
        fresh(kept)
    with run_directory.removed_if_refused(path):
        p = open_model(model, step)
        head = task_head(p.source)
        if head is None:
            return _export(_published(p), path, format, dtype, calibration)
        if format != "hf":
            raise ValueError(f"format {format}: has no place for the head {head.weight} of {p.source.path}; choose hf")
        published_form(p.source, p.model.config, p.params)  # refuses before any work
        return _export(p, path, format, dtype)


def _check_quantize(format: str, quantize: str | None, calibration: str | None) -> None:
    if quantize is not None and format != "gguf":
        raise ValueError(f"quantize: is for --format gguf, not {format}; leave it out")
    if quantize is not None:
        gguf_file_types.check_quantized(quantize)
    if calibration is not None and (quantize is None or quantize == "q8_0"):
        raise ValueError("calibration: needs quantize with a type of fewer bits than q8_0, whose rounding it improves")


def task_head(s: Source) -> TaskHead | None:
    """Returns the head of a labelled task that the model has; None: it has none that published files have too."""
    return None if s.objective is None else OBJECTIVES.of(s.objective).head


def _export(
    p: Pretrained, path: Path, format: str, dtype: str | None, calibration: str | None = None
) -> tuple[list[str], dict[str, Any]]:
    if format == "peft" and p.source.adapter == config.Adapter():
        raise ValueError(f"format peft: {p.source.path} has no adapter; choose another format")
    if format in FEW_BITS:
        _check_few_bits(p, format)
    vectors = format == "stablehlo" and p.model.family.kind == "encoder"
    before = logits(p, vectors)
    if format not in ("peft", *FEW_BITS) and p.model.adapter is not None:
        p = _merged(p)
        dtype = dtype or "float32"  # that of the base's own numbers may be too coarse for what was learned
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        few = dict.fromkeys(FEW_BITS, partial(_to_few_bits, format))
        write: Any = {"hf": _to_hf, "stablehlo": _to_stablehlo, "peft": _to_peft, **few}.get(format)
        notes = _to_gguf(p, path, dtype or "f16", calibration) if write is None else write(p, path, dtype)
        read: Any = {"stablehlo": _stablehlo_logits, "peft": _peft_logits}.get(format)
        after = logits(open_model(path)) if read is None else read(p, path)
        difference = compare(before, after)
        allowed = max(TOLERANCE.get(dtype, TOLERANCE_QUANTIZED), TOLERANCE["float16"] if format in HALF_SCALES else 0)
        if not difference["relative_difference"] <= allowed:
            raise ValueError(
                f"{path}: what was written gives other logits (off by {difference['relative_difference']:.2g} of their "
                f"deviation, {allowed:g} is allowed), so it was removed; please report this model"
            )
    except BaseException:
        _remove(path)
        if (kept := _importance_file(path, calibration)) is not None:
            kept.unlink(missing_ok=True)
        raise
    record = {"source": p.source.path.name, "format": format, "dtype": dtype or "as it was", **difference}
    file = path / "export.json" if path.is_dir() else path.with_name(f"{path.name}.json")
    file.write_text(json.dumps(record, indent=1) + "\n")
    return [*notes, f"{file.name}: the comparison of logits before and after"], record


def fresh(target: str | Path, argument: str = "target") -> Path:
    """Returns the path of what is to be written. ValueError, which names the argument: something is there."""
    path = local(argument, target)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: is there already; choose another name or remove it")
    return path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- logits


def _published(p: Pretrained) -> Pretrained:
    """Returns the model with the weights that published files have: of an objective's heads those the family knows."""
    family = p.model.family
    c, specs = published_specs(family, p.model.config, p.params.keys() - {"adapter"})
    adapter = p.model.adapter and dataclasses.replace(p.model.adapter, config=c)
    return dataclasses.replace(p, model=Model(family, c, specs, p.model.shard, adapter))


def published_specs(family: Family, c: Any, weights: Set[str]) -> tuple[Any, Any]:
    """Returns the configuration that has the heads of these weights, as published files do, and its specs. ValueError:
    the family's published files have no place for one."""
    heads = [f.name for f in dataclasses.fields(c) if getattr(c, f.name) is False and f.name in weights]
    c = dataclasses.replace(c, **dict.fromkeys(heads, True))
    specs = family.specs(c)
    if extra := sorted(weights - specs.keys()):
        raise ValueError(f"{', '.join(extra)}: no place for it in published files of {c.model_type}")
    return c, specs


def published_form(s: Source, c: Any, weights: Mapping[str, Any]) -> task_heads.Export:
    """Returns how published files have a model of these weights (or their specs): with the head of its labelled task,
    or those that the family knows. ValueError: they can't express it."""
    if task_head(s) is not None:
        return task_heads.export(s.family, c, s.objective, weights)
    c, specs = published_specs(s.family, c, weights.keys() - {"adapter"})
    return task_heads.Export(c, specs, s.family.names(c), s.family.to_hf(c), [])


def _merged(p: Pretrained) -> Pretrained:
    """Returns the model with its adapter merged into plain weights."""
    with mesh.on_mesh(p.mesh):
        weights = jax.jit(p.model.adapter.merged)(p.params)
    heads = {name: w for name, w in p.params.items() if name not in (*p.model.adapter.base, "adapter")}
    c = p.model.adapter.merged_config
    model = dataclasses.replace(p.model, config=c, specs={**p.model.specs, **p.model.family.specs(c)}, adapter=None)
    return dataclasses.replace(p, model=model, params=weights | heads)


def probe(p: Pretrained) -> dict[str, np.ndarray]:
    """Makes a batch of random tokens, the same for every format of a model."""
    c, rng = p.model.config, np.random.default_rng(0)
    T = min(LENGTH, c.positions or LENGTH)
    tokens, positions = rng.integers(0, c.vocab, (ROWS, T)).astype(np.int32), np.arange(T, dtype=np.int32)
    out = dict(tokens=tokens, positions=np.broadcast_to(positions, (ROWS, T)), segments=np.ones((ROWS, T), np.int32))
    if p.model.family.kind == "encoder_decoder":
        out |= {f"source_{name}": out[name] for name in ("positions", "segments")}
        out["source"] = rng.integers(0, c.vocab, (ROWS, T)).astype(np.int32)
    return out


def logits(p: Pretrained, vectors: bool = False, batch: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """Computes the logits `[rows, T, V]` of a batch, or of the probe, in float32; or with `vectors`, and for a model
    without a head, what comes before the head, `[rows, T, D]`; or what the head of a labelled task gives."""
    execution = dataclasses.replace(p.model.shard.execution, dtype="float32", attention="xla")
    model = dataclasses.replace(p.model, shard=dataclasses.replace(p.model.shard, execution=execution))

    vectors, head = vectors or not model.config.head, task_head(p.source)

    @jax.jit
    def run(params: Any, batch: Any) -> jax.Array:
        if head is not None:
            return head.logits(p.source.objective, model, params, batch)
        x_BTD = model.forward(params, batch).x_BTD
        return x_BTD if vectors else losses.logits(model.readout(params, x_BTD), model.shard)

    with mesh.on_mesh(p.mesh), jax.default_matmul_precision("highest"):
        batch = probe(p) if batch is None else batch
        if head is not None:
            at = 0 if model.family.kind == "encoder" else batch["tokens"].shape[1] - 1
            batch = batch | dict(at=np.full(ROWS, at, np.int32), types=np.zeros_like(batch["tokens"]))
        batch = {name: np.repeat(x, jax.device_count(), 0) for name, x in batch.items()}  # rows for all devices
        return np.asarray(jax.device_get(run(p.params, batch)))[:: jax.device_count()]


def compare(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Returns how far logits are from what they were."""
    assert before.shape == after.shape, f"{before.shape} became {after.shape}"
    return dict(
        relative_difference=float(np.sqrt(np.mean((after - before) ** 2)) / before.std()),
        max_abs_difference=float(np.abs(after - before).max()),
        same_top_token=float((before.argmax(-1) == after.argmax(-1)).mean()),
    )


# ------------------------------------------------------------------------------------------------------- the formats


def _to_hf(p: Pretrained, folder: Path, dtype: str | None) -> list[str]:
    s, m = p.source, p.model
    kinds: Any = dtype or (huggingface.dtypes(s.path) if s.format == "hf" else "float32")
    arguments: dict[str, Any] = dict(dtype=kinds, about=_about(s))
    c, specs, weights, left = m.config, m.specs, p.params, []
    if task_head(s) is not None:
        form = published_form(s, c, weights)
        c, specs, left = form.config, form.specs, form.left_out
        weights = {name: weights[name] for name in specs}
        arguments |= dict(names=form.names, values=form.values)
    write = partial(huggingface.save, folder, m.family, c, specs, weights, **arguments)
    return with_sidecars(s, folder, write, left)


def _check_few_bits(p: Pretrained, format: str) -> None:
    """Raises ValueError where the model has no weights of few bits, or an adapter over them."""
    if "adapter" in p.params:
        raise ValueError(
            f"format {format}: {p.source.path} has an adapter, which its few bits can't take in; export it as peft, or "
            "merge both as hf"
        )
    if p.model.adapter is None or not any(map(is_leaf, tree.flatten(p.model.adapter.bind(p.params)).values())):
        raise ValueError(
            f"format {format}: {p.source.path} has no weights of few bits; make them first: "
            f"jaxlm compress {p.source.path} COMPRESSED"
        )


def _to_few_bits(format: str, p: Pretrained, folder: Path, dtype: str) -> list[str]:
    m = p.model
    weights = m.adapter.bind(p.params)
    write = partial(huggingface.save, folder, m.family, m.config, m.specs, weights, dtype=dtype, layout=format,
                    about=_about(p.source))  # fmt: skip
    return with_sidecars(p.source, folder, write, [])


def with_sidecars(s: Source, folder: Path, write: Callable[..., list[str]], left_out: Sequence[str]) -> list[str]:
    """Writes a Hugging Face directory by `write`, with the tokenizer and the settings of the model `s`; returns lines
    on what was written and `left_out`. `write` takes `extra_files_from` and `generation` as `huggingface.save` does."""
    advice = dataclasses.replace(s.advice, eos=tuple(s.eos)) if s.format == "run" and s.tokens is not None else s.advice
    # A directory's own file comes along as it is.
    generation = advice if s.format != "hf" and advice != Generation() else None
    with tempfile.TemporaryDirectory() as made:
        extra = s.extra_files
        if s.format == "gguf":
            extra = Path(made)
            s.save_text(extra)
        notes = write(extra_files_from=extra, generation=generation)
    if left_out:
        notes.append(f"left out, because the head doesn't read it: {', '.join(left_out)}")
    if s.format == "run" and (s.path / "generation_config.json").is_file() and s.family.generates:
        hf_sidecars.keep_generation(folder, advice, s.path)
    return notes + (hf_sidecars.keep_embedding(folder, s.path) if s.format != "gguf" else [])


def _about(s: Source) -> model_card.About:
    """Returns what is known of how a model's weights came to be, for its card. No path of this machine is in it."""
    run, licence = s.run, s.licence
    if run is None:
        return model_card.About(f"Made from {s.path.name}.", s.path.name, licence)
    if (s.path / SHRUNK).is_file():
        made = json.loads((s.path / SHRUNK).read_text("utf-8"))["card"]
        return model_card.About("\n".join([made, *_scores(run, s.path)]), licence=licence)
    compressed = _compressed(s.path)
    if not run.data.train:
        return model_card.About("\n".join(compressed) or f"Imported as {run.name}.", licence=licence)
    start = model_card.name_of(run.start) if run.start else ""
    data = ", ".join(f"`{model_card.name_of(place)}`" for place in run.data.train)
    rows = f"{run.train.batch_size} rows of {run.train.seq_len} tokens"
    how = f"objective {registry.name_of(run.objective)}, up to {run.train.steps:,} steps of {rows}"
    unknown = "data" if licence or not start else "data and of the start"
    terms = f"The licence of the {unknown} holds for it too and was not recorded."
    made = f"Trained in the run {run.name} from {start or 'random weights'}: {how}, on {data}. {terms}"
    return model_card.About("\n".join([made, *_scores(run, s.path), "", *compressed]).rstrip(), start, licence)


def _compressed(folder: Path) -> list[str]:
    """Returns what the card of a compressed model says of how it was made and what that changed; empty: it isn't."""
    file = folder / "compress.json"
    return json.loads(file.read_text("utf-8"))["card"] if file.is_file() else []


def _scores(run: Any, folder: Path) -> list[str]:
    """Returns the lines of a card that say how good a run's model is, and on which rows."""
    found = run_logs.results(run_logs.read(folder)) if (folder / "metrics.jsonl").is_file() else []
    places = {part: ", ".join(f"`{model_card.name_of(place)}`" for place in getattr(run.data, part))
              for part in ("valid", "test")}  # fmt: skip
    places["valid"] = places["valid"] or "documents held out of the training data"
    scores = [f"- {places[result.part]}: {run_logs.said(result)}" for result in found]
    return ["", "Scores, with 95 % intervals where they are known:", *scores] if scores else []


def _to_gguf(p: Pretrained, path: Path, file_type: str, calibration: str | None) -> list[str]:
    s, text = p.source, None
    if s.tokens is not None:
        first, template = s.tokens.bos_id in s.boundary_ids[0], s.templates.get("default")
        text = gguf.Text(_vocabulary(s), first, template, tuple(p.eos))
    m, importance = p.model, None
    notes: list[str] = []
    if calibration is not None:
        importance, notes = _importance(p, calibration, path)
    lines = gguf_write.save(
        path, m.family, m.config, m.specs, p.params, file_type=file_type, importance=importance, text=text,
        name=s.path.stem,
    )  # fmt: skip
    notes += [f"{path.name}: {path.stat().st_size:,} bytes", *lines]
    if text is not None:
        again = gguf.text(gguf.open_file(path))
        if (differs := gguf_tokenizer.different_text(s.tokens, again.tokenizer)) is not None:
            raise ValueError(f"{path}: its tokenizer reads {differs!r} differently, so it was removed; export as hf")
        if lost := gguf_tokenizer.lost_settings(s.tokens):
            notes.append(f"note: GGUF files can't say what {', '.join(lost)} do to the text beside them")
    return notes


def _importance_file(path: Path, calibration: str | None) -> Path | None:
    """Returns the file that keeps what is measured of a calibration text; None: nothing is measured."""
    measures = calibration is not None and not input_squares.is_importance_file(calibration)
    return path.with_suffix(".imatrix.gguf") if measures else None


def _importance(p: Pretrained, calibration: str, path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns importance by the names of tensors, and lines on it; what was measured is kept beside the file."""
    found = input_squares.for_gguf(p, calibration)
    if not isinstance(found, input_squares.Measured):
        return found, [f"importance of {len(found)} tensors from {calibration}"]
    file = _importance_file(path, calibration)
    assert file is not None
    gguf_importance.write(file, found.importance, found.tokens, found.length, calibration)
    return found.importance, [
        f"{file.name}: importance of the columns of {len(found.importance)} tensors, over {found.tokens:,} tokens"
    ]


def _vocabulary(s: Source) -> Any:
    """Returns the tokenizer as GGUF can hold it: SentencePiece's own model where a tokenizer.json was made from one."""
    for name in ("tokenizer.model", "spiece.model") if s.format == "hf" else ():
        if (s.path / name).is_file():
            sentencepiece = tokenizers.load(s.path / name)
            same = gguf_tokenizer.different_text(sentencepiece, s.tokens) is None
            if sentencepiece.vocab_size == s.tokens.vocab_size and same:
                return sentencepiece
    return s.tokens


def _to_stablehlo(p: Pretrained, folder: Path, dtype: Any) -> list[str]:
    execution = dataclasses.replace(p.model.shard.execution, dtype=dtype)
    shard = dataclasses.replace(p.model.shard, execution=execution)
    return stablehlo.save(folder, dataclasses.replace(p.model, shard=shard), p.params)


def _to_peft(p: Pretrained, folder: Path, dtype: str) -> list[str]:
    start = _plain_base(p.source.run) if p.source.run else str(p.source.path)
    if not start:
        raise ValueError(f"format peft: {p.source.path} began from no published model; export it as hf")
    if (Path(start) / "config.json").is_file() and multimodal.is_wrapper(huggingface.read_config(start)):
        raise ValueError(
            f"format peft: {start} is multimodal, and the adapter is its text model's; export the merged model as hf, "
            "or begin a run from the text model that `jaxlm export` makes of it"
        )
    notes = save(folder, p.model.adapter, p.params.get("adapter", {}), start.removeprefix(model_source.HUB))
    if Path(start).suffix == ".gguf":
        notes.append(f"note: PEFT can't read {start}; give it the same model as a Hugging Face directory")
    return notes


def _plain_base(run: config.Run) -> str:
    """Returns the model that a run's adapter rests on: that of the run with an adapter which it starts from, if so."""
    while run.adapter != config.Adapter() and (Path(run.start) / "checkpoints").is_dir():
        before = run_directory.read_config(Path(run.start))
        if before.adapter == config.Adapter():
            break
        run = before
    return run.start


def _peft_logits(p: Pretrained, folder: Path) -> np.ndarray:
    """Computes the logits with the adapter that was written, on the weights in memory."""
    files = open_files(folder)
    c = describe(files, p.model.family, p.model.config)
    adapter = dataclasses.replace(p.model.adapter, c=dataclasses.replace(c, base=p.model.adapter.c.base))
    with mesh.on_mesh(p.mesh):
        loaded = load(files, adapter, p.model.shard.shardings(adapter.specs()["adapter"], p.mesh), p.params)
    weights = p.params | {"adapter": loaded}
    return logits(dataclasses.replace(p, model=dataclasses.replace(p.model, adapter=adapter), params=weights))


def _stablehlo_logits(p: Pretrained, folder: Path) -> np.ndarray:
    """Computes the logits by the folder's own `run.py`, as its users run it."""
    spec = importlib.util.spec_from_file_location("jaxlm_exported", folder / "run.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    with jax.default_matmul_precision("highest"):
        return np.stack([np.asarray(x, np.float32) for x in program.forward(probe(p)["tokens"].tolist())])
