"""What composes: kinds of parallelism alone and together, and the families each is proven for.

`test_meshes.py` holds every row to one device. The table in docs/how-to/parallelism.md is what this file prints when
run, and a test fails where the two differ. A new kind is a row in `ALONE` and some in `TOGETHER`, whatever axes or
fields it is switched on by.
"""

from functools import reduce
from itertools import combinations
from operator import or_
from random import Random
from typing import Any, NamedTuple

FAMILIES = {"llama": "decoder", "mixtral": "mixture of experts", "bert": "encoder", "t5": "encoder-decoder"}
NO_DROPOUT = ("llama", "mixtral", "t5")
DECODER = ("llama",)
MOE = ("mixtral",)
CUT = ("stream=context+tensor",)  # sequence-parallel norms


class Row(NamedTuple):
    """Of eight devices."""

    mesh: dict[str, Any]
    """Fields of `config.Mesh`."""
    families: tuple[str, ...] = tuple(FAMILIES)
    execution: dict[str, Any] = {}  # noqa: RUF012
    """Fields of `config.Execution`."""
    micro: int = 1
    """Micro-batches. (Not for bert, whose dropout differs between them.)"""


ALONE = {
    "data": Row(dict(data=8)),
    "ZeRO 1": Row(dict(fsdp=8, zero=1)),
    "ZeRO 2": Row(dict(fsdp=8, zero=2)),
    "ZeRO 3 (FSDP)": Row(dict(fsdp=8)),
    "hybrid sharded": Row(dict(replica=2, fsdp=4)),
    "tensor": Row(dict(tensor=2)),
    "tensor, cut norms": Row(dict(tensor=2, compute=CUT)),
    "context, keys gathered": Row(dict(context=4)),
    "context, keys in a ring": Row(dict(context=4, context_by="ring")),
    "context, heads exchanged": Row(dict(context=2, context_by="heads")),
    "expert, tokens travel": Row(dict(expert=4), MOE),
    "expert, tokens replicated": Row(dict(expert=4, expert_dispatch="replicate"), MOE),
    "pipeline": Row(dict(stage=2), NO_DROPOUT),
    "pipeline, two rounds": Row(dict(stage=2, rounds=2, data=2, tensor=2), NO_DROPOUT),
}
TOGETHER = {
    "replica × data × ZeRO 3": Row(dict(replica=2, data=2, fsdp=2)),
    "replica × ZeRO 2 × context": Row(dict(replica=2, fsdp=2, context=2, zero=2)),
    "data × ZeRO 3 × context": Row(dict(data=2, fsdp=2, context=2)),
    "ZeRO 1 × tensor × context": Row(dict(fsdp=2, tensor=2, context=2, zero=1)),
    "ZeRO 3 × tensor × context": Row(dict(fsdp=2, tensor=2, context=2)),
    "ZeRO 3 × tensor × optimizer offloaded": Row(dict(fsdp=4, tensor=2), execution=dict(offload=("optimizer",))),
    "replica × ZeRO 3 × context × activations offloaded": Row(
        dict(replica=2, fsdp=2, context=2), execution=dict(remat="attention", offload=("input", "q"))
    ),
    "data × tensor, cut norms × context": Row(dict(data=2, tensor=2, context=2, compute=CUT)),
    "ZeRO 1 × tensor, cut norms × context": Row(dict(fsdp=2, tensor=2, context=2, zero=1, compute=CUT)),
    "ZeRO 3 × tensor, cut norms × context": Row(dict(fsdp=2, tensor=2, context=2, compute=CUT)),
    "replica × ZeRO 2 × tensor, cut norms": Row(dict(replica=2, fsdp=2, tensor=2, zero=2, compute=CUT)),
    "ZeRO 1 × tensor × accumulation": Row(dict(fsdp=4, tensor=2, zero=1), NO_DROPOUT, micro=2),
    "ZeRO 2 × tensor × accumulation": Row(dict(fsdp=4, tensor=2, zero=2), NO_DROPOUT, micro=2),
    "ZeRO 3 × tensor, cut norms × accumulation": Row(dict(fsdp=4, tensor=2, compute=CUT), NO_DROPOUT, micro=2),
    "ZeRO 3 × tensor × ring": Row(dict(fsdp=2, tensor=2, context=2, context_by="ring")),
    "ZeRO 1 × tensor, cut norms × ring": Row(dict(fsdp=2, tensor=2, context=2, zero=1, context_by="ring", compute=CUT)),
    "ZeRO 1 × tensor × ring × accumulation": Row(
        dict(fsdp=2, tensor=2, context=2, zero=1, context_by="ring"), DECODER, micro=2
    ),
    "ZeRO 2 × tensor × context × optimizer offloaded": Row(
        dict(fsdp=2, tensor=2, context=2, zero=2), DECODER, execution=dict(offload=("optimizer",))
    ),
    "ZeRO 3 × tensor, cut norms × ring × optimizer offloaded": Row(
        dict(fsdp=2, tensor=2, context=2, context_by="ring", compute=CUT), DECODER, dict(offload=("optimizer",))
    ),
    "ZeRO 2 × heads exchanged": Row(dict(fsdp=4, context=2, zero=2, context_by="heads")),
    "replica × pipeline × ZeRO 3": Row(dict(replica=2, stage=2, fsdp=2), NO_DROPOUT),
    "pipeline × data × ring": Row(dict(stage=2, data=2, context=2, context_by="ring"), NO_DROPOUT),
    "pipeline × ZeRO 1 × tensor, cut norms": Row(dict(stage=2, fsdp=2, tensor=2, zero=1, compute=CUT), NO_DROPOUT),
    "pipeline, two rounds × ZeRO 3 × tensor × accumulation": Row(
        dict(stage=2, rounds=2, fsdp=2, tensor=2), NO_DROPOUT, micro=2
    ),
    "pipeline × expert × ring": Row(dict(stage=2, expert=2, context=2, context_by="ring"), MOE),
    "pipeline × data × expert": Row(dict(stage=2, data=2, expert=2), MOE),
    "ZeRO 2 × expert × heads exchanged × accumulation": Row(
        dict(fsdp=2, expert=2, context=2, zero=2, context_by="heads"), MOE, micro=2
    ),
    "expert × tensor, cut norms × ring × accumulation": Row(
        dict(expert=2, tensor=2, context=2, context_by="ring", compute=CUT), MOE, micro=2
    ),
    "data × expert × context": Row(dict(data=2, expert=2, context=2), MOE),
    "ZeRO 3 × expert × tensor": Row(dict(fsdp=2, expert=2, tensor=2), MOE),
    "ZeRO 2 × expert × tensor, cut norms": Row(dict(fsdp=2, expert=2, tensor=2, zero=2, compute=CUT), MOE),
    "ZeRO 1 × expert × context": Row(dict(fsdp=2, expert=2, context=2, zero=1), MOE),
    "ZeRO 3 × expert × tensor × accumulation": Row(dict(fsdp=2, expert=2, tensor=2), MOE, micro=2),
    "ZeRO 3 × expert, tokens replicated × context": Row(
        dict(fsdp=2, expert=2, context=2, expert_dispatch="replicate"), MOE
    ),
}
ROWS = ALONE | TOGETHER
Case = tuple[str, str, str]
"""Family, name of a row, type of the mesh's axes."""
CASES: list[Case] = [(family, name, kind) for name, row in ROWS.items() for family in row.families
                     for kind in ("auto", "explicit")]  # fmt: skip
COST = {"llama": 1.0, "bert": 1.8, "mixtral": 1.7, "t5": 1.6}
"""Seconds that a family's program takes to compile, relative to Llama's."""
MORE = {"context ring": 0.7, "stages": 0.7, "rounds": 1.5, "accumulation": 0.1}
"""What a kind adds to that, in parts of it."""


def kinds(row: Row) -> list[str]:
    """Returns the kinds of parallelism and of execution that a row switches on, by name."""
    m, found = row.mesh, [axis for axis in ("data", "replica") if row.mesh.get(axis, 1) > 1]
    if m.get("fsdp", 1) > 1:
        found.append(f"ZeRO {m.get('zero', 3)}")
    if m.get("tensor", 1) > 1:
        found.append("tensor, cut" if m.get("compute") else "tensor")
    if m.get("context", 1) > 1:
        found.append("context " + m.get("context_by", "gather"))
    if m.get("expert", 1) > 1:
        found.append("expert " + m.get("expert_dispatch", "travel"))
    if m.get("stage", 1) > 1:
        found.append("rounds" if m.get("rounds", 1) > 1 else "stages")
    found += [f"offload {what}" for what in row.execution.get("offload", ())]
    return [*found, *(["accumulation"] if row.micro > 1 else [])]


def covered(case: Case) -> set[tuple[str, ...]]:
    """Returns what a case proves: its kinds, every two of them together, its family on its type of axes, and its family
    in stages, since families hand their layers to a pipeline each in its own way.
    """
    family, name, axis_type = case
    found = kinds(ROWS[name])
    staged = {(family, "in stages")} if {"stages", "rounds"} & set(found) else set()
    return {(kind,) for kind in found} | set(combinations(found, 2)) | {(family, axis_type)} | staged


def cost(case: Case) -> float:
    """Returns about how long a case's program takes to compile, in programs of Llama on a simple mesh."""
    return COST[case[0]] * (1 + sum(MORE.get(kind, 0) for kind in kinds(ROWS[case[1]])))


def covering() -> list[Case]:
    """Returns few cases that together prove whatever any case of `CASES` proves, by `covered`: a covering array.

    An error in how two kinds of parallelism work together shows in any row that has both, so each pair runs once by
    default, and all rows in the slow tests. Of many greedy choices, each by costs that are off by a random part, the
    cheapest is returned.
    """
    proved = [covered(case) for case in CASES]
    bit = {what: 1 << i for i, what in enumerate(sorted(set().union(*proved)))}
    masks = [sum(bit[what] for what in found) for found in proved]
    costs, random = [cost(case) for case in CASES], Random(0)
    choices = [_greedy(masks, [c * random.uniform(0.7, 1.3) for c in costs]) for _ in range(200)]
    return [CASES[i] for i in min(choices, key=lambda chosen: sum(costs[i] for i in chosen))]


def _greedy(masks: list[int], costs: list[float]) -> list[int]:
    """Returns which masks' union is that of all: always the one that adds most bits for its cost is taken, and in the
    end the dearest of those are dropped whose every bit is in others too.
    """
    left, chosen = reduce(or_, masks), []
    while left:
        chosen.append(max(range(len(masks)), key=lambda i: (masks[i] & left).bit_count() / costs[i]))
        left &= ~masks[chosen[-1]]
    for i in sorted(chosen, key=lambda i: -costs[i]):
        others = [j for j in chosen if j != i]
        if not masks[i] & ~reduce(or_, (masks[j] for j in others)):
            chosen = others
    return chosen


def table() -> str:
    """Returns the table of docs/how-to/parallelism.md in Markdown: a dot stands for a test."""
    names = {"llama": "Llama", "mixtral": "Mixtral", "bert": "BERT", "t5": "T5"}
    lines = ["| | on eight devices | " + " | ".join(f"{what} ({names[f]})" for f, what in FAMILIES.items()) + " |"]
    lines.append("|---" * (2 + len(FAMILIES)) + "|")
    for name, row in ROWS.items():
        shown = [
            f"`--mesh.{k.replace('_', '-')} {' '.join(v) if isinstance(v, tuple) else v}`" for k, v in row.mesh.items()
        ]
        shown += [f"`--execution.{k} {' '.join(v) if isinstance(v, tuple) else v}`" for k, v in row.execution.items()]
        shown += [f"`--train.micro-batches {row.micro}`"] if row.micro > 1 else []
        marks = ["●" if f in row.families else "" for f in FAMILIES]
        lines.append("| " + " | ".join([name, " ".join(shown), *marks]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
