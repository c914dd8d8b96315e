"""Multiplies a few rows by a matrix of int8 or int4 on a CPU, as decoding does, without ever making it dense.

XLA writes such a matrix as float32 before its product. Here machine code that llvmlite compiles (`few_bit_code`) reads
the few bits themselves; XLA calls it within its programs.

R rows, I inputs, O outputs, G groups of inputs.
"""

import functools
import importlib.metadata
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np

from jaxlm.runtime.mesh import is_mapped, platform

KINDS = ("int8", "int4")
MOST_ROWS = 8
"""The most rows that the code is made for."""
OLDEST = (0, 50)
"""The version of llvmlite from which on the code is known to compile."""
MAJOR = 0
"""The major version of XLA's interface to other code whose structures are known."""
REMEDY = 'pip install "jaxlm[cpu]"'

Product = Callable[[jax.Array, Any], jax.Array]


@dataclass(frozen=True)
class FewBitMatmulChoice:
    """A FewBitMatmulChoice says how a few rows are multiplied by matrices of int8 and int4."""

    method: Literal["kernel", "dense"]
    description: str
    """The method as people read it, with the reason."""
    remedy: str = ""
    """The command that makes products faster; empty: nothing is missing."""


def choose() -> FewBitMatmulChoice:
    """Returns how a few rows are multiplied by matrices of int8 and int4 on this backend."""
    if platform() != "cpu":
        return FewBitMatmulChoice("dense", "unpacked by XLA for each product")
    if (reason := _unavailable()) is None:
        return FewBitMatmulChoice("kernel", f"read as they are stored for up to {MOST_ROWS} rows, by code of llvmlite")
    remedy = REMEDY if reason.startswith("llvmlite") else ""
    return FewBitMatmulChoice("dense", f"made float32 for each product: {reason}", remedy)


@functools.cache
def _unavailable() -> str | None:
    """Returns why the code can't be compiled or called in this process, or None if it can."""
    try:
        version = importlib.metadata.version("llvmlite")
    except importlib.metadata.PackageNotFoundError:
        return "llvmlite isn't installed"
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST:
        return f"llvmlite {version} is older than {'.'.join(map(str, OLDEST))}"
    found = interface_version()
    if found is None or found[0] != MAJOR:
        return f"jax {jax.__version__} has another interface to such code than the one that is known ({found})"
    return None


def interface_version() -> tuple[int, int] | None:
    """Returns the version (major, minor) of XLA's interface to other code, which jaxlib's C header states; None: there
    is no such header, or it doesn't."""
    header = Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    if not header.exists():
        return None
    text = header.read_text("utf-8")
    major, minor = (re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR"))
    return None if major is None or minor is None else (int(major[1]), int(minor[1]))


_lock = threading.Lock()
_registered: set[str] = set()


def _target(kind: str) -> str:
    """Returns the name by which XLA knows the code of a product; it is compiled when one is first asked for."""
    with _lock:
        if not _registered:
            from jaxlm.nn.kernels import few_bit_code

            found = interface_version()
            assert found is not None
            for name, capsule in few_bit_code.handlers(found, MOST_ROWS).items():
                jax.ffi.register_ffi_target(f"jaxlm_{name}_rows", capsule, platform="cpu", api_version=1)
                _registered.add(name)
    return f"jaxlm_{kind}_rows"


def takes(x: jax.Array, inputs: int) -> bool:
    """Returns whether products of `x`, whose last `inputs` dimensions are inputs, are for the code: a few rows of
    floats, on one device whose programs are not mapped."""
    rows = math.prod(x.shape[: x.ndim - inputs])
    return (
        isinstance(rows, int)  # an exported program may leave the number open
        and 1 <= rows <= MOST_ROWS
        and x.size > 0
        and x.dtype in (jnp.float32, jnp.bfloat16)
        and jax.sharding.get_abstract_mesh().empty
        and not is_mapped()
        and choose().method == "kernel"
    )


def with_gradients_of(dense: Product, product: Product) -> Product:
    """Returns `product` of rows and a weight, whose gradients are those of `dense`, which computes the same."""

    def backward(kept: tuple[jax.Array, Any], dy: jax.Array) -> tuple[jax.Array, Any]:
        return jax.vjp(dense, *kept)[1](dy)

    made = jax.custom_vjp(product)
    made.defvjp(lambda x, w: (product(x, w), (x, w)), backward)
    return made


def int8(x_RI: jax.Array, codes_IO: jax.Array, scale_O: jax.Array) -> jax.Array:
    """Returns the float32 products `[R, O]` of up to `MOST_ROWS` rows with a matrix of int8, times a scale for each
    output."""
    return _call("int8", 0, x_RI, codes_IO, scale_O.astype(jnp.float32))


def int4(x_RI: jax.Array, packed: jax.Array, scale_GO: jax.Array, zero_GO: jax.Array | None, group: int) -> jax.Array:
    """Returns the float32 products `[R, O]` of up to `MOST_ROWS` rows with a matrix of four bits.

    `packed` is uint8 `[⌈I/2⌉, O]` with the first of two inputs in the high half. `group` inputs, an even number unless
    there is one group, share a scale, bfloat16, and a zero point, uint8; without zero points that is 8.
    """
    zero = jnp.zeros((0, 0), jnp.uint8) if zero_GO is None else zero_GO
    return _call("int4", group, x_RI, packed, scale_GO, zero)


def _call(kind: str, group: int, x_RI: jax.Array, codes: jax.Array, *rest: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct((x_RI.shape[0], codes.shape[1]), jnp.float32)
    called = jax.ffi.ffi_call(_target(kind), result, vmap_method="sequential")
    return called(x_RI.astype(jnp.float32), codes, *rest, group=np.int64(group))
