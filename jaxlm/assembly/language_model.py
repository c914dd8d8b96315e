"""An opened model as programs use it: it scores, continues and embeds texts, and is written in every format."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np

from jaxlm.assembly import convert, generate_text, predict
from jaxlm.assembly.generation_advice import advice
from jaxlm.assembly.open_engine import open_engine
from jaxlm.assembly.open_model import Pretrained
from jaxlm.core import tree
from jaxlm.inference.engine import Engine, Settings
from jaxlm.inference.sampling import Sampling
from jaxlm.inference.stream import Answer
from jaxlm.nn import losses
from jaxlm.runtime import mesh

BUCKET = 64  # lengths are rounded up to a multiple of it, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A LanguageModel holds a model's functions, weights and tokenizer; `jaxlm.open` makes one."""

    pretrained: Pretrained
    """What it consists of: `model` (its pure functions), `source` (what its files say), `mesh`."""

    @property
    def config(self) -> Any:
        """Returns the configuration of the architecture, such as a `llama.Config`."""
        return self.pretrained.model.config

    @property
    def params(self) -> Any:
        """Returns the weights: a nested dict of arrays on the devices."""
        return self.pretrained.params

    @property
    def tokenizer(self) -> Any:
        """Returns the tokenizer. ValueError: the files hold none."""
        return self.pretrained.tokens

    def with_params(self, params: Any) -> "LanguageModel":
        """Returns the model with other weights. ValueError: they are no weights of this model, by path and shape."""
        shapes = [{path: x.shape for path, x in tree.flatten(p).items()} for p in (self.params, params)]
        if differing := sorted(k for k in {*shapes[0], *shapes[1]} if shapes[0].get(k) != shapes[1].get(k)):
            mine, other = (s.get(differing[0], "missing") for s in shapes)
            raise ValueError(f"params: {differing[0]} is {other}, and in this model {mine}")
        return LanguageModel(dataclasses.replace(self.pretrained, params=params))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text with those that the model expects before and after it."""
        before, after = self.pretrained.boundary_ids
        return [*before, *self.tokenizer.encode(text), *after]

    def logits(self, texts: str | Sequence[str], targets: str | Sequence[str] | None = None) -> list[np.ndarray]:
        """Returns the logits of each text, `[T, V]` in float32, at each of its T ids (see `encode`). A decoder's row
        `t` is about the id at `t + 1`. An encoder-decoder reads `texts` and gives the logits of `targets`.

        ValueError: the model has no language-model head, a text is longer than the model, or targets are missing.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        p = self.pretrained
        c = p.model.config
        if not c.head:
            raise ValueError("logits: this model has no language-model head; use embed")
        sources: list[list[int]] | None = None
        if p.model.family.kind == "encoder_decoder":
            several = [targets] if isinstance(targets, str) else list(targets or ())
            if len(several) != len(texts):
                raise ValueError(f"targets: {len(several)} for {len(texts)} texts; give one for each")
            starts, sources = p.prompts(texts)
            rows = [[*start, *self.tokenizer.encode(t)] for start, t in zip(starts, several, strict=True)]
        elif targets is not None:
            raise ValueError("targets: only an encoder-decoder has them; leave them out")
        else:
            rows = [self.encode(text) for text in texts]
        if not rows:
            return []
        longest = max(map(len, rows + (sources or [])))
        if c.positions is not None and longest > c.positions:
            raise ValueError(f"texts: one has {longest} ids, and the model reads {c.positions}; shorten it")
        batch = _batch(rows, c.positions)
        if sources is not None:
            read = _batch(sources, c.positions)
            batch |= {"source": read["tokens"]} | {f"source_{k}": read[k] for k in ("positions", "segments")}
        with mesh.on_mesh(p.mesh):
            z_BTV = np.asarray(self._compute_logits(p.params, batch))
        return [z_TV[: len(ids)] for z_TV, ids in zip(z_BTV, rows, strict=False)]

    @cached_property
    def _compute_logits(self) -> Callable[[Any, dict[str, Any]], jax.Array]:
        model = self.pretrained.model

        @jax.jit
        def compute(params: Any, batch: dict[str, Any]) -> jax.Array:
            return losses.logits(model.readout(params, model.forward(params, batch).x_BTD), model.shard)

        return compute

    @overload
    def generate(self, prompts: str, sampling: Sampling | None = None, **settings: Any) -> str: ...

    @overload
    def generate(self, prompts: Sequence[str], sampling: Sampling | None = None, **settings: Any) -> list[str]: ...

    def generate(self, prompts: Any, sampling: Sampling | None = None, **settings: Any) -> Any:
        """Returns the new text after a prompt, or of each of several.

        `settings` are fields of `Sampling`, such as `tokens=64, temperature=0.8`; they change `sampling`, or else what
        the model's own files advise. With `samples` above 1 there is a list of texts for each prompt: see `answers`.
        """
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        answers = self.answers(several, sampling, **settings)
        texts: list[Any] = [[a.text for a in each] for each in answers]
        texts = [each[0] if len(each) == 1 else each for each in texts]
        return texts[0] if isinstance(prompts, str) else texts

    def answers(
        self, prompts: Sequence[str], sampling: Sampling | None = None, *, special: bool = False, **settings: Any
    ) -> list[list[Answer]]:
        """Returns the answers to each prompt with their tokens, reasons to end, and log probabilities where asked for
        (`logprobs=0`, or the number of likeliest tokens to show). With `special`, special tokens that a prompt spells
        out become themselves."""
        known = [f.name for f in dataclasses.fields(Sampling)]
        if unknown := [name for name in settings if name not in known]:
            raise ValueError(f"{unknown[0]}: no such setting of Sampling; known: {', '.join(known)}")
        how = self._with_advice(settings) if sampling is None else dataclasses.replace(sampling, **settings)
        return generate_text.generate(self.pretrained, prompts, how, special=special)

    def engine(self, settings: Settings | None = None, adapters: Mapping[str, str] | None = None) -> Engine:
        """Returns an engine that answers many requests at once, with everything compiled. `adapters` are directories of
        PEFT's by the names that requests call them by. Close it in the end."""
        made = open_engine(self.pretrained, settings, adapters)
        made.start()
        return made

    def _with_advice(self, settings: dict[str, Any]) -> Sampling:
        """Returns what the files advise, with a user's own settings. What is followed is told the first time."""
        own = advice(self.pretrained.source)
        how = own.chosen(**settings)
        if (line := own.line(how)) and line not in self._told:
            self._told.append(line)
            own.tell(how)
        return how

    @cached_property
    def _told(self) -> list[str]:
        return []

    @overload
    def predict(self, inputs: str | Mapping[str, Any]) -> dict[str, Any]: ...  # type: ignore[overload-overlap]

    @overload
    def predict(self, inputs: Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]: ...

    def predict(self, inputs: Any) -> Any:
        """Returns what a model that was fine-tuned for a labelled task says of an input, or of each of several.

        An input is a text, or the named parts of one, such as `{"question": …, "context": …}`. Classifiers give `label`
        and `probabilities`, taggers `words`, `tags` and `entities`, question answering `answer`, `start`, `end` and
        `score`, multiple choice `choice` and `probabilities`. ValueError: the model predicts no labels, or an input
        lacks a part.
        """
        several = [inputs] if isinstance(inputs, str | Mapping) else list(inputs)
        _, told = predict.predict(self.pretrained, several)
        return told[0] if isinstance(inputs, str | Mapping) else told

    def embed(self, texts: str | Sequence[str], pooling: str | None = None) -> np.ndarray:
        """Returns a vector of each text, `[N, D]` in float32, pooled as the model's files say (`mean` and of length one
        if they say nothing), or by `pooling`: mean or cls. ValueError: the model is no encoder."""
        return generate_text.embed(self.pretrained, [texts] if isinstance(texts, str) else list(texts), pooling)

    def save(
        self,
        target: str | Path,
        format: str = "hf",
        dtype: str | None = None,
        quantize: str | None = None,
        calibration: str | None = None,
    ) -> list[str]:
        """Writes the model for others to read: `hf` (safetensors as transformers reads them), `gguf`, `stablehlo` or
        `peft`. What is written is read again and compared. Returns a line on each thing written.

        `quantize` is a type of GGUF file of few bits, such as `q4_k_m`; `calibration` a text, or llama.cpp's importance
        matrix, that says which columns matter more. ValueError: the format can't express the model, or `target` exists;
        nothing is left behind then.
        """
        notes, _ = convert.export(
            self.pretrained, target, format=format, dtype=dtype, quantize=quantize, calibration=calibration
        )
        return notes


def _batch(rows: Sequence[Sequence[int]], longest: int | None) -> dict[str, np.ndarray]:
    """Returns rows of ids as one batch whose rows divide over the devices here. Padding is its own segment 0."""
    T, n = -(-max(map(len, rows)) // BUCKET) * BUCKET, jax.device_count()
    T = T if longest is None else min(T, longest)
    tokens = np.zeros((-(-len(rows) // n) * n, T), np.int32)
    segments = np.zeros_like(tokens)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], segments[i, : len(ids)] = ids, 1
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    return dict(tokens=tokens, segments=segments, positions=positions)
