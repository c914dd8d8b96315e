"""A model is opened for a server: an engine that writes text, an encoder's vectors, or a fine-tuned head's labels."""

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.assembly import predict
from jaxlm.assembly.generation_advice import advice
from jaxlm.assembly.open_engine import open_engine
from jaxlm.assembly.open_model import Place, Pretrained, open_model, source_of
from jaxlm.data import render_chat
from jaxlm.data.chat_template import Renderer
from jaxlm.data.text_input import read_text
from jaxlm.data.tokenizer import SpelledSpecial
from jaxlm.inference.embed import Recipe, encode, make_embed, read_recipe
from jaxlm.inference.engine import Settings
from jaxlm.inference.sampling import Sampling
from jaxlm.inference.server.service import Classify, Embed, Prompt, Service, ToChat
from jaxlm.inference.server.tool_calls import FORMATS, Format, format_of
from jaxlm.runtime import mesh

KINDS = {"decoder": "a decoder", "encoder": "an encoder", "encoder_decoder": "an encoder-decoder"}


def open_service(
    place: Place, settings: Settings | None = None, *, adapters: Mapping[str, str] | None = None, name: str = "",
    template: Path | None = None, calls: str | None = None, step: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Service:  # fmt: skip
    """Opens what a server serves, under the name of its files or another one; everything is compiled then, as
    `progress` is told. `template` takes the place of the model's own; `calls` names the format in which it writes calls
    of tools."""
    if jax.process_count() > 1:
        raise ValueError("serve: a server is one process; start one on each machine, and a proxy before them")
    source = source_of(place)
    p = open_model(place if isinstance(place, Pretrained) else source, step)
    name = name or source.path.stem
    if name in (adapters or {}):
        raise ValueError(f"adapter: {name} is the model's own name; give the adapter another one, or the model (name)")
    own = Service(name, p.tokens, int(time.time()), kind=KINDS[source.family.kind])
    if predict.use_of(source) is not None:
        _without(adapters, template)
        return dataclasses.replace(own, classify=classifier(p), kind=f"{own.kind} with a task's head")
    if source.family.kind == "encoder":
        _without(adapters, template)
        return dataclasses.replace(own, embed=embedder(p))
    if not source.config.head:
        raise ValueError(f"model: {source.path} has no language-model head; serve one that has")
    text = read_text(template) if template else source.templates.get("default")
    if text is None and source.templates:
        text = next(iter(source.templates.values()))
    how, own_length = sampling(p)
    engine = open_engine(p, settings, adapters)
    own = dataclasses.replace(
        own, engine=engine, adapters=tuple(adapters or ()), sampling=how, own_length=own_length,
        encode_prompt=to_prompt(p), encodes_apart=engine.has_source,
    )  # fmt: skip
    if text is not None:
        by = render_chat.renderer(p.tokens, text)
        own = dataclasses.replace(own, encode_chat=to_chat(p, by), template=text, calls=_format(text, calls),
                                  close=by.close)  # fmt: skip
    engine.start(progress)
    return own


def _without(adapters: Any, template: Any) -> None:
    if adapters or template:
        raise ValueError("adapter, template: are for models that write text; leave them out")


def _format(template: str, name: str | None) -> Format | None:
    found = format_of(template)
    if name is not None and found is None:
        raise ValueError("tool_calls: the chat template reads no tools; leave it out, or name another `template`")
    return found if name is None else FORMATS[name]


def sampling(p: Pretrained) -> tuple[Sampling, bool]:
    """Returns the settings of requests that say nothing, and whether the model's own files say how long answers are. As
    in other servers text is drawn at temperature 1 unless the files say otherwise."""
    own = advice(p.source)
    how = dataclasses.replace(own.sampling, beams=1, length=None, min_length=0)
    if not p.source.advice.sample:
        how = dataclasses.replace(how, temperature=1.0)
    own.tell(how)
    return how, "tokens" in own.followed


def to_chat(p: Pretrained, by: Renderer) -> ToChat:
    """Returns what encodes conversations by a template, which is tried first. ValueError: it fails."""
    render_chat.encode_sealed(p.tokens, by, [dict(role="user", content="Hello")], {})

    def chat(messages: list[dict[str, Any]], variables: Mapping[str, Any], answer: bool) -> Prompt:
        ids = render_chat.encode_sealed(p.tokens, by, messages, variables, answer)
        if p.source.family.kind == "encoder_decoder":
            return p.prompts([""])[0][0], ids
        return ids, None

    return chat


def to_prompt(p: Pretrained) -> Callable[[str, bool, bool], Prompt]:
    """Returns what encodes a text that is to be continued."""
    spelled = dataclasses.replace(p, source=dataclasses.replace(p.source, tokens=SpelledSpecial(p.tokens)))
    chats = p.objective is not None and p.objective.chat_template is not None

    def prompt(text: str, add: bool, special: bool) -> Prompt:
        view = spelled if special else p
        if p.source.family.kind != "encoder_decoder" and (chats or not add):
            before = p.boundary_ids[0] if add else []
            ids = view.tokens.encode(text)
            return (ids if ids[: len(before)] == before else [*before, *ids]) or [p.tokens.bos_id], None
        [ids], sources = view.prompts([text])
        return ids, None if sources is None else sources[0]

    return prompt


def embedder(p: Pretrained) -> Embed:
    """Returns what makes vectors of texts, or of token ids as they are, pooled as the model's files say."""
    recipe = read_recipe(p.source.path) or Recipe()
    skipped = 0 if recipe.include_prompt or not recipe.prompt else len(encode(p.tokens, [""], recipe)[0]) - 1
    run = make_embed(p.model, pooling=recipe.pooling, normalize=recipe.normalize, skipped=skipped)
    lock, positions = threading.Lock(), p.model.config.positions

    def embed(inputs: Sequence[str | list[int]]) -> tuple[np.ndarray, int]:
        texts = [one for one in inputs if isinstance(one, str)]
        encoded = iter(encode(p.tokens, texts, recipe, positions))
        ids = [next(encoded) if isinstance(one, str) else one for one in inputs]
        if positions is not None and max(map(len, ids)) > positions:
            raise ValueError(f"one has {max(map(len, ids))} tokens; the model reads {positions}")
        with lock, mesh.on_mesh(p.mesh):
            return run(p.params, ids), sum(map(len, ids))

    return embed


def classifier(p: Pretrained) -> Classify:
    """Returns what labels inputs by a fine-tuned head."""
    label, lock = predict.labeller(p), threading.Lock()

    def classify(inputs: Sequence[Any]) -> list[dict[str, Any]]:
        with lock:
            return label(label.rows(inputs))

    return classify
