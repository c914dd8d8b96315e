"""The tasks of the lm-evaluation-harness run through its own Python interface; its package is in the extra `eval`.

One rule for the begin of text is printed with the results: texts begin with the ids that the model's own tokenizer
files put before them, else, where the harness gives no context, with one bos token. Never with two.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxlm.core.errors import nearest
from jaxlm.data.render_chat import render_text
from jaxlm.data.tokenizer import encode_after
from jaxlm.evaluation.likelihood import Request, Scorer, split, windows
from jaxlm.inference import stream
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling
from jaxlm.models.model import Model

TOKENS = 256  # tokens of an answer where a task doesn't say
LONGEST = 2048  # the most positions that are used of a model
LENGTH_SETTINGS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Harness:
    """A model has these members for the harness to ask, by the harness's own names.

    It is registered as a subclass of the harness's `LM` by `evaluate`: that package sets environment variables when it
    is imported, which importing this module must not.
    """

    rank, world_size, device, tokenizer = 0, 1, None, None

    def __init__(
        self, model: Model, generate: Generator, params: Any, tokens: Any,
        boundary_ids: tuple[Sequence[int], Sequence[int]], *, rows: int = 16, template: str | None = None,
        name: str = "",
    ) -> None:  # fmt: skip
        """`params` had best be prepared. `boundary_ids` stand before and after every text; `template` is for chats."""
        self.generate, self.params, self.tokens = generate, params, tokens
        self.before, self.after = (list(ids) for ids in boundary_ids)
        self.longest = min(model.config.positions or LONGEST, LONGEST)
        self.scorer = Scorer(model, params, rows, self.longest)
        self.rows, self.template, self.name = rows, template, name
        self.seq2seq = model.family.kind == "encoder_decoder"

    @property
    def prefix_token_id(self) -> int:
        """This token stands where there is no context."""
        return self.before[0] if self.before else self.tokens.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The harness keys its cache by this name."""
        return self.name

    @property
    def bos_policy(self) -> str:
        """Says for readers of the results how texts begin."""
        if self.before:
            return f"every text begins with {' '.join(self.tokens.piece(i) for i in self.before)}"
        return f"no begin-of-text token; {self.tokens.piece(self.prefix_token_id)} where there is no context"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encodes a text. Only with a chat template do special tokens that it spells out become themselves."""
        ids = self.tokens.encode_special(string) if self.template else self.tokens.encode(string)
        if add_special_tokens is False or ids[: len(self.before)] == self.before:
            return ids
        return [*self.before, *ids]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns (log likelihood, whether greedy) of each request's continuation after its context."""
        return [(s.log_likelihood, s.greedy) for s in self.scorer([self._request(*r.args) for r in requests])]

    def _request(self, context: str, continuation: str) -> Request:
        if self.seq2seq:
            return Request(self._source(context), self.tokens.encode(continuation))
        encode, encode_more = (lambda text: self.tok_encode(text, False)), partial(encode_after, self.tokens)
        request = split(encode, encode_more, context, continuation)
        begin = self.before or ([] if request.context else [self.prefix_token_id])
        if list(request.context[: len(begin)]) == begin:
            return request
        return request._replace(context=[*begin, *request.context])

    def _source(self, text: str) -> list[int]:
        """Returns what an encoder reads."""
        return [*self.tok_encode(text), *(self.after or [self.tokens.eos_id])]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log likelihood of each whole text, in windows where it is longer than the model's positions."""
        if self.seq2seq:
            raise ValueError("eval: only decoders say how likely a whole text is; leave out tasks of that kind")
        parts = [windows(self.tok_encode(r.args[0], False), self.prefix_token_id, self.longest) for r in requests]
        scores = iter(self.scorer([window for part in parts for window in part]))
        return [sum(next(scores).log_likelihood for _ in part) for part in parts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the answer to each request's context, with the settings that the request states."""
        out = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, r in enumerate(requests):
            groups.setdefault(json.dumps(r.args[1], sort_keys=True), []).append(i)
        for text, members in groups.items():
            settings = sampling_of(json.loads(text))
            room = self.longest - settings.tokens
            if room < 1:
                raise ValueError(
                    f"eval: a task wants {settings.tokens} new tokens of a model with {self.longest} places"
                )
            encode = self._source if self.seq2seq else self.tok_encode
            prompts = {i: encode(requests[i].args[0]) for i in members}
            members.sort(key=lambda i: -len(prompts[i]))
            for at in range(0, len(members), self.rows):
                these = members[at : at + self.rows]
                answers = self._answers([prompts[i][-room:] for i in these], settings)
                for i, [answer] in zip(these, answers, strict=True):
                    out[i] = answer.text
        return out

    def _answers(self, prompts: list[list[int]], s: Sampling) -> list[list[stream.Answer]]:
        if not self.seq2seq:
            return stream.answers(self.generate, self.tokens, self.params, prompts, s)
        start = [[self.generate.model.config.target_start]] * len(prompts)
        return stream.answers(self.generate, self.tokens, self.params, start, s, prompts)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a chat as the model's template renders it."""
        if self.template is None:
            raise ValueError("eval: the model has no chat template; leave out `chat`")
        return render_text(self.tokens, self.template, chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template that the harness stores with its results."""
        return self.template if chat_template else None


def sampling_of(settings: dict[str, Any]) -> Sampling:
    """Translates a task's generation settings; raises a ValueError for one that has no counterpart here."""
    settings = {name: value for name, value in settings.items() if value is not None}
    until = settings.pop("until", ())
    lengths = [settings.pop(name) for name in LENGTH_SETTINGS if name in settings]
    temperature = float(settings.pop("temperature", 1.0 if settings.get("do_sample") else 0.0))
    temperature *= settings.pop("do_sample", True)
    if unknown := sorted(settings.keys() - {"top_k", "top_p", "min_p", "repetition_penalty"}):
        raise ValueError(f"eval: generation settings {', '.join(unknown)} of a task are not known here")
    stop = (until,) if isinstance(until, str) else tuple(s for s in until if s)
    return Sampling(tokens=int(lengths[0] if lengths else TOKENS), temperature=temperature, stop=stop, **settings)


def evaluate(
    lm: Harness, tasks: Sequence[str], *, shots: int | None = None, limit: int | None = None,
    folder: Path | None = None, chats: bool = False, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Returns the harness's results, each example's included. `folder` has tasks in YAML, if any."""
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    LM.register(Harness)
    manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=folder is None)
    known = set(manager.all_tasks)
    for task in tasks:
        if task not in known:
            raise ValueError(f"tasks: unknown {task!r}{_near(task, known)}")
    results = simple_evaluate(
        model=lm, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, apply_chat_template=chats,
        log_samples=True, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
    )  # fmt: skip
    assert results is not None, "the harness gave nothing"
    return results


def _near(task: str, known: set[str]) -> str:
    hint = nearest(task, known)
    return hint if "did you mean" in hint else f"; the harness knows {len(known)} tasks"


def table(results: dict[str, Any]) -> str:
    """Returns the harness's results as its own table."""
    from lm_eval.utils import make_table

    return make_table(results)
