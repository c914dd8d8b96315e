"""Trees are nested dicts whose leaves have paths such as `blocks/q`; they can be selected, partitioned and merged."""

import re
from collections.abc import Callable, Iterable
from typing import Any

Tree = Any


def flatten(tree: Tree, is_leaf: Callable[[Any], bool] = lambda x: False, prefix: str = "") -> dict[str, Any]:
    """Returns {"blocks/q": leaf} of nested dicts. None holes are left out."""
    if isinstance(tree, dict) and not is_leaf(tree):
        out: dict[str, Any] = {}
        for key in sorted(tree):
            out |= flatten(tree[key], is_leaf, f"{prefix}{key}/")
        return out
    return {} if tree is None else {prefix[:-1]: tree}


def at(tree: Tree, path: str) -> Any:
    """Returns the leaf or subtree at a path such as `blocks/q`, or None if there is nothing."""
    for name in path.split("/"):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def put(tree: dict, path: str, value: Any) -> dict:
    """Returns a copy of nested dicts in which `value` stands at `path`."""
    name, _, rest = path.partition("/")
    return tree | {name: put(tree.get(name, {}), rest, value) if rest else value}


def map_named(f: Callable[[str, Any], Any], tree: Tree, prefix: str = "") -> Tree:
    """Maps a function of (path, leaf) over nested dicts; None stays None."""
    if isinstance(tree, dict):
        return {k: map_named(f, v, f"{prefix}{k}/") for k, v in tree.items()}
    return None if tree is None else f(prefix[:-1], tree)


def partition(tree: Tree, keep: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Splits a tree into two of the same shape, the leaves with `keep(path)` and the others; gaps are None."""
    return (
        map_named(lambda path, x: x if keep(path) else None, tree),
        map_named(lambda path, x: None if keep(path) else x, tree),
    )


def merge(a: Tree, b: Tree) -> Tree:
    """Returns the leaves of `a`, with None holes filled from `b`: the inverse of `partition`."""
    if isinstance(a, dict):
        return {k: merge(a[k], b[k]) for k in a}
    return b if a is None else a


def matcher(patterns: Iterable[str], paths: Iterable[str], field: str) -> Callable[[str], bool]:
    """Returns a function that says whether a path contains a match of any pattern.

    Raises ValueError, which names `field`, for a pattern that is no regular expression or matches none of `paths`.
    """
    paths, compiled = list(paths), []
    for p in patterns:
        try:
            compiled.append(re.compile(p))
        except re.error as e:
            raise ValueError(f"{field}: {p!r} is not a regular expression: {e}") from None
        if not any(compiled[-1].search(path) for path in paths):
            raise ValueError(f"{field}: pattern {p!r} matches no parameter; there are: {', '.join(paths)}")
    return lambda path: any(c.search(path) for c in compiled)


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """Returns the first place where two JSON values differ, with both values; None: nowhere."""
    if isinstance(a, dict) and isinstance(b, dict):
        parts = ((a.get(key), b.get(key), f"{where}.{key}") for key in sorted(a.keys() | b.keys()))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        parts = ((x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))
    else:
        return None if a == b else f"{where.lstrip('.')} is {a!r} there and {b!r} here"
    return next((found for x, y, place in parts if (found := difference(x, y, place)) is not None), None)
