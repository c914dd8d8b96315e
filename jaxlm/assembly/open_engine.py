"""A model that is opened answers many prompts at once, by an engine."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxlm.assembly.open_model import Pretrained, with_row_adapters
from jaxlm.inference.engine import Engine, Request, Settings
from jaxlm.inference.generate import Completion
from jaxlm.inference.sampling import Sampling, num_places
from jaxlm.inference.stream import Answer

MOST_ROWS = 32  # answers that grow at the same time where many prompts are given


def open_engine(p: Pretrained, settings: Settings | None = None, adapters: Mapping[str, str] | None = None) -> Engine:
    """Returns an engine over an opened model, not started yet. `adapters` are directories of PEFT's by the names that
    requests call them by."""
    masks: dict[str, np.ndarray] = {}
    if adapters:
        if twice := [name for name, folder in adapters.items() if list(adapters.values()).count(folder) > 1]:
            raise ValueError(f"adapter: {', '.join(twice)} are of one directory; give each directory once")
        p = with_row_adapters(p, list(adapters.values()))
        masks = dict(zip(adapters, np.asarray(p.params["adapter"]["rows"]), strict=True))
    used = p.tokens.vocab_size if p.objective is None else p.objective.vocab_size
    both_ways = p.objective is not None and p.objective.prompts_read_both_ways
    return Engine(
        p.model, p.tokens, p.params, settings, eos=p.eos, used=used, both_ways=both_ways, adapters=masks, mesh=p.mesh
    )


def fits(p: Pretrained, prompts: Sequence[Sequence[int]], s: Sampling) -> bool:
    """Says whether an engine answers so many prompts better than one batch of all of them: where there are more than
    `MOST_ROWS`, and nothing is asked for that an engine can't do."""
    virtual = p.model.adapter is not None and p.model.adapter.num_virtual_tokens
    explicit = p.mesh is not None and p.mesh.are_all_axes_explicit
    return len(prompts) * s.samples > MOST_ROWS and s.beams == 1 and not (virtual or explicit or s.logprobs)


def answers(
    p: Pretrained, prompts: Sequence[Sequence[int]], s: Sampling, sources: Sequence[Sequence[int]] | None = None
) -> list[list[Answer]]:
    """Returns `s.samples` answers to each prompt. As soon as one ends, the next prompt takes its place."""
    length = num_places(s, prompts)
    source = 1 if sources is None else max(map(len, sources))
    rows = MOST_ROWS
    settings = Settings(
        length=length, rows=(rows,), cache_tokens=rows * (length + Settings.page_tokens), source=source,
        queue=len(prompts) * s.samples,
    )  # fmt: skip
    engine = open_engine(p, settings)
    engine.start()
    try:
        requests = [
            Request(tuple(ids), s, None if sources is None else tuple(sources[i]), row=i * s.samples)
            for i, ids in enumerate(prompts)
        ]
        out = []
        for answering in [engine.submit(r) for r in requests]:
            texts, tokens, reasons = ([""] * s.samples, [[] for _ in range(s.samples)], [""] * s.samples)  # type: ignore[var-annotated]
            for piece in answering:
                texts[piece.sample] += piece.text
                tokens[piece.sample] += piece.tokens
                reasons[piece.sample] = piece.reason or ""
                if piece.error is not None:
                    raise ValueError(f"generate: {piece.error}")
            each = zip(texts, tokens, reasons, strict=True)
            out.append([Answer(text, Completion(ids, reason)) for text, ids, reason in each])
        return out
    finally:
        engine.close()
