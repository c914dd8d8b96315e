"""Decides which activations are kept for the backward pass, offloaded to the host, or computed again."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxlm.core import config
from jaxlm.nn.int8 import PRODUCT
from jaxlm.nn.layout import Layout, but_gathered

# The activations that each of these kinds of remat keeps for the backward pass; the rest is computed again. They are
# named by the weight whose product they are, or `attended` (attention's result) and `input` (a block's).
QKV = ("q", "k", "v", "cross_q", "cross_k", "cross_v", "q_b", "kv_a", "k_rotated")


KEPT: dict[str, tuple[str, ...]] = {"attention": (*QKV, "attended", "o", "cross_o"), "qkv": QKV, "full": ()}


# Operations that read and write memory once: computed again they are fused with what reads them. In a loop over layers
# all that the backward pass reads are stacks of their own, so a norm would keep its input three times in float32.
# Where layers are unrolled the compiler decides.
CHEAP = frozenset((
    "abs", "add", "add_any", "and", "bitcast_convert_type", "broadcast_in_dim", "clamp", "concatenate",
    "convert_element_type", "copy", "cos", "custom_jvp_call", "div", "eq", "erf", "erfc", "exp", "exp2", "expand_dims",
    "floor", "ge", "gt", "integer_pow", "iota", "is_finite", "le", "le_to", "log", "log1p", "logistic", "lt", "lt_to",
    "max", "min", "mul", "ne", "neg", "not", "one_minus_square", "or", "pad", "pow", "reduce_and", "reduce_max",
    "reduce_min", "reduce_precision", "reduce_sum", "reshape", "rsqrt", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "slice", "split", "sqrt", "square", "squeeze",
    "stop_gradient", "sub", "tanh", "transpose", "xor",
))  # fmt: skip


def but_cheap(primitive: Any, *inputs: Any, **params: Any) -> bool:
    """Returns whether a loop over layers keeps a primitive's result: of products, attention, sorts and dropout (its
    factors have that name), but of nothing that is as quickly made again."""
    cheap = primitive.name in CHEAP or _of_codes(primitive, *inputs)
    return not cheap and but_gathered(primitive, *inputs, **params)


def _of_codes(primitive: Any, *inputs: Any) -> bool:
    """Returns whether a primitive is a product of int8 numbers, of which only the scaled result is kept."""
    return primitive.name == "dot_general" and inputs[0].dtype == "int8"


def products(primitive: Any, *inputs: Any, **params: Any) -> bool:
    """Returns whether a primitive is a product with a matrix, in whatever numbers."""
    plain: bool = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **params)
    return params.get("name") == PRODUCT or (plain and not _of_codes(primitive, *inputs))


def remat_policy(e: config.Execution, in_loop: bool = False) -> Any:
    """Returns the policy of which results of the forward pass a block keeps, and which of them in the host's memory.
    `in_loop`: layers are a loop of the program.

    Raises ValueError where `execution.offload` names activations that `execution.remat` doesn't tell apart.
    """
    policies, host = jax.checkpoint_policies, [name for name in e.offload if name != "optimizer"]
    if e.remat not in KEPT:
        if host:
            raise ValueError(
                f"execution.offload: {host[0]} needs execution.remat={', '.join(KEPT)}; with {e.remat} "
                "other activations than these are kept"
            )
        kept_by_default = but_cheap if in_loop else but_gathered
        return kept_by_default if e.remat == "none" else products
    saved = [name for name in KEPT[e.remat] if name not in host]
    if host:
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=saved, names_which_can_be_offloaded=host, offload_src="device",
            offload_dst="pinned_host",
        )  # fmt: skip
    return policies.save_only_these_names(*saved) if saved else policies.nothing_saveable


def named(x: jax.Array, name: str, shard: Layout) -> jax.Array:
    """Names an activation for `remat_policy`; without a policy that asks for names programs stay as they are."""
    return checkpoint_name(x, name) if shard.execution.remat in KEPT else x
