"""A server's limits say how much one request, and all at once, may ask for."""

from dataclasses import dataclass

from jaxlm.core.ranges import Count, Positive


@dataclass(frozen=True)
class Limits:
    """Limits are what a server allows. A request beyond one is refused with an error that names the limit."""

    body_bytes: Count = 4 << 20
    """Bytes of a request's body."""
    json_depth: Count = 64
    """Levels of lists and objects in a request's JSON."""
    prompt_tokens: Count | None = None
    """Tokens of a prompt; None: as many as the model can read."""
    new_tokens: Count | None = None
    """New tokens of an answer; None: as many as fit behind the prompt."""
    answers: Count = 16
    """Answers to one prompt (n)."""
    inputs: Count = 2048
    """Prompts, texts or messages in one request."""
    requests: Count = 256
    """Requests that are worked on or wait at the same time; more are told to come again later (429)."""
    connections: Count = 1024
    """Open connections; more are refused (503)."""
    seconds: Positive = 600.0
    """The longest time that a request may take from its arrival to its last byte."""
    drain_seconds: Positive = 30.0
    """Seconds that running requests may still take after SIGTERM."""
