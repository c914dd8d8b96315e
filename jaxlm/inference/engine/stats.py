"""Counts what an engine does."""

from dataclasses import dataclass


@dataclass
class Stats:
    """The stats are an engine's counters. Those of pages and rows say how it stands now, the others what happened since
    its start."""

    running: int = 0
    """Answers that grow now."""
    waiting: int = 0
    """Answers that wait, and those whose prompt is being read."""
    cache_used: int = 0
    """Slots of the cache that hold tokens of running answers."""
    cache_tokens: int = 0
    """Slots of the cache that running answers may fill."""
    slot_bytes: int = 0
    """Bytes of what all layers store of a token."""
    pages: int = 0
    """Pages of the prefix cache: free + cached + used."""
    pages_free: int = 0
    pages_cached: int = 0
    """Pages that nobody uses now, which are kept until another needs them."""
    pages_used: int = 0
    """Pages that a request that isn't finished holds."""
    prefix_queries: int = 0
    """Tokens of prompts that were looked up in the prefix cache."""
    prefix_hits: int = 0
    """Those of them that were found."""
    prompt_tokens: int = 0
    """Tokens of prompts that the model read, without those found."""
    generated_tokens: int = 0
    guessed: int = 0
    """Tokens that answers guessed ahead."""
    guessed_right: int = 0
    preemptions: int = 0
    """Answers that had to wait in the middle, because longer ones needed the cache."""
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    """Answers that ended with an error."""
    steps: int = 0
    """Steps of the model that running answers shared."""
