"""Settings of generation are made here of what a model's own files advise; what they advise in vain is said."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxlm.assembly.model_source import Source
from jaxlm.formats.hf_sidecars import SETTINGS
from jaxlm.inference.sampling import Sampling

# Field of a `Generation` → field of `Sampling`, where one value is the other.
SAME = dict(
    temperature="temperature", top_k="top_k", top_p="top_p", min_p="min_p", repetition_penalty="repetition_penalty",
    no_repeat_ngram="no_repeat_ngram", beams="beams", length_penalty="length_penalty", early_stopping="early_stopping",
    new_tokens="tokens", min_new_tokens="min_tokens", length="length", min_length="min_length", forced_bos="first_id",
    forced_eos="last_id", stop="stop", banned="banned_ids",
)  # fmt: skip
THEIRS = {ours: theirs for theirs, (ours, _) in SETTINGS.items()}
NEVER_TOLD = {"eos", "bos", "pad", "start", "sample"}


@dataclass(frozen=True)
class Advice:
    """An advice holds the settings that a model's files advise, over the defaults."""

    sampling: Sampling
    followed: dict[str, str]
    """What the file says of each field that it decides."""
    left_out: tuple[str, ...]
    """What the file says and nothing here can do, or what something else that it says makes void."""

    def chosen(self, **changes: Any) -> Sampling:
        """Returns the settings with a user's own in place of the advised ones.

        A number of new tokens takes the place of a length of prompt and answer, and the other way round.
        """
        for one, other, none in (("tokens", "length", None), ("min_tokens", "min_length", 0)):
            if one in changes and other not in changes:
                changes[other] = none
            elif changes.get(other) and one not in changes:
                changes[one] = changes["length"] if one == "tokens" else 0
        return dataclasses.replace(self.sampling, **changes)

    def changed(self, how: Sampling) -> Sampling:
        """Returns `chosen` where the user's settings are those in which `how` differs from the advised ones."""
        return self.chosen(**differences(self.sampling, how))

    def line(self, how: Sampling) -> str:
        """Returns one line on what is followed in `how` and what of the file is not; empty where there is nothing."""
        changed = differences(self.sampling, how)
        followed = ", ".join(text for name, text in self.followed.items() if name not in changed)
        parts = [f"followed: {followed}"] if followed else []
        parts += [f"left out: {', '.join(self.left_out)}"] if self.left_out else []
        return f"generation_config.json: {'; '.join(parts)}" if parts else ""

    def tell(self, how: Sampling) -> None:
        """Prints that line to stderr."""
        if line := self.line(how):
            print(line, file=sys.stderr)


def differences(a: Sampling, b: Sampling) -> dict[str, Any]:
    """Returns the fields of `b` that have another value in `a`."""
    both = ((f.name, getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Sampling))
    return {name: after for name, before, after in both if before != after}


def advice(source: Source) -> Advice:
    """Returns what a model's files advise, as transformers would follow it."""
    g, positions = source.advice, source.config.positions
    values: dict[str, Any] = {}
    texts: dict[str, str] = {}
    void: list[str] = []
    for ours, field in SAME.items():
        value = getattr(g, ours)
        if value is None or value == ():
            continue
        if reason := _void(ours, vars(g)):
            neutral = 1.0 if field == "temperature" else getattr(Sampling(), field)
            void += [f"{THEIRS[ours]} {_shown(value)} ({reason})"] if value != neutral else []
            continue
        values[field], texts[field] = value, f"{THEIRS[ours]} {_shown(value)}"
    if "length" in values:
        if positions is not None and values["length"] > positions:
            values["length"] = positions
            texts["length"] += f" (the model has {positions} positions)"
        values["tokens"] = values["length"]
    if g.sample:
        values.setdefault("temperature", 1.0)
        texts["temperature"] = f"do_sample, temperature {values['temperature']:g}"
    if "top_k" in values:
        values["top_k"] = min(values["top_k"], source.config.vocab)
    neutral = vars(Sampling())
    followed = {field: text for field, text in texts.items() if values[field] != neutral[field]}
    return Advice(dataclasses.replace(Sampling(), **values), followed, (*void, *g.others))


def _void(name: str, g: Mapping[str, Any]) -> str:
    """Returns why transformers doesn't follow a setting beside the others, or we can't; empty where it is followed."""
    wins = {"length": "new_tokens", "min_length": "min_new_tokens"}.get(name)
    if wins is not None and g[wins] is not None:
        return f"{THEIRS[wins]} wins"
    if name == "temperature" and not g["sample"]:
        return "do_sample is false"
    if name == "beams" and g["sample"]:
        return "beam search draws nothing here, and do_sample is true"
    return ""


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and len(value) > 8:
        return f"{len(value)} entries"
    return f"{value:g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)
