"""A model that is named by its place generates, chats and embeds."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.assembly import open_engine
from jaxlm.assembly.generation_advice import advice
from jaxlm.assembly.model_source import Source
from jaxlm.assembly.open_model import Place, Pretrained, open_model, source_of, with_row_adapters
from jaxlm.assembly.run_objective import bind_run
from jaxlm.data.text_input import read_text
from jaxlm.data.tokenizer import SpelledSpecial, decode_after
from jaxlm.inference import stream
from jaxlm.inference.chat import Chat, converse
from jaxlm.inference.embed import Recipe, embed_texts, read_recipe
from jaxlm.inference.sampling import Sampling
from jaxlm.inference.speculative import Speculative
from jaxlm.runtime import mesh


def embed(model: Place, texts: Sequence[str], pooling: str | None = None, step: int | None = None) -> np.ndarray:
    """Returns a vector of each text, `[N, D]`, pooled as the model's files say (mean and length one by default)."""
    if not texts:
        raise ValueError("texts: there are none; give one or more")
    p = open_model(model, step)
    recipe = read_recipe(p.source.path) or Recipe()
    if pooling:
        recipe = dataclasses.replace(recipe, pooling=pooling)
    with mesh.on_mesh(p.mesh):
        return embed_texts(p.model, p.params, p.tokens, texts, recipe)


def settings(source: Source, **changes: Any) -> Sampling:
    """Returns the sampling that the model's own files advise, with `changes`; tells on stderr what of them is followed
    and what is not."""
    own = advice(source)
    how = own.chosen(**changes)
    own.tell(how)
    return how


def goes_on(source: Source) -> bool:
    """Says whether a model's text goes on from its prompt, rather than answers it as a translation does."""
    if source.run is None:
        return source.family.kind != "encoder_decoder"
    return bind_run(source.run, source.tokens).goes_on


def generate(
    model: Place,
    prompts: Sequence[str],
    sampling: Sampling,
    step: int | None = None,
    *,
    draft: str | None = None,
    proposals: int = 4,
    adapters: Sequence[str] = (),
    special: bool = False,
) -> list[list[stream.Answer]]:
    """Returns the new texts of each prompt.

    With `special`, special tokens that a prompt spells, such as `<|im_start|>`, are read as such, else as characters.

    `draft` is a smaller model of the same tokenizer that proposes tokens, or `lookup`, which proposes what followed the
    last two tokens before. `adapters` are those of each prompt, in one batch. More than 32 answers are not made in one
    batch: as soon as one ends, the next prompt takes its place.
    """
    p = open_model(model, step)
    if adapters:
        if len(adapters) != len(prompts) or draft is not None:
            raise ValueError("adapter: give one for each `prompt`, in their order and without `draft`; - is none")
        p = with_row_adapters(p, adapters)
    ids, source = _prompts(p, prompts, special)
    with mesh.on_mesh(p.mesh):
        if draft is None and not adapters and open_engine.fits(p, ids, sampling):
            return open_engine.answers(p, ids, sampling, source)
        run = p.generator()
        weights = run.prepare(p.params)
        if draft is None:
            return stream.answers(run, p.tokens, weights, ids, sampling, source)
        if sampling.stop or source is not None:
            raise ValueError("generate: `draft` does not go with `stop` or an encoder-decoder; leave it out")
        proposer = None if draft == "lookup" else open_model(draft)
        if proposer is not None and proposer.tokens.fingerprint != p.tokens.fingerprint:
            raise ValueError(f"draft {draft}: its tokenizer is another one; use a draft with the same tokenizer")
        fast = Speculative(run, None if proposer is None else proposer.generator(), proposals)
        completions = fast(weights, None if proposer is None else proposer.params, ids, sampling).completions
        return [
            [stream.Answer(decode_after(p.tokens, before, c.tokens), c) for c in several]
            for before, several in zip(ids, completions, strict=True)
        ]


def _prompts(p: Pretrained, texts: Sequence[str], special: bool) -> tuple[list[list[int]], list[list[int]] | None]:
    """Returns what the model reads of prompts, and says how it reads special tokens that they spell."""
    spelled = [set(p.tokens.encode_special(text)) - set(p.tokens.encode(text)) for text in texts]
    if pieces := ", ".join(dict.fromkeys(p.tokens.piece(id) for ids in spelled for id in sorted(ids))):
        how = "special tokens" if special else "characters; with `special` (--special) they are special tokens"
        print(f"prompt: {pieces} are read as {how}", file=sys.stderr)
    if not special:
        return p.prompts(texts)
    view = dataclasses.replace(p, source=dataclasses.replace(p.source, tokens=SpelledSpecial(p.tokens)))
    ids, source = view.prompts(texts)
    bos = p.tokens.bos_id  # a prompt that spells it has no second one
    return [prompt[1:] if prompt[:2] == [bos, bos] else prompt for prompt in ids], source


def chat(
    model: Place,
    lines: Iterator[str],
    say: Callable[[str], None],
    sampling: Sampling,
    *,
    system: str | None = None,
    template: Path | None = None,
    step: int | None = None,
    prompt: str = "",
) -> list[dict[str, Any]]:
    """Answers lines by the model's chat template until there are none; `say` shows text as it comes. Returns the
    messages that were not forgotten."""
    source = source_of(model)
    templates = {"default": read_text(template)} if template else source.templates
    if not templates:
        raise ValueError(f"{source.path}: the model has no chat template; give one with `template` FILE.jinja")
    text = templates.get("default", next(iter(templates.values())))
    p = open_model(model if isinstance(model, Pretrained) else source, step)
    with mesh.on_mesh(p.mesh):
        run = p.generator()
        talk = Chat(run, p.tokens, run.prepare(p.params), text, sampling, system)
        converse(talk, lines, say, prompt)
        return talk.messages
