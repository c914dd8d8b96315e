"""How devices talk in a train step on meshes of accelerators that aren't here: collectives of the compiled program.

Small models, from shapes alone, by the real compilers (`pip install libtpu` for v5e and v6e, `pip install
"jax[cuda13]"` for GPUs). Fails where what a kind of parallelism promises is not in the program.
"""

import argparse
import collections
import os
import re
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import jax
import jax.numpy as jnp
from aot_qlora import compilers
from worker import save

from jaxlm.core import config
from jaxlm.models import MODELS, llama, mixtral
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout, batch_sharding
from jaxlm.nn.moe import Moe
from jaxlm.objectives import causal
from jaxlm.planning import targets
from jaxlm.runtime.mesh import make_mesh, on_mesh, replicated
from jaxlm.training import environment, optimizers, step

B, T = 8, 512
SHAPE = dict(vocab=1024, layers=2, width=256, heads=4, kv_heads=4, head_width=64)
DENSE, SPARSE = llama.Config(**SHAPE, ffn=512), mixtral.Config(**SHAPE, moe=Moe(experts=8, ffn=512))
CUT = ("stream=context+tensor",)
# Of four devices: (model, mesh, execution, micro-batches, what must be in the program).
WAYS: dict[str, tuple[Any, dict, dict, int, str]] = {
    "tensor": (DENSE, dict(data=2, tensor=2), {}, 1, "all-reduce"),
    "tensor, cut norms": (DENSE, dict(data=2, tensor=2, compute=CUT), {}, 1, "reduce-scatter|all-reduce-scatter"),
    "ZeRO 1": (DENSE, dict(fsdp=4, zero=1), {}, 2, ""),
    "ZeRO 2": (DENSE, dict(fsdp=4, zero=2), {}, 2, "reduce-scatter|all-reduce-scatter"),
    "ZeRO 3": (DENSE, dict(fsdp=4), {}, 2, "all-gather"),
    "expert, tokens travel": (SPARSE, dict(expert=4), {}, 1, "ragged-all-to-all"),
    "expert x tensor, cut norms": (SPARSE, dict(expert=2, tensor=2, compute=CUT), {}, 1, "ragged-all-to-all"),
}
KINDS = r"(?:ragged-)?all-to-all|all-gather|all-reduce(?:-scatter)?|reduce-scatter|collective-permute"


def devices_of(name: str) -> list[Any]:
    return targets.parse(f"{name}:1x4" if name == "rtx4090" else f"{name}:2x2").devices()


def compiled(devices: list[Any], way: str) -> dict[str, Any]:
    c, fields, execution, micro, expected = WAYS[way]
    mesh_config = config.Mesh(**fields)
    family = MODELS.of(c)
    # `gpu`, as JAX calls the backend, whatever its plug-in is called
    backend = "tpu" if devices[0].platform == "tpu" else "gpu"
    with mock.patch.multiple(jax, default_backend=lambda: backend):
        mesh = make_mesh(mesh_config, devices)
        layout = Layout.of(mesh_config, config.Execution(dtype="bfloat16", attention="xla", **execution))
        specs = family.specs(c)
        model = Model(family, c, specs, layout)
        optimizer = optimizers.make(config.Optim(), 1000, specs)
        weights, moments = layout.shardings(specs, mesh), layout.shardings(specs, mesh, layout.moments)
        homes = step.shardings(specs, weights, optimizer, False, replicated(mesh), moments)
        train = step.make_train_step(
            lambda p, b, k: causal.loss(causal.Config(), model, p, b, k), causal.totals, optimizer, seed=0, clip=1.0,
            ema=0.0, shardings=step.UpdateShardings.of(mesh_config.zero, weights, moments, optimizer),
        )  # fmt: skip
        home = batch_sharding(layout, mesh, (micro, B // micro, T), T)
        kinds = dict(tokens=jnp.int32, positions=jnp.int32, segments=jnp.int32, targets=jnp.int32, weights=jnp.float32)
        batch = {k: jax.ShapeDtypeStruct((micro, B // micro, T), kind, sharding=home) for k, kind in kinds.items()}
        state = jax.eval_shape(lambda: step.init_state(specs, optimizer, jax.random.key(0), False))
        state = jax.tree.map(lambda x, h: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=h), state, homes)
        started = time.perf_counter()
        with on_mesh(mesh):
            program = jax.jit(train, donate_argnums=0, out_shardings=(homes, None)).lower(state, batch).compile()
    text, memory = program.as_text(), program.memory_analysis()
    found = collections.Counter(re.findall(rf"[ %]({KINDS})(?:-start)?(?:\.[\d.]+)?\(", text))
    fused = len(re.findall(r"calls=%all-reduce-scatter", text))  # how a TPU's compiler writes it
    if fused:
        found["all-reduce-scatter"] += fused
    return {
        "collectives": dict(found),
        "as_promised": not expected or any(found[name] for name in expected.split("|")),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_s": round(time.perf_counter() - started, 1),
        "text": text,
    }


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", nargs="+", default=["v5e"], help="v5e or v6e (2 x 2 chips), rtx4090 (four in a node)")
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    p.add_argument("--hlo", type=Path, help="folder to write the compiled programs to")
    p.add_argument("--save", default="aot_collectives", help="name under results/; - : don't save")
    a = p.parse_args()
    every: dict[str, dict[str, Any]] = {}
    for name in a.device:
        devices = devices_of(name)
        for way in a.ways:
            try:
                one = compiled(devices, way)
            except jax.errors.JaxRuntimeError as e:
                one = {"refused": str(e).partition("\n")[0][:300], "as_promised": False}
            if a.hlo:
                a.hlo.mkdir(parents=True, exist_ok=True)
                (a.hlo / f"{name} {way}.txt").write_text(one.get("text", ""))
            one.pop("text", None)
            every.setdefault(name, {})[way] = one
            print(name, way, one, flush=True)
    if a.save != "-":
        what = "collectives of train steps of small models on four devices, from the compilers; nothing ran"
        save(a.save, {"what": what, "settings": {"batch": B, "seq": T, "shape": SHAPE},
                      "versions": environment.environment()["versions"] | compilers(), "found": every})  # fmt: skip
    return 0 if all(one["as_promised"] for ways in every.values() for one in ways.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
