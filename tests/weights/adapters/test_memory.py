"""What the compiler says a train step holds: weights as they rest, moments and gradients of what is trained, and never
all numbers of a quantized model."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np

from jaxlm.assembly import program as programs
from jaxlm.core import config
from jaxlm.models import llama
from jaxlm.objectives import causal
from jaxlm.weights.adapters import Lora

WIDTH, KV, FFN, LAYERS, VOCAB, RANK = 256, 128, 512, 16, 512, 8
MATRICES = [(WIDTH, WIDTH), (WIDTH, KV), (WIDTH, KV), (WIDTH, WIDTH), (WIDTH, FFN), (WIDTH, FFN), (FFN, WIDTH)]
LAYER = sum(n * m for n, m in MATRICES)
OTHERS = 2 * VOCAB * WIDTH + (2 * LAYERS + 1) * WIDTH
ALL = LAYERS * LAYER + OTHERS
ADAPTERS = LAYERS * sum(RANK * (n + m) for n, m in MATRICES)
# 4 bits a number, 8 for each 64, and of each 64 rows two float32.
NF4 = LAYERS * sum(n * m // 2 + n * m // 64 + n // 64 * 2 * 4 for n, m in MATRICES)
BATCH = {name: np.ones((1, 8, 2), np.int32) for name in ("tokens", "targets", "segments", "positions")}
BATCH |= {"weights": np.ones((1, 8, 2), np.float32)}
WAYS = {
    "full": config.Adapter(),
    "lora": Lora(rank=RANK, targets=("all",)),
    "qlora": Lora(rank=RANK, targets=("all",), base="nf4"),
}


@functools.cache
def traced(way: str, optimizer: str, remat: str):
    run = config.Run(
        "memory",
        llama.Config(vocab=VOCAB, layers=LAYERS, width=WIDTH, heads=4, kv_heads=2, head_width=64, ffn=FFN),
        causal.Config(),
        adapter=WAYS[way],
        optim=config.Optim(name=optimizer, momentum=0.0, warmup=1),
        train=config.Train(steps=10, batch_size=8, seq_len=2),
        execution=config.Execution(dtype="float32", remat=remat, scan=True),
    )
    # Of one device, whatever this process has.
    program = dataclasses.replace(programs.program(run, SimpleNamespace(vocab_size=VOCAB)), mesh=None)
    return program.train_step().trace(program.abstract_state(), BATCH)


@functools.cache
def memory(way: str, optimizer: str, remat: str):
    return traced(way, optimizer, remat).lower().compile().memory_analysis()


def test_state_is_the_weights_as_they_rest_and_two_moments_of_what_is_trained():
    expected = {
        "full": 4 * ALL + 8 * ALL,
        "lora": 4 * ALL + 12 * ADAPTERS,
        "qlora": NF4 + 4 * OTHERS + 12 * ADAPTERS,
    }
    assert 4.1 < 8 * NF4 / (LAYERS * LAYER) < 4.2, "bits a weight"
    batch = sum(x.nbytes for x in BATCH.values())
    for way, size in expected.items():
        m = memory(way, "adamw", "none" if way == "full" else "full")
        scalars = m.argument_size_in_bytes - batch - size
        assert 0 < scalars <= 48, f"{way}: counters, and a run's seed and rates"
        assert m.output_size_in_bytes - m.alias_size_in_bytes < 1024, "the old state's memory becomes the new one's"


def test_only_what_is_trained_has_gradients():
    saved = memory("full", "sgd", "full").temp_size_in_bytes - memory("lora", "sgd", "full").temp_size_in_bytes
    np.testing.assert_allclose(saved, 4 * (ALL - ADAPTERS), rtol=0.04)


def test_quantized_weights_are_never_dense_at_one_time():
    dense = 4 * LAYERS * LAYER
    qlora, lora = (memory(way, "adamw", "full").temp_size_in_bytes for way in ("qlora", "lora"))
    assert qlora - lora < dense / LAYERS, "no more than one layer's"
    # Without remat activations are kept, but each product's backward pass still makes its weight's numbers again.
    assert memory("qlora", "sgd", "none").temp_size_in_bytes < dense / 2


def test_frozen_weights_pass_through_untouched():
    closed = traced("qlora", "adamw", "full").jaxpr
    same = set(closed.jaxpr.outvars) & set(closed.jaxpr.invars)
    frozen = len(MATRICES) * 4 + len(("embed", "head", "norm", "norm1", "norm2"))
    assert len(same) == frozen
