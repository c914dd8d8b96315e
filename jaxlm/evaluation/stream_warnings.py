"""Says where a finished stream demonstrates little, in plain sentences with its numbers. The rules:

1. A stage could be done before it was learned: its score right before was at least half (`ABLE`) of that right after,
   both means over seeds and without regard to chance. Scores of which less is better, such as bits per byte, count by
   their reciprocal: before they were at most twice what they were after.
2. Without any method so little was forgotten that methods can't be told apart: less than a twentieth (`LITTLE`) of the
   mean score right after learning, or, with several seeds, an amount whose 95 % interval reaches to 0.
3. An adapter was trained instead of all weights. Low-rank adapters forget little (Biderman et al. 2024, LoRA Learns
   Less and Forgets Less).
"""

import math
from collections.abc import Mapping
from typing import Any

ABLE = 0.5
LITTLE = 0.05


def warnings(results: Mapping[str, Any]) -> list[str]:
    """Returns a line for each rule and stage that a stream's results break; see `assembly/stream.py: collect`."""
    return [*_able_before(results), *_little_forgotten(results), *_adapter(results)]


def _able_before(results: Mapping[str, Any]) -> list[str]:
    out = []
    for j, stage in enumerate(results["stages"]):
        cells = [(matrix[j][j], matrix[j + 1][j]) for matrix in results["matrices"]]
        if any(x is None or math.isnan(x) for pair in cells for x in pair):
            continue
        before, after = (sum(column) / len(cells) for column in zip(*cells, strict=True))
        less, more = (after, before) if results["lower_is_better"][j] else (before, after)
        if less > 0 and less >= ABLE * more:
            name, share = results["metrics"][j], less / more
            compared = f"{name} {before:.4g} before and {after:.4g} after"
            how = "the reciprocal " if results["lower_is_better"][j] else ""
            out.append(
                f"stage {stage} could be done before it was learned: {compared}, {how}{share:.0%} of what was reached; "
                "what it says of forgetting is little, so take one that the model can't do yet"
            )
    return out


def _little_forgotten(results: Mapping[str, Any]) -> list[str]:
    mean, low, _ = (math.nan if x is None else x for x in results["figures"]["forgetting"])
    learned = abs(results["figures"]["learned"][0] or 0.0)
    if results["methods"] or math.isnan(mean):
        return []
    if mean < LITTLE * learned:
        why = f"less than {LITTLE:.0%} of the {learned:.4g} that was learned"
    elif low <= 0:
        why = f"with a 95 % interval from {low:.4g} that reaches to 0"
    else:
        return []
    return [
        f"without any method the stream forgot {mean:.4g}, {why}: methods can't be told apart on it; take stages that "
        "are less alike, more steps, a higher learning rate, or more seeds"
    ]


def _adapter(results: Mapping[str, Any]) -> list[str]:
    if results["adapter"] == "none":
        return []
    mean = results["figures"]["forgetting"][0]
    share = [cost["trained"] / cost["parameters"] for cost in results["costs"].values() if cost.get("parameters")]
    size = f", {max(share):.2%} of the weights" if share else ""
    forgot = "" if mean is None or math.isnan(mean) else f"; this stream forgot {mean:.4g}"
    return [
        f"the adapter {results['adapter']} was trained{size}: low-rank adapters forget little by themselves{forgot}, "
        "so what a method adds shows where all weights are trained"
    ]
