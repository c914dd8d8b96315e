"""Runs a model for many requests at once: whatever arrives joins the step after.

One thread does all of it: it reads some tokens of the prompts that wait, then goes one step on with all rows that run.
A step is under way on the device while the tokens of the one before become text, unless a row's choice depends on its
last token (a grammar, a penalty).
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.inference import constrain
from jaxlm.inference.engine import row_caches
from jaxlm.inference.engine.answer import Answer, Rules, check, end_ids_of
from jaxlm.inference.engine.pages import Pages
from jaxlm.inference.engine.programs import Programs, Shapes
from jaxlm.inference.engine.request import Answering, EngineFull, Request
from jaxlm.inference.engine.rows import Rows
from jaxlm.inference.engine.schedule import Line, Waiting
from jaxlm.inference.engine.settings import Settings
from jaxlm.inference.engine.stats import Stats
from jaxlm.models.model import Model
from jaxlm.runtime.mesh import on_mesh

log = logging.getLogger(__name__)


class Engine:
    """An engine answers requests with one model.

    `eos` are the tokens that end an answer, `used` how many of the vocabulary's ids mean something, `both_ways` whether
    attention over a prompt goes both ways. `adapters` has, for a model with adapters for rows, the mask of the
    directions of each (`weights.adapters.per_row`).
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        params: Any,
        settings: Settings | None = None,
        *,
        eos: Sequence[int] = (),
        used: int | None = None,
        both_ways: bool = False,
        adapters: Mapping[str, np.ndarray] | None = None,
        mesh: Any = None,
    ) -> None:
        if not model.family.generates:
            raise ValueError("engine: this model is an encoder; it does not predict the next token")
        if model.adapter is not None and model.adapter.num_virtual_tokens:
            raise ValueError("adapter: virtual tokens stand in no row of an engine's cache; use `jaxlm generate`")
        if mesh is not None and mesh.are_all_axes_explicit:
            raise ValueError("mesh.axis_type: an engine's programs are laid out by the compiler; set it to auto")
        settings = Settings() if settings is None else settings
        self.tokenizer, self.settings, self.eos, self.mesh = tokenizer, settings, tuple(eos), mesh
        self.adapters = dict(adapters or {})
        self.vocab = model.config.vocab
        most = model.config.positions
        self.limit = settings.length if most is None else min(settings.length, most)
        """The most tokens of a prompt and its answer."""
        self.has_source = model.family.kind == "encoder_decoder"
        shapes = shapes_of(settings, self.limit, both_ways, self.has_source)
        with on_mesh(mesh):
            self.programs = Programs(model, params, shapes, min(used or self.vocab, self.vocab), both_ways, mesh)
        self._pages = Pages(shapes.pages, settings.page_tokens)
        self._stats = Stats(pages=shapes.pages, cache_tokens=max(b * s for b, s in shapes.pairs))
        self._grammars: dict[tuple[Any, ...], constrain.Grammar | None] = {}
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._idle = threading.Event()
        self._line = Line()
        self._number = 0
        self._thread: threading.Thread | None = None
        self._closing = False
        self._broken: BaseException | None = None
        self._lock = threading.Lock()
        self._open = 0  # answers that were submitted and haven't ended

    # ---------------------------------------------------------------------------------------------- for every thread

    def start(self, progress: Callable[[int, int], None] | None = None) -> float:
        """Compiles every program, starts the thread and returns the seconds that compiling took. `progress` is told how
        many programs are done, and of how many."""
        if self._thread is not None:
            raise RuntimeError("the engine was started before")
        none = np.zeros(len(next(iter(self.adapters.values()))), np.float32) if self.adapters else None
        with on_mesh(self.mesh):
            self._stats.slot_bytes = row_caches.slot_bytes(self.programs.described(1, self.programs.shapes.lengths[0]))
            seconds = self.programs.compile(none, progress)
            self._rows = Rows(self.programs, self._pages, self._stats, self.adapters, none)
        self._thread = threading.Thread(target=self._run, name="jaxlm-engine", daemon=True)
        self._thread.start()
        return seconds

    def submit(self, request: Request) -> Answering:
        """Returns what yields the answers of a request.

        Raises ValueError, which names the field, for a request that can't be met, and EngineFull where as many answers
        wait as may.
        """
        check(request, self.vocab, tuple(self.adapters))
        s, n = request.sampling, len(request.prompt)
        if s.length is not None and n >= s.length:
            raise ValueError(f"sampling.length: the prompt has {n} tokens, and prompt and answer may have {s.length}")
        rules = Rules.of(request, self.eos, self.vocab, self._grammar(request))
        if n + rules.most > self.limit:
            raise ValueError(
                f"prompt: {n} tokens and an answer of {rules.most} are more than the {self.limit} that fit; shorten "
                "it, or ask for fewer tokens"
            )
        if (request.source is not None) != self.has_source:
            raise ValueError("source: an encoder-decoder needs one, and no other model takes one")
        if request.source is not None and not 0 < len(request.source) <= self.settings.source:
            raise ValueError(f"source: {len(request.source)} tokens; give 1 to {self.settings.source}")
        answering = Answering(request, self._abort)
        answers = [Answer(rules, i, self.tokenizer, answering, self.vocab) for i in range(s.samples)]
        with self._lock:  # until the command is sent, so that no thread ends between the look and the sending
            if self._broken is not None:
                raise RuntimeError("the engine stopped by an error") from self._broken
            if self._closing or self._thread is None:
                raise RuntimeError("the engine does not run")
            waiting = self._open - len(self._rows.running)
            if waiting + s.samples > self.settings.queue:
                raise EngineFull(f"{waiting} answers wait already; try again later")
            self._open += s.samples
            self._idle.clear()
            self._send(lambda: self._add(answers))
        return answering

    def stats(self) -> Stats:
        """Returns a copy of the counters."""
        self._count()
        with self._lock:
            now = Stats(**vars(self._stats))
        now.pages_free, now.pages_cached, now.pages_used = self._pages.free, self._pages.cached, self._pages.used
        return now

    @property
    def is_broken(self) -> bool:
        """Says whether an error ended the engine, so that it answers nothing more."""
        return self._broken is not None

    def drain(self, seconds: float) -> bool:
        """Refuses new requests, and returns whether all that were there have ended within so many seconds."""
        with self._lock:
            self._closing = True
            if not self._open:
                self._idle.set()
        self._wake.set()
        return self._idle.wait(seconds)

    def close(self) -> None:
        """Gives up what still runs and ends the thread."""
        with self._lock:
            self._closing = True
        if self._thread is not None:
            self._send(self._abort_all)
            self._thread.join()

    def _send(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self._wake.set()

    def _abort(self, answering: Answering) -> None:
        self._send(lambda: self._give_up(lambda a: a.answering is answering))

    def _grammar(self, request: Request) -> constrain.Grammar | None:
        s = request.sampling
        if s.regex is None and s.json_schema is None:
            return None
        key = s.regex, s.json_schema, end_ids_of(request, self.eos)
        if (grammar := self._grammars.get(key)) is None:
            grammar = constrain.open_grammar(self.tokenizer, s, self.vocab, key[2])
            with self._lock:
                while len(self._grammars) >= 64:
                    self._grammars.pop(next(iter(self._grammars)))
                self._grammars[key] = grammar
        return grammar

    # --------------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            with on_mesh(self.mesh):
                while self._take_commands():
                    self._work()
        except BaseException as error:  # whoever waits must learn of it
            log.exception("the engine stopped by an error")
            with self._lock:
                self._broken = error
            self._fail_all()

    def _take_commands(self) -> bool:
        """Does what other threads asked for, waits where nothing is to be done, and returns whether to go on."""
        while True:
            self._wake.clear()
            try:
                while True:
                    self._commands.get_nowait()()
            except queue.Empty:
                pass
            if self._line.first is not None or self._rows.is_busy:
                return True
            with self._lock:  # whoever was let in before has sent its command
                if self._closing and self._commands.empty():
                    return False
            self._wake.wait()

    def _work(self) -> None:
        before = self._stats.prompt_tokens
        while self._stats.prompt_tokens - before < self.settings.read_tokens:
            self._admit()
            if (reading := self._rows.reading) is None:
                break
            if self._rows.read_chunk():
                for answer in self._rows.begin(reading):
                    self._line.add(Waiting([answer], reading.number))
        for answer in self._rows.step():
            self._line.add(Waiting([answer], answer.number))
        self._count()

    def _admit(self) -> None:
        """Begins to read the first prompt that waits, if rows are free for it."""
        if self._rows.reading is not None or (item := self._line.first) is None:
            return
        if (count := self._rows.num_fitting(item.answers)) == 0:
            return
        taken = self._line.take(count)
        now = time.monotonic()
        if taken.answers[0].answering.times.started is None:
            taken.answers[0].answering.times.started = now
        self._rows.start_reading(taken.answers, taken.number)

    def _add(self, answers: list[Answer]) -> None:
        self._number += 1
        for answer in answers:
            answer.number, answer.ended = self._number, self._note_end
        self._line.add(Waiting(answers, self._number))

    def _note_end(self, answer: Answer, reason: str) -> None:
        """Counts an answer that has ended."""
        with self._lock:
            self._stats.finished += reason in ("stop", "length")
            self._stats.aborted += reason == "abort"
            self._stats.failed += reason == "error"
            self._open -= 1
            if not self._open:
                self._idle.set()

    def _give_up(self, unwanted: Callable[[Answer], bool]) -> None:
        for answer in self._line.remove(unwanted):
            answer.finish("abort")
        self._rows.give_up(unwanted)
        self._count()

    def _abort_all(self) -> None:
        self._give_up(lambda _: True)

    def _fail_all(self) -> None:
        """Ends every answer after an error, also those that are still on their way here."""
        while True:
            try:
                self._commands.get_nowait()()
            except queue.Empty:
                break
        for answer in [*self._line.remove(lambda _: True), *self._rows.everyone]:
            answer.fail("the engine stopped by an error")

    def _count(self) -> None:
        with self._lock:
            self._stats.running = len(self._rows.running)
            self._stats.waiting = self._open - self._stats.running
            self._stats.cache_used = sum(a.end for a in self._rows.running)


def shapes_of(c: Settings, limit: int, both_ways: bool, has_source: bool) -> Shapes:
    """Returns the shapes that an engine's programs are compiled for."""
    lengths = c.row_lengths(limit)
    tokens = c.most_tokens(lengths)
    pairs = tuple((b, s) for s in lengths for b in sorted(set(c.rows)) if b * s <= tokens)
    pages = tokens // c.page_tokens // 4 if c.pages is None else c.pages
    # A prompt that is read both ways, or together with a source, is no beginning of another one.
    pages = 0 if both_ways or has_source else pages
    chunks = lengths if both_ways else tuple(sorted({min(n, lengths[0]) for n in c.chunks}))
    return Shapes(pairs, chunks, pages, c.page_tokens, c.source if has_source else 0, c.lookup)
