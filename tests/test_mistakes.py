"""A beginner's mistakes: through the library a `ValueError` that names the argument or the field, through the command
line one line with exit status 2, and afterwards nothing is left on disk.

Every row is tried both ways. None of them gets as far as a compiled step.
"""

import dataclasses
import errno
import json
import re
import shutil
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.tiny_models import published

import jaxlm
from jaxlm.assembly.run_directory import removed_if_refused
from jaxlm.commands import cli
from jaxlm.core import config, ranges
from jaxlm.formats import safetensors
from jaxlm.inference.sampling import Sampling
from jaxlm.models import MODELS
from jaxlm.objectives import OBJECTIVES
from jaxlm.runtime import mesh
from jaxlm.weights.adapters import METHODS

BASE = """
from jaxlm.core.config import Data, Optim, Run, Train
from jaxlm.models import llama
from jaxlm.objectives import causal


def config():
    return Run(
        "small",
        llama.Config(vocab=264, layers=1, width=16, heads=2, kv_heads=1, head_width=8, ffn=16, positions=64),
        causal.Config(),
        Data(train=("texts",), holdout=0.3, tokenizer="bytes", cache="cache", tokenize_workers=1),
        Optim(warmup=1),
        train=Train(steps=3, batch_size=8, seq_len=32, prompts=(), eval_batches=1),
    )
"""
CLASSIFIER = """
import dataclasses
from base import config as base
from jaxlm.models import bert
from jaxlm.objectives import classify


def config():
    model = bert.Config(vocab=264, layers=1, width=16, heads=2, ffn=16, positions=64)
    data = dataclasses.replace(base().data, train=("table.csv",))
    return dataclasses.replace(base(), model=model, objective=classify.Config(), data=data)
"""


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A mistake is made by `call` in Python and by `argv` in a shell; both are told `message`, a pattern."""

    name: str
    message: str
    call: Callable[[], Any] | None
    """None: there is no such function."""
    argv: list[str]


def field(name: str, message: str, config: str = "base.py", /, **changes: Any) -> Mistake:
    """Returns the mistake of training with changed fields, `optim__lr=-1`."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    argv = ["train", config]
    for key, value in changes.items():
        argv += [f"--{key}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return Mistake(name, message, lambda: jaxlm.train(jaxlm.load(config, **changes)), argv)


def config_file(name: str, message: str, file: str) -> Mistake:
    """Returns the mistake of training a config file."""
    return Mistake(name, message, lambda: jaxlm.train(jaxlm.load(file)), ["train", file])


def using(name: str, message: str, place: str = "published", **settings: Any) -> Mistake:
    """Returns the mistake of generating with a model; `prompt` is the text."""
    prompt = settings.pop("prompt", "the")
    argv = ["generate", place, "--prompt", prompt, *(f"--{key}={value}" for key, value in settings.items())]
    return Mistake(name, message, lambda: jaxlm.open(place).generate(prompt, **settings), argv)


def merging(name: str, message: str, *others: str, **settings: Any) -> Mistake:
    """Returns the mistake of merging the published model with others."""
    models, settings = ["published", *others], {"out": "new/out"} | settings
    argv = ["merge", *models]
    for key, value in settings.items():
        argv += [f"--{key}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return Mistake(f"a merge: {name}", message, lambda: jaxlm.merge(models, **settings), argv)


def shrinking(name: str, message: str, place: str = "published", **settings: Any) -> Mistake:
    """Returns the mistake of making a model smaller."""
    argv = ["shrink", place, "new/out"]
    for key, value in settings.items():
        argv += [f"--{key}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return Mistake(f"a smaller model: {name}", message, lambda: jaxlm.shrink(place, "new/out", **settings), argv)


def sweeping(name: str, message: str, *space: str, config: str = "base.py", **settings: Any) -> Mistake:
    """Returns the mistake of a sweep, whose run validates often enough."""
    argv = ["sweep", config, "--train.eval_every", "1", *(word for text in space for word in ("--space", text))]
    for key, value in settings.items():
        argv += [f"--{key}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    changes = {"train.eval_every": 1}
    return Mistake(f"a sweep: {name}", message, lambda: jaxlm.sweep(jaxlm.load(config, **changes), space, **settings),
                   argv)  # fmt: skip


MISTAKES = [
    # Config files.
    config_file("no such config", r"no config file bsae\.py", "bsae.py"),
    config_file("no such config name", r"no config file tiny_lama; did you mean 'tiny_llama'\?", "tiny_lama"),
    config_file("a config with a syntax error", r"syntax\.py:3: .*SyntaxError", "syntax.py"),
    config_file("a config that fails", r"fails\.py:2: NameError: name 'Rnu' is not defined", "fails.py"),
    config_file(
        "a config that imports what isn't there", r"imports\.py:1: ModuleNotFoundError: .*'nowhere'", "imports.py"
    ),
    config_file("a config that misspells a field", r"misspelt\.py:5: TypeError: .*'lrate'", "misspelt.py"),
    config_file("a config without config()", r"empty\.py: has no function config\(\)", "empty.py"),
    config_file("a config that returns nothing", r"none\.py: config\(\) returned NoneType, not a Run", "none.py"),
    config_file("a text instead of a config", r"text\.txt: not a Python file", "text.txt"),
    config_file("a folder that is no run", r"texts: not a run directory \(it has no config\.json\)", "texts"),
    config_file("a run whose config.json is cut off", r"cut/config\.json: not JSON", "cut"),
    config_file("a config.json out of range", r"optim\.lr: -1\.0 is out of range; it must be 0 or more", "negative"),
    config_file("a config file out of range", r"train\.steps: 0 is out of range; it must be at least 1", "zero.py"),
    # Fields.
    field("an unknown field", r"unknown config key train\.stepz; did you mean '(train\.)?steps'\?", train__stepz=1),
    field("a field of no part", r"unknown config key lr", lr=1e-3),
    field("a word for a number", r"optim\.lr: 'fast' is not a valid float", optim__lr="fast"),
    field("a fraction for a count", r"train\.steps: '?1\.5'? is not a valid int", train__steps=1.5),
    field(
        "a method of continual learning",
        r"continual\.methods: unknown 'ewk'; did you mean 'ewc'",
        continual__methods=("ewk",),
    ),
    field("a teacher that isn't there", r"distill\.teacher: nowhere: no such model", distill__teacher="nowhere"),
    field("a teacher of another kind", r"encoder is of kind encoder and the run's model", distill__teacher="encoder"),
    field(
        "no loss of that name",
        r"distill\.losses: .*logit.* is not one of|distill\.losses: .*logit",
        distill__losses=("logit",),
    ),
    field("layers of nothing", r"start_layers: are layers of the model in start, and there is none", start_layers=(0,)),
    field(
        "layers that aren't there",
        r"start_layers: the model has layers 0 to 0, and no 3",
        start="tiny",
        start_layers=(3,),
    ),
    field(
        "rows as a bound and to learn",
        r"continual\.methods: agem takes the gradient",
        continual__methods=("agem", "der"),
    ),
    Mistake(
        "a run for a stream", r"returned Run, not a Stream; use it with: jaxlm train", None, ["continual", "base.py"]
    ),
    field("no such choice", r"execution\.dtype: 'float16' is not one of float32, bfloat16", execution__dtype="float16"),
    field(
        "layers apart from nothing",
        r"execution\.matmul_skip_first, matmul_skip_last: nothing is multiplied in few bits; set matmul to",
        execution__matmul_skip_first=1,
    ),
    field(
        "all layers apart",
        r"execution\.matmul_skip_first, matmul_skip_last: 3 of 1 layers leave none for int8; skip fewer",
        execution__matmul="int8",
        execution__matmul_skip_first=3,
    ),
    field("no such optimizer", r"optim\.name: unknown 'adam'; did you mean 'adamw'", optim__name="adam"),
    field("no such schedule", r"optim\.schedule: unknown 'cosin'; did you mean 'cosine'", optim__schedule="cosin"),
    field(
        "settings of no smaller model",
        r"transfer\.base_width: mup needs the width of the model that the settings were tuned on",
        transfer__method="mup",
    ),
    field(
        "settings of a smaller model for an adapter",
        r"adapter: transfer\.method mup is for pretraining, .*; train all weights, or set transfer\.method to none",
        transfer__method="mup",
        transfer__base_width=8,
        adapter="lora",
    ),
    field(
        "settings of a smaller model for another optimizer",
        r"optim\.name: it isn't known how the rates of sgd .*; choose adamw or muon",
        transfer__method="mup",
        transfer__base_width=8,
        optim__name="sgd",
    ),
    field("a depth that adds more", r"transfer\.depth_alpha: 2\.0 is out of range", transfer__depth_alpha=2.0),
    field("no such adapter", r"adapter: unknown 'lorra'; did you mean 'lora'", adapter="lorra"),
    field("a negative learning rate", r"optim\.lr: -1(\.0)? is out of range; it must be 0 or more", optim__lr=-1.0),
    field("a learning rate of nan", r"optim\.lr: nan is out of range", optim__lr=float("nan")),
    field("beta of one", r"optim\.beta1: 1\.0 is out of range", optim__beta1=1.0),
    field("negative decay", r"optim\.weight_decay: -0\.1 is out of range", optim__weight_decay=-0.1),
    field("negative clipping", r"optim\.clip: -1\.0 is out of range", optim__clip=-1.0),
    field("an average that never moves", r"optim\.ema: 1\.0 is out of range", optim__ema=1.0),
    field("negative warm-up", r"optim\.warmup: -5 is out of range", optim__warmup=-5),
    field("warm-up longer than the run", r"optim\.warmup: 5 steps do not fit into train\.steps 3", optim__warmup=5),
    field("no steps", r"train\.steps: 0 is out of range; it must be at least 1", train__steps=0),
    field("no rows", r"train\.batch_size: 0 is out of range; it must be at least 1", train__batch_size=0),
    field("no positions", r"train\.seq_len: 0 is out of range; it must be at least 1", train__seq_len=0),
    field("no micro-batches", r"train\.micro_batches: 0 is out of range", train__micro_batches=0),
    field(
        "micro-batches that don't divide",
        r"train\.batch_size: 8 is not a multiple of train\.micro_batches 3",
        train__micro_batches=3,
    ),
    field("validation never", r"train\.eval_every: -1 is out of range", train__eval_every=-1),
    field("a log never", r"train\.log_every: 0 is out of range", train__log_every=0),
    field("checkpoints before they are made", r"train\.save_every: -1 is out of range", train__save_every=-1),
    field("no checkpoints kept", r"train\.keep: 0 is out of range", train__keep=0),
    field(
        "dropout above one",
        r"model\.dropout: 1\.5 is out of range; it must be 0 or more and below 1",
        model__dropout=1.5,
    ),
    field("no layers", r"model\.layers: 0 is out of range; it must be at least 1", model__layers=0),
    field(
        "heads that don't divide",
        r"model\.kv_heads: 2 .*heads.* 3|model\.heads: 3 .*kv_heads 2",
        model__heads=3,
        model__kv_heads=2,
    ),
    field(
        "smoothing above one",
        r"objective\.label_smoothing: 2\.0 is out of range; it must be 0 or more and below 1",
        objective__label_smoothing=2.0,
    ),
    field("rows longer than the model", r"train\.seq_len: 128 is longer than model\.positions 64", train__seq_len=128),
    field(
        "a vocabulary that doesn't fit",
        r"model\.vocab: 100 does not fit the tokenizer's \d+ tokens; set model\.vocab "
        r"to \d+",
        model__vocab=100,
    ),
    field(
        "an adapter of rank 0",
        r"adapter\.rank: 0 is out of range; it must be at least 1",
        adapter="lora",
        adapter__rank=0,
    ),
    field("a pattern that matches nothing", r"optim\.freeze: .*wombat", optim__freeze=("wombat",)),
    field("a pattern that is none", r"optim\.freeze: .*\(", optim__freeze=("(",)),
    field("an unknown compiler option", r"execution\.flags: ", execution__flags=("nonsense",)),
    # Devices.
    field("more devices than there are", r"mesh: .*16 does not fit 8 devices", mesh__fsdp=16),
    field("no devices", r"mesh\.fsdp: 0 is not a size", mesh__fsdp=0),
    field("rows that don't divide", r"train\.batch_size: .*7", train__batch_size=7),
    field("axes that don't divide", r"mesh.*tensor", mesh__tensor=8),
    # Data.
    field("no such data", r"data source 'no\.txt' does not exist", data__train=("no.txt",)),
    field("no data", r"data source is empty: name a file", data__train=("",)),
    field("an empty file", r"data source 'empty\.py' is empty", data__train=("empty.py",)),
    field("a folder without text", r"data source 'hollow' holds no text files", data__train=("hollow",)),
    field("a binary file as text", r"binary\.txt.*UTF-8", data__train=("binary.txt",)),
    field("an unknown kind of file", r"picture\.png is of an unknown kind", data__train=("picture.png",)),
    field(
        "a field that records don't have",
        r"lines\.jsonl:1: .*'body'",
        data__train=("lines.jsonl",),
        data__text_field="body",
    ),
    field("all held out", r"data\.holdout: 1\.0 is out of range; it must be 0 or more and below 1", data__holdout=1.0),
    field("nothing held out", r"data\.holdout: 0 leaves nothing to validate on", data__holdout=0.0),
    field(
        "weights of other sources",
        r"data\.weights: \(1\.0, 2\.0\) is not a weight for each of 1 training sources",
        data__weights=(1.0, 2.0),
    ),
    field("a negative weight", r"data\.weights: -1\.0 is out of range", data__weights=(-1.0,)),
    field("no such tokenizer", r"tokenizer 'no\.model' does not exist", data__tokenizer="no.model"),
    field(
        "a vocabulary of no number",
        r"data\.tokenizer: 'many' in 'sentencepiece:many' is not a vocabulary size",
        data__tokenizer="sentencepiece:many",
    ),
    field(
        "a vocabulary larger than the text",
        r"tokenizer: a vocabulary of 50000 does not fit 500 bytes of text",
        data__tokenizer="sentencepiece:50000",
    ),
    field("negative workers", r"data\.workers: -1 is out of range", data__workers=-1),
    field("a wrong column", r"table\.csv.*'sentiment'.*text, label", "classifier.py", objective__label="sentiment"),
    field("an empty table", r"hollow\.csv|objective\.labels: 0 labels", "classifier.py", data__train=("hollow.csv",)),
    field(
        "what an encoder can't learn",
        r"objective: causal trains a model of kind decoder.*bert is of kind encoder",
        "encoder.py",
    ),
    # Places.
    field("a folder that is a file", r"out: text\.txt is a file", out="text.txt"),
    field("a remote folder", r"out`?: gs:/+bucket/runs.* is an address", out="gs://bucket/runs"),
    field("a run of no name", r"name: ", name=""),
    field("a run beside its folder", r"name: ", name="../elsewhere"),
    field(
        "a directory of another run",
        r"tiny belongs to another config: .*; choose another `?-*name`?, or delete it",
        name="tiny",
        out=".",
        seed=5,
    ),
    field("a directory of something else", r"texts is not empty and holds no config\.json", name="texts", out="."),
    field(
        "new data for a run that isn't finished",
        r"data\.train: unfinished isn't trained to its end, .*finish it first with: jaxlm train unfinished$",
        "unfinished",
        data__train=("text.txt",),
    ),
    field("a start that isn't there", r"nowhere: no such model", start="nowhere"),
    # Models.
    using("no such model", r"nowhere/at-all: no such model; .*hf:nowhere/at-all", "nowhere/at-all"),
    using("an empty folder", r"hollow: has no config\.json", "hollow"),
    using("a file as a model", r"text\.txt: no such model", "text.txt"),
    using("a run without checkpoints", r"untrained.*checkpoint", "untrained"),
    using("weights that are cut off", r"broken/model\.safetensors", "broken"),
    using(
        "weights as pickle files", r"pickled: holds only pytorch_model\.bin, a pickle, .*safe_serialization", "pickled"
    ),
    using("an unknown architecture", r"model_type.*'llamma'.*llama", "unknown"),
    using("a gguf file that is none", r"fake\.gguf: not a GGUF file", "fake.gguf"),
    using("a name on no hub", r"hf:nobody/nothing: can't be brought from the hub", "hf:nobody/nothing"),
    using("an adapter of another model", r"foreign.*16|foreign.*shape", "published+foreign"),
    Mistake(
        "a step that isn't there",
        r"no checkpoint at step 99 \(there: 0\)",
        lambda: jaxlm.open("tiny", step=99),
        ["generate", "tiny", "--prompt", "a", "--step", "99"],
    ),
    # Generation.
    using("a negative temperature", r"temperature: -1\.0 is out of range; it must be 0 or more", temperature=-1.0),
    using("top-p of nothing", r"top.p: 0\.0 is out of range", top_p=0.0),
    using("no tokens", r"tokens: 0 is out of range; it must be at least 1", tokens=0),
    using("samples that are all the same", r"samples: greedy answers are all the same", samples=2),
    using("a prompt longer than the model", r"prompt.*64|positions", prompt="a" * 100),
    using("an unknown setting", r"temprature.*temperature", temprature=1.0),
    using("text from an encoder", r"encoder", "encoder"),
    using("a regular expression that is none", r"regex: ", regex="("),
    using("a schema that is no JSON", r"json_schema: ", json_schema="{"),
    Mistake(
        "vectors of nothing",
        r"texts: there are none|--file: empty\.py holds no text",
        lambda: jaxlm.open("encoder").embed([]),
        ["embed", "encoder", "--file", "empty.py"],
    ),
    Mistake(
        "vectors of a file that isn't there",
        r"no\.txt: there is no such file: check the path",
        None,
        ["embed", "encoder", "--file", "no.txt"],
    ),
    Mistake("vectors of a folder", r"texts: is a folder: name a file", None, ["embed", "encoder", "--file", "texts"]),
    Mistake("a chat without a template", r"published: the model has no chat template", None, ["chat", "published"]),
    Mistake("no such command", r"unknown command trian; did you mean 'train'\?", None, ["trian", "base.py"]),
    Mistake(
        "no such option",
        r"unknown option --batchs; did you mean '--batches'\?",
        None,
        ["eval", "published", "--batchs", "3"],
    ),
    Mistake(
        "a word for a count", r"--batches: 'many' is not a valid int", None, ["eval", "published", "--batches", "many"]
    ),
    Mistake(
        "an option without its value",
        r"optim\.lr: '' is not a valid float",
        None,
        ["train", "base.py", "--optim.lr"],
    ),
    Mistake("no prompt", r"give a --prompt", None, ["generate", "published"]),
    Mistake(
        "vectors from a decoder", r"encoder", lambda: jaxlm.open("tiny").embed(["a"]), ["embed", "tiny", "--text", "a"]
    ),
    # Evaluation, plans, files.
    Mistake(
        "no data to evaluate on",
        r"eval: published has no validation data of its own; name some with (`data`|--data)",
        lambda: jaxlm.evaluate("published"),
        ["eval", "published"],
    ),
    Mistake(
        "a cache where text is read at once",
        r"--cache: text is read at once, without a cache; leave it out",
        None,
        ["eval", "published", "--cache", "int8"],
    ),
    Mistake(
        "evaluation on what isn't there",
        r"data source 'no\.txt' does not exist",
        lambda: jaxlm.evaluate("published", "no.txt"),
        ["eval", "published", "--data", "no.txt"],
    ),
    Mistake(
        "negative batches",
        r"batches: -1 ",
        lambda: jaxlm.evaluate("tiny", batches=-1),
        ["eval", "tiny", "--batches", "-1"],
    ),
    Mistake(
        "a plan for no machine",
        r"target: .*h1000",
        lambda: jaxlm.plan(jaxlm.load("base.py"), "h1000:8"),
        ["plan", "base.py", "--target", "h1000:8"],
    ),
    Mistake(
        "a plan for no devices",
        r"target: ",
        lambda: jaxlm.plan(jaxlm.load("base.py"), "h100:0"),
        ["plan", "base.py", "--target", "h100:0"],
    ),
    Mistake(
        "an export onto what is there",
        r"texts: is there already",
        lambda: jaxlm.open("published").save("texts"),
        ["export", "published", "texts"],
    ),
    Mistake(
        "an unknown format",
        r"format: unknown 'onnx'",
        lambda: jaxlm.open("published").save("new/out", format="onnx"),
        ["export", "published", "new/out", "--format", "onnx"],
    ),
    Mistake(
        "an unknown dtype",
        r"dtype: 'int3' is not for hf",
        lambda: jaxlm.open("published").save("new/out", dtype="int3"),
        ["export", "published", "new/out", "--dtype", "int3"],
    ),
    Mistake(
        "an unknown type of GGUF file",
        r"quantize: unknown 'q4km'; did you mean 'q4_k_m'\?",
        lambda: jaxlm.open("published").save("new.gguf", format="gguf", quantize="q4km"),
        ["export", "published", "new.gguf", "--format", "gguf", "--quantize", "q4km"],
    ),
    Mistake(
        "a type of GGUF file for a dtype",
        r"dtype: 'q8_0' is not for gguf; did you mean --quantize q8_0\?",
        lambda: jaxlm.open("published").save("new.gguf", format="gguf", dtype="q8_0"),
        ["export", "published", "new.gguf", "--format", "gguf", "--dtype", "q8_0"],
    ),
    Mistake(
        "calibration of nothing",
        r"calibration: needs ",
        lambda: jaxlm.open("published").save("new.gguf", format="gguf", calibration="texts"),
        ["export", "published", "new.gguf", "--format", "gguf", "--calibration", "texts"],
    ),
    Mistake(
        "an export of no adapter",
        r"adapter",
        lambda: jaxlm.open("published").save("new/out", format="peft"),
        ["export", "published", "new/out", "--format", "peft"],
    ),
    Mistake(
        "an export of plain weights in few bits",
        r"format gptq: published has no weights of few bits; make them first: jaxlm compress published COMPRESSED",
        lambda: jaxlm.open("published").save("new/out", format="gptq"),
        ["export", "published", "new/out", "--format", "gptq"],
    ),
    Mistake(
        "an import onto what is there",
        r"texts: is there already",
        lambda: jaxlm.import_model("tiny", "texts"),
        ["import", "tiny", "texts"],
    ),
    Mistake(
        "an import of what isn't there",
        r"nowhere: no such model",
        lambda: jaxlm.import_model("nowhere", "new/run"),
        ["import", "nowhere", "new/run"],
    ),
    merging("other sizes", r"models: ffn is 32 in wide and 24 in published; only models of one shape", "wide"),
    merging("another architecture", r"models: encoder and published are of different architectures", "encoder"),
    merging("one model", r"models: linear merges 2 or more, and here are 1"),
    merging("changes since nothing", r"base: ties merges what models changed since their base", "tiny", method="ties"),
    Mistake(
        "a compression without text",
        r"calibration: gptq needs text to be calibrated on",
        lambda: jaxlm.compress("published", "small"),
        ["compress", "published", "small"],
    ),
    Mistake(
        "a share of zeros that leaves nothing",
        r"share: 1.0 is out of range",
        lambda: jaxlm.compress("published", "small", method="magnitude", share=1.0),
        ["compress", "published", "small", "--method", "magnitude", "--share", "1"],
    ),
    Mistake(
        "another method's setting",
        r"alpha: nearest has no such setting; leave it out, or choose smooth",
        lambda: jaxlm.compress("published", "small", method="nearest", alpha=0.5),
        ["compress", "published", "small", "--method", "nearest", "--alpha", "0.5"],
    ),
    Mistake(
        "a rank and a share at once",
        r"rank: says how many numbers stay, and so does share; leave one out",
        lambda: jaxlm.compress("published", "small", method="svd", rank=4, share=0.5),
        ["compress", "published", "small", "--method", "svd", "--rank", "4", "--share", "0.5"],
    ),
    merging("a share above one", r"density: 1\.5 is out of range", "tiny", method="ties", density=1.5),
    merging("a setting of another method", r"t: linear has no such setting; leave it out", "tiny", t=0.25),
    merging("a weight for one of two", r"weights: 1 for 2 models; give one for each", "tiny", weights=(1.0,)),
    merging("numbers that are none", r"spoilt/model\.safetensors: model\.norm\.weight holds NaN or infinity", "spoilt"),
    merging("onto what is there", r"texts: is there already", "tiny", out="texts"),
    shrinking("more heads than there are", r"heads: 4 are more than the model's 2", heads=4),
    shrinking("a width that heads don't divide", r"width: 15 is not a multiple of model\.heads 2", "encoder", width=15),
    shrinking("no text", r"calibration: .*published names no text that it was trained on", ffn=8),
    shrinking("text that isn't there", r"nowhere\.txt", ffn=8, calibration=("nowhere.txt",)),
    shrinking("size and share", r"share alone, not share and ffn", ffn=8, share=0.5),
    sweeping("no space", r"space: give the fields that vary, such as"),
    sweeping("an unknown field", r"space: unknown config key optim\.lrr; did you mean 'optim\.lr'\?", "optim.lrr=1|2"),
    sweeping("a value out of range", r"space: optim\.lr: -1\.0 is out of range; it must be 0 or more", "optim.lr=-1|1"),
    sweeping("a range out of range", r"space: optim\.beta1: 1\.5 is out of range", "optim.beta1=uniform(0.5,1.5)"),
    sweeping("a word for a number", r"space: optim\.lr: 'fast' is not a valid float", "optim.lr=fast|slow"),
    sweeping(
        "a range by factors from zero", r"space: optim\.lr: a range by factors begins above 0", "optim.lr=log(0,1)"
    ),
    sweeping("an unknown adapter", r"space: adapter: unknown 'lorra'; did you mean 'lora'\?", "adapter=none|lorra"),
    sweeping("a field of some adapters", r"space: .*rank.*choose a method", "adapter=none|lora", "adapter.rank=4|8"),
    sweeping("seeds in the space", r"space: seed is no setting to search", "seed=0|1"),
    sweeping("a grid of a range", r"sampler: grid tries every point", "optim.lr=log(1e-4,1e-2)", sampler="grid"),
    sweeping(
        "devices that are too few",
        r"devices: names 1 places, and 2 trials run at once",
        "optim.lr=1|2",
        parallel=2,
        devices=("0",),
    ),
    sweeping(
        "a sweep where something else is",
        r"texts is not empty and holds no sweep\.json",
        "optim.lr=1|2",
        config="elsewhere.py",
    ),
    sweeping(
        "a metric of which nothing is known",
        r"train\.metric: say whether less or more of 'speed' is better",
        "optim.lr=1|2",
        config="metric.py",
    ),
    Mistake(
        "an adapter of a difference from another model",
        r"base: .* is \[.*\], and .* in published; give the model that it began as",
        lambda: jaxlm.extract("published", "wide", "new/out"),
        ["extract", "published", "wide", "new/out"],
    ),
    Mistake(
        "a report of no run",
        r"hollow has no metrics\.jsonl: name the directory of a run",
        lambda: jaxlm.RunDirectory("hollow").report(),
        ["report", "hollow"],
    ),
    Mistake(
        "a coordinate check that is to search",
        r"coordinate.check: searches no settings",
        None,
        ["sweep", "tiny_llama", "--coordinate-check", "--space", "optim.lr=1e-3|1e-2"],
    ),
    Mistake(
        "a served adapter without a name",
        r"adapter: 'lora' is not NAME=DIR",
        None,
        ["serve", "published", "--port", "0", "--adapter", "lora"],
    ),
    Mistake(
        "adapters of a served encoder",
        r"adapter, template: are for models that write text",
        None,
        ["serve", "encoder", "--port", "0", "--adapter", "poems=lora"],
    ),
    Mistake(
        "a JSON file that is no config.json",
        r"list\.json: holds no configuration of a run",
        lambda: jaxlm.load("list.json"),
        ["train", "list.json"],
    ),
    Mistake(
        "a plugin that isn't there",
        r"plugin.*nowhere",
        lambda: jaxlm.load_plugin("nowhere"),
        ["train", "base.py", "--plugin", "nowhere"],
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Makes a folder with what mistakes are made with: configs, texts, and models that were never trained."""
    folder = tmp_path_factory.mktemp("mistakes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        _write_files(folder)
        published(folder / "published")
        published(folder / "encoder", "bert")
        published(folder / "wide", ffn=32)
        for name in ("broken", "pickled", "unknown", "spoilt"):
            shutil.copytree("published", name)
        Path("broken/model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
        safetensors.place(safetensors.open_files("spoilt"), "model.norm.weight")[0] = np.nan
        Path("pickled/model.safetensors").rename("pickled/pytorch_model.bin")
        _change("unknown/config.json", model_type="llamma", architectures=["Llamma"])
        jaxlm.import_model("published", "tiny")
        Path("foreign").mkdir()
        Path("foreign/adapter_config.json").write_text(json.dumps(LORA))
        halves = {"A": np.zeros((4, 48), np.float32), "B": np.zeros((48, 4), np.float32)}
        of = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        save_file({of.format(half): value for half, value in halves.items()}, "foreign/adapter_model.safetensors")
        shutil.copytree("tiny", "untrained", ignore=shutil.ignore_patterns("checkpoints"))
        shutil.copytree("untrained", "negative")
        shutil.copytree("tiny", "unfinished")
        data = json.loads(Path("unfinished/config.json").read_text())["data"]
        _change("unfinished/config.json", data=data | {"train": ["texts"]})
        _change("negative/config.json", optim={"lr": -1.0})
        Path("list.json").write_text("[1, 2]")
        yield folder


def _change(file: str, **changes: Any) -> None:
    """Changes fields of a JSON file."""
    values = json.loads(Path(file).read_text())
    Path(file).write_text(json.dumps(values | changes))


LORA = dict(peft_type="LORA", task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj"], bias="none",
            base_model_name_or_path="another")  # fmt: skip


def _write_files(folder: Path) -> None:
    files: dict[str, str | bytes] = {
        "base.py": BASE,
        "classifier.py": CLASSIFIER,
        "encoder.py": CLASSIFIER.replace("objective=classify.Config(), data=data", "data=data"),
        "syntax.py": "def config():\n    x = 1\n    return Run(\n",
        "fails.py": "def config():\n    return Rnu()\n",
        "imports.py": "import nowhere\n",
        "misspelt.py": "from jaxlm.core.config import Optim\n\n\ndef config():\n    return Optim(lrate=1)\n",
        "none.py": "def config():\n    pass\n",
        "zero.py": "from base import config as base\nimport dataclasses\n\n\n"
        "def config():\n    return dataclasses.replace(base(), train=dataclasses.replace(base().train, steps=0))\n",
        "empty.py": "",
        "elsewhere.py": "from base import config as base\nimport dataclasses\n\n\n"
        "def config():\n    return dataclasses.replace(base(), name='texts', out='.')\n",
        "metric.py": "from base import config as base\nimport dataclasses\n\n\n"
        "def config():\n    train = dataclasses.replace(base().train, metric='speed')\n"
        "    return dataclasses.replace(base(), train=train)\n",
        "text.txt": "a text\n",
        "table.csv": "text,label\ngood,yes\nbad,no\n" * 4,
        "hollow.csv": "",
        "lines.jsonl": '{"text": "a"}\n{"text": "b"}\n',
        "binary.txt": bytes(range(256)),
        "picture.png": b"\x89PNG\r\n",
        "fake.gguf": b"GGUX" + bytes(100),
        "cut/config.json": '{"name": ',
    }
    for i in range(6):
        files[f"texts/{i}.txt"] = "the one times two is two\n" * 20
    (folder / "hollow").mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    found = [p for p in folder.rglob("*") if "__pycache__" not in p.parts]
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns if p.is_file() else 0) for p in found}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing(mistake, place, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = _files(place)
    if mistake.call is not None:
        with pytest.raises(ValueError, match=mistake.message) as caught:
            mistake.call()
        assert "\n" not in str(caught.value)
        assert _files(place) == before
    capsys.readouterr()
    assert cli.main(mistake.argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said, said
    assert re.search(mistake.message, said), said
    assert _files(place) == before


def test_every_number_of_a_configuration_declares_its_range():
    kinds = [config.Run, Sampling, *(part.Config for table in (MODELS, OBJECTIVES, METHODS) for part in table.values())]
    unlimited = {name for kind in kinds for name in _without_range(kind)}
    axes = {f"Mesh.{axis}" for axis in mesh.AXES}  # `mesh.sizes` checks them: -1 takes what is left
    ids = {f"Sampling.{name}_ids" for name in ("stop", "allowed", "banned")}  # `sampling.check` knows the vocabulary
    columns = {"Config.word", "Config.tag"}  # of CoNLL files, from the end too
    assert unlimited == axes | ids | columns


def _without_range(kind: type) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for name, full in typing.get_type_hints(kind, include_extras=True).items():
        inner = {hints[name], *typing.get_args(hints[name])}
        if inner & {int, float} and not ranges.ranges(full) and name in {f.name for f in dataclasses.fields(kind)}:
            yield f"{kind.__name__}.{name}"
        for part in inner:
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from _without_range(part)


def test_a_folder_that_may_not_be_written_to_is_no_full_disk(tmp_path, monkeypatch):
    run = jaxlm.load("tiny_llama", out=str(tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"out: no permission to write in .*; choose another `out`"):
        jaxlm.train(run)
    denied = PermissionError(errno.EACCES, "Permission denied", "results.json")
    assert cli.one_line(denied) == "results.json: permission denied: make the folder writable"
    full = OSError(errno.ENOSPC, "No space left on device", "results.json")
    assert cli.one_line(full) == "results.json: the disk is full: free some space"


def test_a_new_directory_is_removed_until_the_work_begins(tmp_path):
    folder = tmp_path / "runs" / "new"
    for begins, refused in ((False, ValueError), (True, ValueError), (False, KeyError)):
        with pytest.raises(refused), removed_if_refused(folder) as begin:
            (folder / "tokenizer").mkdir(parents=True)
            if begins:
                begin()
            raise refused
        assert folder.exists() == (begins or refused is KeyError) and folder.parent.exists() == folder.exists()
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    (folder / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError), removed_if_refused(folder):
        raise ValueError
    assert (folder / "checkpoints").exists()
