"""A state is stored as nested dicts by key name; these functions convert it, and compare it with what is stored."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

REST = "rest"  # the item that holds the parts of a state which are one array each
RESERVED = ("meta", "metrics", REST)


class MismatchError(ValueError):
    """The checkpoint is fine but isn't what was asked for, so an older one would not help."""


def nested(tree: Any, *, whole: bool = False) -> dict:
    """Returns any pytree as nested dicts by key name, without None, empty containers and classes of ours.

    The top level is the items of a step, with lone arrays under `rest`; `whole` is for the inside of one item.
    """
    result: dict = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = _keys(path, whole)
        if not whole and keys[0] in RESERVED and len(path) > 1:
            raise ValueError(f"a part of the state may not be called {keys[0]!r}: rename it")
        node = result
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = leaf
    return result


def structured_like(tree: Any, stored: dict, *, whole: bool = False) -> Any:
    """Returns the leaves of `stored` in the structure of `tree`: the inverse of `nested`."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = []
    for path, _ in paths:
        node = stored
        for key in _keys(path, whole):
            node = node[key]
        leaves.append(node)
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _keys(path: tuple, whole: bool) -> list[str]:
    keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return keys if whole or len(keys) > 1 else [REST, *keys]


def described(item: Path) -> dict[str, Any]:
    """Returns what says shape and dtype of each array of a stored item, by path."""
    return _flat(ocp.PyTreeCheckpointHandler().metadata(item).tree)


def _flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def check_same(path: Path, existing: dict[str, Any], wanted: dict, *, cast: bool, partial: bool) -> None:
    """Raises where Orbax would leave out, pad, cut or cast something in silence. `existing`: what is `described`."""
    due = _flat(wanted)
    missing = sorted(due.keys() - existing.keys())
    extra = [] if partial else sorted(existing.keys() - due.keys())
    if missing or extra:
        parts = [f"lacks {_few(missing)}"] * bool(missing) + [f"has {_few(extra)} besides"] * bool(extra)
        raise MismatchError(f"{path} {' and '.join(parts)}: the model's config differs from the checkpoint's")
    for name, leaf in due.items():
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue  # stored as its words; Orbax compares the implementation
        if existing[name].shape != leaf.shape:
            raise MismatchError(f"{path}: {name} has shape {existing[name].shape} but the run needs {leaf.shape}")
        if not cast and existing[name].dtype != leaf.dtype:
            raise MismatchError(f"{path}: {name} has dtype {existing[name].dtype} but the run needs {leaf.dtype}")


def with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Puts a leaf without a sharding on the first device; Orbax would ask for the mesh that it was saved on."""
    if leaf.sharding is not None:
        return leaf
    if jax.process_count() > 1:
        raise MismatchError("abstract leaves need a sharding when several processes restore")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
