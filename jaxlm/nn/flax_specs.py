"""Says what the weights of a user's Flax module are: their logical axes, by partitioning metadata, and their roles."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxlm.core.spec import Axes, Role
from jaxlm.nn.layout import STORE

AXES: dict[str, str | None] = {
    **{name: name for name in STORE},
    "mlp": "ffn", "expert": "experts", "fsdp": "embed", "tensor": "ffn", "model": "ffn", "head_dim": None, "norm": None,
}  # fmt: skip
"""Names of a module's partitioning metadata, and the logical axes of `Layout` that they become."""


def role_of(path: str, paths: Collection[str], head: str | None) -> Role:
    """Returns the role that the names of Flax's own layers tell. `head`: the matrix that makes the logits."""
    parent, _, last = path.rpartition("/")
    if last == "embedding":
        return "table"
    if path == head:
        return "head"
    if last == "bias":
        return "norm_bias" if f"{parent}/scale".removeprefix("/") in paths else "bias"
    return "norm" if last == "scale" else "matrix"


def named_axes(names: tuple[Any, ...], shape: tuple[int, ...], rules: Mapping[str, str | None], where: str) -> Axes:
    """Returns the logical axes that metadata names, by `rules`. Dimensions beyond the names have none.

    As by Flax's rules, of several dimensions that would be cut over one mesh axis only the first is. ValueError, which
    begins with `where`: there are too many names, or one that no rule maps.
    """
    if len(names) > len(shape):
        raise ValueError(f"{where} has shape {shape} and metadata {names}; name each dimension once")
    out: list[str | None] = []
    taken: set[str] = set()
    for i, name in enumerate(names):
        name = name[0] if isinstance(name, tuple | list) and len(name) == 1 else name
        if name is not None and name not in rules:
            raise ValueError(f"{where} names an axis {name!r}; map it to one of {', '.join(STORE)}, or to None")
        axis = None if name is None else rules[name]
        over = set(STORE.get(axis or "", ()))
        out.append(None if (axis == "layers" and i) or taken & over else axis)
        taken |= over
    return (*out, *(None,) * (len(shape) - len(out)))


def unnamed_axes(shape: tuple[int, ...], role: Role, vocab: int) -> Axes:
    """Returns the logical axes of a weight that has no metadata."""
    if role in ("table", "head") and len(shape) == 2 and shape.count(vocab) == 1:
        return tuple("vocab" if n == vocab else "embed" for n in shape)
    if role == "table" and len(shape) == 2:
        return (None, "embed")
    if len(shape) < 2 or role in ("norm", "norm_bias", "bias"):
        return (None,) * len(shape)
    cut = max(range(len(shape)), key=lambda i: (shape[i] & -shape[i], shape[i]))
    return tuple("embed" if i == cut else None for i in range(len(shape)))
