"""Trees by path: names such as `blocks/q`, selection by regular expression, partition and merge with None holes."""

import re
from collections.abc import Callable, Iterable
from typing import Any

Tree = Any


def flatten(tree: Tree, is_leaf: Callable[[Any], bool] = lambda x: False, prefix: str = "") -> dict[str, Any]:
    """Nested dicts to {"blocks/q": leaf}. None holes are kept out."""
    if isinstance(tree, dict) and not is_leaf(tree):
        out: dict[str, Any] = {}
        for key in sorted(tree):
            out |= flatten(tree[key], is_leaf, f"{prefix}{key}/")
        return out
    return {} if tree is None else {prefix[:-1]: tree}


def at(tree: Tree, path: str) -> Any:
    """What stands at `blocks/q` of nested dicts; None: nothing."""
    for name in path.split("/"):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def put(tree: dict, path: str, value: Any) -> dict:
    """A copy of nested dicts in which `value` stands at `path`."""
    name, _, rest = path.partition("/")
    return tree | {name: put(tree.get(name, {}), rest, value) if rest else value}


def map_named(f: Callable[[str, Any], Any], tree: Tree, prefix: str = "") -> Tree:
    """Map a function of (path, leaf) over nested dicts; None stays None."""
    if isinstance(tree, dict):
        return {k: map_named(f, v, f"{prefix}{k}/") for k, v in tree.items()}
    return None if tree is None else f(prefix[:-1], tree)


def partition(tree: Tree, keep: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Two trees of the same shape; each has None where the other has the leaf. `keep(path)` goes to the first."""
    return (
        map_named(lambda path, x: x if keep(path) else None, tree),
        map_named(lambda path, x: None if keep(path) else x, tree),
    )


def merge(a: Tree, b: Tree) -> Tree:
    """The inverse of `partition`: leaves of `a`, holes filled from `b`."""
    if isinstance(a, dict):
        return {k: merge(a[k], b[k]) for k in a}
    return b if a is None else a


def matcher(patterns: Iterable[str], paths: Iterable[str], field: str) -> Callable[[str], bool]:
    """Whether any pattern is found in a path. A pattern that fits no path at all is an error naming `field`."""
    paths, compiled = list(paths), []
    for p in patterns:
        try:
            compiled.append(re.compile(p))
        except re.error as e:
            raise ValueError(f"{field}: {p!r} is not a regular expression: {e}") from None
        if not any(compiled[-1].search(path) for path in paths):
            raise ValueError(f"{field}: pattern {p!r} matches no parameter; there are: {', '.join(paths)}")
    return lambda path: any(c.search(path) for c in compiled)
