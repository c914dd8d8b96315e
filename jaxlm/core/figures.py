"""Says whether less or more of a figure is better."""

import re

# Parts of words and of labels ("word_", "_macro") don't change it.
LOWER = {"loss", "nll", "perplexity", "bits_per_byte", "aux", "mse"}
HIGHER = {"accuracy", "f1", "precision", "recall", "mcc", "exact", "pearson", "spearman", "margin"}
PARTS = re.compile(r"^(word|hasans|noans|best)_|_(macro|micro|weighted)$")


def is_lower_better(name: str) -> bool | None:
    """Returns whether less of a figure is better; None: nothing is known of it, such as of a threshold."""
    base = PARTS.sub("", name.rpartition("/")[2])
    return True if base in LOWER else False if base in HIGHER else None
