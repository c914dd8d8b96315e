"""A model is exported as StableHLO programs and weights, which run wherever jax does, without this package.

B rows (any number), T positions of a program, L cache slots, V vocabulary, D width.

The folder holds `model.safetensors`, one program (`jax.export`) for each function and length, `model.json` that lists
them, and `run.py`, which shows how to call them. Weights are arguments of every program, so they exist once.
"""

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as exporting

from jaxlm.core import config
from jaxlm.formats import safetensors
from jaxlm.inference import decode
from jaxlm.models.model import Model
from jaxlm.nn.cache import Cache
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import logits

PLATFORMS = ("cpu", "cuda", "tpu")
DTYPES = ("float32", "bfloat16")


def save(
    folder: str | Path,
    model: Model,
    params: Any,
    *,
    lengths: Sequence[int] = (64, 512),
    cache: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> list[str]:
    """Writes the folder; returns a line on each thing written. The compute dtype is the model's `execution.dtype`.

    `lengths` are T of the programs; a caller pads its rows to one of them. `cache` is L of the generating programs
    (default: twice the longest of `lengths`, or the longest the model has; 0 makes no such programs).
    """
    folder = Path(folder)
    model, lengths, slots = _checked(folder, model, lengths, cache)
    weights = _named(decode.prepare(model, params))
    for name, w in weights.items():
        if not isinstance(w, jax.Array):
            raise ValueError(f"{name}: is {type(w).__name__}, not plain numbers; merge adapters and dequantise first")
    programs = _programs(model, params, lengths, slots)
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"vocab": model.config.vocab, "kind": model.family.kind, "lengths": list(lengths)}
    about |= {"cache": slots, "positions": model.config.positions, "platforms": list(platforms), "programs": {}}
    notes = []
    for name, (f, inputs) in programs.items():
        exported = exporting.export(jax.jit(f), platforms=platforms)(_shapes(weights), *inputs)
        data = exported.serialize()
        (folder / f"{name}.stablehlo").write_bytes(data)
        about["programs"][name] = _signature(exported)
        notes.append(f"{name}.stablehlo: {len(data):,} bytes")
    tensors = {name: (w.dtype, w.shape) for name, w in weights.items()}
    safetensors.write(folder, tensors, lambda name: np.asarray(weights[name]), max_bytes=1 << 62)
    notes.append(f"model.safetensors: {sum(math.prod(w.shape) for w in weights.values()):,} numbers")
    (folder / "run.py").write_text(RUN)
    (folder / "model.json").write_text(json.dumps(about, indent=1) + "\n")
    return notes


def _checked(
    folder: Path, model: Model, lengths: Sequence[int], cache: int | None
) -> tuple[Model, tuple[int, ...], int]:
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError("StableHLO programs need the flatbuffers package: pip install 'jaxlm[interop]'")
    if (folder / "model.json").exists():
        raise ValueError(f"{folder}: holds a model.json already; choose another folder or remove it")
    if model.family.kind == "encoder_decoder":
        raise ValueError("stablehlo: encoder-decoders are not exported; decoders and encoders are")
    limit = model.config.positions or max(2 * max(lengths), 1)
    lengths = tuple(sorted({min(n, limit) for n in lengths}))
    if lengths[0] < 1:
        raise ValueError(f"stablehlo: lengths {lengths} must be positive")
    slots = min(2 * lengths[-1], limit) if cache is None else cache
    slots = slots if model.family.generates else 0
    if slots and not lengths[-1] <= slots <= limit:
        raise ValueError(f"stablehlo: cache {slots} must hold the longest of lengths {lengths[-1]} and at most {limit}")
    dtype = model.shard.execution.dtype
    if dtype not in DTYPES:
        raise ValueError(f"stablehlo: execution.dtype {dtype!r} is not exported, only {', '.join(DTYPES)}")
    # Plain XLA runs on every platform; one device, no mesh.
    return (
        dataclasses.replace(model, shard=Layout(execution=config.Execution(dtype=dtype, attention="xla"))),
        lengths,
        slots,
    )


def _named(tree: Any) -> dict[str, Any]:
    """Returns every weight by its path: `blocks/0/q`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): w for path, w in leaves}


def _shapes(weights: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()}


def _programs(
    model: Model, params: Any, lengths: tuple[int, ...], slots: int
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Returns {name: (function of (weights, …), shapes of its other arguments)}."""
    structure = jax.tree.structure(jax.eval_shape(lambda p: decode.prepare(model, p), params))
    (B,) = exporting.symbolic_shape("b")

    def ints(*shape: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def forward(weights: dict, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        p = _tree(structure, weights)
        out = model.forward(p, dict(tokens=tokens_BT, positions=positions_BT, segments=segments_BT))
        return logits(model.readout(p, out.x_BTD), model.shard) if model.family.kind == "decoder" else out.x_BTD

    def prefill(weights: dict, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array) -> Any:
        batch = dict(tokens=tokens_BT, positions=positions_BT, segments=segments_BT)
        z_BV, cache = decode.prefill(model, _tree(structure, weights), batch, slots)
        return z_BV, _plain(cache)

    def step(weights: dict, cache: dict, tokens_B: jax.Array, positions_B: jax.Array) -> Any:
        earlier = Cache(cache["layers"], cache["end"], cache["real"], fresh=False)
        params = _tree(structure, weights)
        z_BTV, new = decode.extend(model, params, earlier, tokens_B[:, None], positions_B[:, None])
        return z_BTV[:, 0], _plain(new)

    out: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    for T in lengths:
        out[f"forward_{T}"] = forward, (ints(B, T),) * 3
    for T in lengths if slots else ():
        out[f"prefill_{T}"] = prefill, (ints(B, T),) * 3
    if slots:
        shapes = _shapes(_named(jax.eval_shape(lambda p: decode.prepare(model, p), params)))
        _, cache = jax.eval_shape(prefill, shapes, *(ints(B, lengths[-1]),) * 3)
        out["step"] = step, (cache, ints(B), ints(B))
    return out


def _tree(structure: Any, weights: Mapping[str, Any]) -> Any:
    """Rebuilds the tree: the inverse of `_named`. Dicts come back sorted by name, the structure's order is by path."""
    paths = _named(jax.tree.unflatten(structure, range(structure.num_leaves)))
    return jax.tree.unflatten(structure, [weights[name] for name in paths])


def _plain(cache: Cache) -> dict[str, Any]:
    """Returns a cache as plain dicts: a program's caller doesn't know our classes."""
    return dict(layers=cache.layers, end=cache.end, real=cache.real_BS)


def _signature(exported: exporting.Exported) -> dict[str, Any]:
    """Describes a program's inputs, weights left out, and its outputs."""

    def types(tree: Any) -> Any:
        return jax.tree.map(lambda a: a.str_short(), tree)

    args, _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    return {"inputs": types(args[1:]), "outputs": types(jax.tree.unflatten(exported.out_tree, exported.out_avals))}


RUN = '''"""Runs the model in this folder with jax, numpy, safetensors and flatbuffers; nothing else is needed.

    python run.py 504 3575 282 4649 314 --new 8

Rows are lists of token ids. The programs take `tokens`, `positions` (0, 1, ... of each row) and `segments` (1; 0 for
padding), int32 [B, T].
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from safetensors.flax import load_file

HERE = Path(__file__).resolve().parent
ABOUT = json.loads((HERE / "model.json").read_text())
WEIGHTS = load_file(HERE / "model.safetensors")


def program(name):
    return jax.jit(jax.export.deserialize(bytearray((HERE / f"{name}.stablehlo").read_bytes())).call)


def padded(rows, left):
    longest = max(map(len, rows))
    T = next((n for n in ABOUT["lengths"] if n >= longest), None)
    if T is None:
        raise ValueError(f"a row has {longest} tokens, the longest program {ABOUT['lengths'][-1]}")
    out = np.zeros((3, len(rows), T), np.int32)
    for i, row in enumerate(rows):
        place = slice(T - len(row), T) if left else slice(0, len(row))
        out[:, i, place] = row, range(len(row)), [1] * len(row)
    return T, out


def forward(rows):
    """Logits [T, V] of each row (of an encoder: vectors [T, D])."""
    T, inputs = padded(rows, left=False)
    out = program(f"forward_{T}")(WEIGHTS, *inputs)
    return [np.asarray(x[: len(row)]) for x, row in zip(out, rows)]


def generate(rows, new):
    """The likeliest `new` tokens after each row, one after another."""
    T, inputs = padded(rows, left=True)
    if T + new > ABOUT["cache"] + 1:
        raise ValueError(f"{T} places and {new} new tokens do not fit a cache of {ABOUT['cache']}")
    logits, cache = program(f"prefill_{T}")(WEIGHTS, *inputs)
    step, made = program("step"), []
    for i in range(new):
        made.append(np.asarray(logits.argmax(-1), np.int32))
        if i + 1 < new:
            at = np.asarray([len(row) + i for row in rows], np.int32)
            logits, cache = step(WEIGHTS, cache, made[-1], at)
    return np.stack(made, 1).tolist()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tokens", type=int, nargs="+")
    p.add_argument("--new", type=int, default=8, help="tokens to generate")
    a = p.parse_args()
    if ABOUT["cache"]:
        print(*generate([a.tokens], a.new)[0])
    else:
        print(forward([a.tokens])[0])
'''
