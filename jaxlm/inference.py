"""Use of a trained run: its config and weights alone, on whatever devices are here."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jaxlm import assemble, config, params, sharding, stream
from jaxlm.chat import Chat, converse
from jaxlm.checkpoint import Checkpoints
from jaxlm.eval import perplexity
from jaxlm.generate import Generator
from jaxlm.interop.beside import chat_templates, read_generation
from jaxlm.sampling import Sampling
from jaxlm.speculative import Speculative
from jaxlm.train import read_config


def open_run(folder: Path, step: int | None = None, data: Sequence[str] | None = None) -> tuple[assemble.Program, Any]:
    """(program, weights): the averaged weights where the run keeps an average.

    The mesh is this machine's, every device with whole weights and its share of the batch, whatever it was in training.
    """
    run = read_config(folder)
    run = dataclasses.replace(run, name=folder.resolve().name, out=str(folder.parent), mesh=config.Mesh())
    rows, n = run.train.batch_size // run.train.micro_batches, jax.device_count()  # rows that divide over devices here
    train = dataclasses.replace(run.train, batch_size=-(-rows // n) * n, micro_batches=1)
    run = dataclasses.replace(run, train=train)
    if data:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, valid=tuple(data)))
    p = assemble.program(run, assemble.load_tokenizer(run))
    with Checkpoints(folder / "checkpoints") as checkpoints, sharding.on_mesh(p.mesh):
        if checkpoints.latest() is None:
            raise ValueError(f"{folder}: no checkpoint yet; train it with: jaxlm train {folder}")
        homes = p.layout.shardings(p.specs, p.mesh)
        item = "ema" if run.optim.ema else "params"
        return p, checkpoints.restore_params(params.abstract(p.specs, homes), step, item=item)


def evaluate(folder: Path, *, data: Sequence[str] | None, step: int | None, batches: int) -> dict[str, float]:
    p, weights = open_run(folder, step, data)
    corpus = assemble.corpus(p.run, p.tokens)
    with sharding.on_mesh(p.mesh):
        eval_step = perplexity.make_eval_step(p.loss, p.objective.weights, p.tokens.bytes_per_token)
        return perplexity.evaluate(eval_step, weights, assemble.validation_batches(p, corpus, batches))


def settings(folder: Path) -> Sampling:
    """What the model's own files advise; the default where they say nothing."""
    g, s = read_generation(folder), Sampling()
    given: dict[str, Any] = dict(
        top_p=g.top_p, min_p=g.min_p, repetition_penalty=g.repetition_penalty, tokens=g.new_tokens
    )
    given |= dict(beams=g.beams, length_penalty=g.length_penalty)
    if g.sample:
        given |= dict(temperature=1.0 if g.temperature is None else g.temperature, top_k=g.top_k, beams=None)
    left_out = [*g.others, *(["no_repeat_ngram_size"] if g.no_repeat_ngram else [])]
    if left_out:
        print(f"generation_config.json: without counterpart here, left out: {', '.join(left_out)}", file=sys.stderr)
    return dataclasses.replace(s, **{name: value for name, value in given.items() if value is not None})


def _generator(p: assemble.Program, folder: Path) -> Generator:
    eos = {*read_generation(folder).eos, *(() if p.tokens.eos_id is None else (p.tokens.eos_id,))}
    return Generator(p.model, sorted(eos))


def generate(
    folder: Path,
    prompts: Sequence[str],
    sampling: Sampling,
    step: int | None = None,
    *,
    draft: Path | Literal["lookup"] | None = None,
    proposals: int = 4,
) -> list[list[stream.Answer]]:
    """The new texts of each prompt. `draft`: a smaller model of the same tokenizer that proposes tokens, or `lookup`:
    what followed the last two tokens before."""
    p, weights = open_run(folder, step)
    ids, source = assemble.prompts(p.run, p.tokens, prompts)
    with sharding.on_mesh(p.mesh):
        run = _generator(p, folder)
        weights = run.prepare(weights)
        if draft is None:
            return stream.answers(run, p.tokens, weights, ids, sampling, source)
        if sampling.stop or source is not None:
            raise ValueError("generate: --draft does not go with --stop or an encoder-decoder; leave it out")
        proposer, more = (None, None) if draft == "lookup" else open_run(Path(draft))
        if proposer is not None and proposer.tokens.fingerprint != p.tokens.fingerprint:
            raise ValueError(f"--draft {draft}: its tokenizer is another one; use a draft with the same tokenizer")
        fast = Speculative(run, None if proposer is None else Generator(proposer.model), proposals)
        found = fast(weights, more, ids, sampling).completions
        return [[stream.Answer(p.tokens.decode(c.tokens), c) for c in several] for several in found]


def chat(
    folder: Path,
    lines: Iterator[str],
    say: Callable[[str], None],
    sampling: Sampling,
    *,
    system: str | None = None,
    template: Path | None = None,
    step: int | None = None,
    prompt: str = "",
) -> None:
    """Answer lines by the model's chat template until there are none; `say` shows text as it comes."""
    if template is not None:
        text = template.read_text("utf-8")
    else:
        found = chat_templates(folder) or chat_templates(folder / "tokenizer")
        if not found:
            raise ValueError(f"{folder}: the model has no chat template; give one with --template FILE.jinja")
        text = found.get("default", next(iter(found.values())))
    p, weights = open_run(folder, step)
    with sharding.on_mesh(p.mesh):
        run = _generator(p, folder)
        converse(Chat(run, p.tokens, run.prepare(weights), text, sampling, system), lines, say, prompt)
