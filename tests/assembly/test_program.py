"""From a run to its parts: every objective shows, learns and validates; what can't go together is refused."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.assembly import corpus, earlier, program, run_directory, run_objective, scoring
from jaxlm.commands import cli
from jaxlm.core import config, config_io
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn import layout
from jaxlm.objectives import OBJECTIVES
from jaxlm.runtime import mesh
from jaxlm.weights.adapters import adapted

CONFIG = """
from jaxlm import Data, Execution, Mesh, Optim, Run, Train
from jaxlm.models import MODELS
from jaxlm.objectives import OBJECTIVES

def config():
    return Run(
        name="run",
        model=MODELS[{family!r}].Config(**{model!r}),
        objective=OBJECTIVES[{objective!r}].Config(**{settings!r}),
        data=Data(train=({text!r},), holdout=0.2, tokenizer="sentencepiece:400", cache={cache!r}, tokenize_workers=1),
        optim=Optim(lr=1e-2, warmup=1),
        train=Train(steps=3, batch_size=8, seq_len=32, eval_every=3, save_every=3, log_every=1,
                    prompts=()),
        mesh=Mesh(data=8),
        execution=Execution(dtype="float32", scan=True),
        out={out!r},
    )
"""
LLAMA = dict(vocab=512, layers=1, width=16, heads=2, kv_heads=1, head_width=8, ffn=16)
BERT = dict(vocab=512, layers=1, width=16, heads=2, ffn=16, positions=32)
T5 = dict(vocab=512, layers=1, width=16, heads=2, head_width=8, ffn=16)
BART = dict(vocab=512, layers=1, width=16, heads=2, ffn=16, positions=32)
ROWS = {
    "causal": ("llama", LLAMA, {}),
    "prefix": ("llama", LLAMA, {}),
    "infill": ("llama", LLAMA, {"sentinels": ("<cls>", "<sep>", "<mask>")}),
    "seq2seq": ("llama", LLAMA, {}),
    "span_corruption": ("t5", T5, {"sentinels": 50, "target_len": 16}),
    "translation": ("bart", BART, {"target_len": 24}),
    "masked": ("bert", BERT, {}),
    "next_sentence": ("bert", BERT, {}),
}
OBJECTIVE_OF = {"translation": "seq2seq"}  # of rows that have another name


@pytest.fixture
def home(tmp_path: Path):
    """`home(objective, **changes)` writes a config for it and gives the path."""
    lines = [
        {"text": f"def f{i}(x):\n    return x + {i}\n" * 3, "source": f"two dogs {i}", "target": f"zwei Hunde {i} «ß»"}
        for i in range(60)
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def write(objective: str, family: str = "", model: dict | None = None, settings: dict | None = None) -> str:
        row = ROWS[objective]
        path = tmp_path / f"{objective}.py"
        path.write_text(
            CONFIG.format(
                family=family or row[0],
                model=model or row[1],
                settings=settings or row[2],
                objective=OBJECTIVE_OF.get(objective, objective),
                text=str(tmp_path / "x.jsonl"),
                cache=str(tmp_path / "cache"),
                out=str(tmp_path / "runs"),
            )
        )
        return str(path)

    return write


@pytest.mark.parametrize("objective", ROWS)
def test_data_inspect_shows_rows_and_how_much_of_them_is_learned(objective, home, capsys):
    assert cli.main(["data", "inspect", home(objective), "--examples", "2"]) == 0
    shown = capsys.readouterr().out
    marked = [int(n) for n in re.findall(r"(\d+) (?:of them )?targets \(in brackets", shown)]
    assert len(marked) == 2 and min(marked) > 0
    assert "<pad>" not in shown and "⟦" in shown and "\u2581" not in shown
    assert ("Hunde" in shown.replace("⟦", "").replace("⟧", "")) == (objective in ("seq2seq", "translation"))


@pytest.mark.parametrize(
    "objective",
    [
        "prefix",
        "span_corruption",
        *(pytest.param(o, marks=pytest.mark.slow) for o in ("infill", "seq2seq", "translation")),
    ],
)
def test_it_learns_and_validates_on_a_mesh(objective, home):
    run = config_io.load(home(objective))
    tokens = run_directory.load_tokenizer(run)
    p = program.program(run, tokens)
    assert p.model.ids_in_use == p.objective.vocab_size <= run.model.vocab  # which smoothing keeps to
    data = corpus.corpus(run.data, p.objective)
    name = "spans" if objective == "span_corruption" else "tokens"
    with mesh.on_mesh(p.mesh):
        state, losses = p.init(), []
        batch = p.to_device(corpus.training_loader(run, p.objective, data, None).batch(0), None)
        step = p.train_step().lower(state, batch).compile()
        for _ in range(4):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            assert metrics["finite"] == 1 and metrics[f"weight/{name}"] == np.asarray(batch["weights"]).sum()
        assert losses[-1] < losses[0]
        found = scoring.Scorer(p)(state.params, scoring.HeldOut(p, data.valid))
    valid, sample = found.figures, found.samples["losses"]
    assert sample.unit == "documents" and 1 < len(sample.counts_NM) <= 60
    assert valid["targets"] > 0 and valid["perplexity"] > 1
    assert ("bits_per_byte" in valid) == (name == "tokens"), "spans are no whole text"


@pytest.mark.parametrize("objective", ["seq2seq", "next_sentence"])
def test_every_record_is_read_equally_often_where_sources_have_no_weights(objective, home, tmp_path):
    """However long their texts are: by tokens the few long ones would be read many times an epoch."""
    for name, n, words in (("short", 80, 1), ("long", 20, 12)):
        text = "two dogs " * words
        lines = [{"text": f"{text} {i}", "source": f"{text} {i}", "target": f"zwei {i}"} for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = config_io.load(home(objective))
    tokens = run_directory.load_tokenizer(run)
    sources = tuple(str(tmp_path / f"{name}.jsonl") for name in ("short", "long"))
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, train=sources))
    bound = run_objective.bind_run(run, tokens)
    made = corpus.training_loader(run, bound, corpus.corpus(run.data, bound), None)
    sizes = np.array([len(part) for part in made.mixture.parts])
    np.testing.assert_allclose(made.mixture.shares, sizes / sizes.sum())
    given = dataclasses.replace(run, data=dataclasses.replace(run.data, weights=(3.0, 1.0)))
    made = corpus.training_loader(given, bound, corpus.corpus(given.data, bound), None)
    np.testing.assert_allclose(made.mixture.shares, [0.75, 0.25])
    with pytest.raises(ValueError, match=r"^data.weights: .* is not a weight for each of 2 training sources"):
        corpus.corpus(dataclasses.replace(run.data, weights=(1.0,)), bound)


@pytest.mark.slow
def test_pairs_train_and_evaluate_from_the_command_line(home, tmp_path, capsys):
    assert cli.main(["train", home("seq2seq")]) == 0
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "runs" / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["targets"] > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_model_is_refused_what_its_kind_can_not_learn(objective, home):
    module = OBJECTIVES[objective]
    assert set(module.models) <= {"decoder", "encoder", "encoder_decoder"}
    run = config_io.load(home("causal"))
    for name, family in MODELS.items():
        if family.kind in module.models:
            continue
        wrong = config.Run("run", family.Config(), module.Config(), data=run.data)
        with pytest.raises(ValueError, match=rf"^objective: {objective} trains .* and {name} is of kind {family.kind}"):
            program.program(wrong, run_directory.load_tokenizer(run))


@pytest.mark.parametrize(
    ("objective", "changes", "words"),
    [
        ("span_corruption", ["--model.vocab", "449"], "tokenizer's 400 tokens and the 50 that objective adds; set"),
        ("span_corruption", ["--objective.sentinels", "1"], "objective.sentinels: 1 are too few for the gaps"),
        ("translation", ["--objective.target-len", "40"], "objective.target_len: 40 is longer than model.positions 32"),
        ("translation", ["--train.seq-len", "40"], "train.seq_len: 40 is longer than model.positions 32"),
        ("seq2seq", ["--data.compare-compression"], "data.compare_compression"),
        ("infill", ["--objective.sentinels"], "objective.sentinels: data.tokenizer has no <fim_prefix>"),
    ],
)
def test_a_run_that_can_not_be_is_refused_in_one_line(objective, changes, words, home, capsys):
    assert cli.main(["train", home(objective), *changes, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize("objective", ["causal", "seq2seq", "translation"])
def test_prompts_are_what_the_model_was_trained_to_go_on_from(objective, home):
    run = config_io.load(home(objective))
    tokens = run_directory.load_tokenizer(run)
    prompts, sources = run_objective.bind_run(run, tokens).prompts(["two dogs", "a"])
    ids = [tokens.encode(text) for text in ("two dogs", "a")]
    if objective == "translation":
        start = run.model.decoder_start
        assert (prompts, sources) == ([[start]] * 2, [[*x, tokens.eos_id] for x in ids])
    else:
        end = [tokens.sep_id] if objective == "seq2seq" else []
        assert (prompts, sources) == ([[tokens.bos_id, *x, *end] for x in ids], None)


def test_texts_that_lose_their_end_are_counted(home, capsys):
    path = home("seq2seq")
    assert cli.main(["data", "inspect", path, "--train.seq-len", "8"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    told = r"(\S+): of (\d+) pairs (\d+) sources and (\d+) targets lose their end; raise train.seq_len"
    train, valid = re.findall(told, shown)
    assert train[0] == valid[0] == config_io.load(path).data.train[0], "the source, of both of its parts"
    assert int(train[1]) > int(valid[1]) > 0 and all(n == cut for _, n, _, cut in (train, valid))
    assert cli.main(["data", "inspect", path, "--train.seq-len", "64"]) == 0
    assert "lose their end" not in capsys.readouterr().out


def flops(model, objective, attention: bool = False, **more) -> float:
    """Weights that a token of a row is multiplied with, by 6 FLOPs each; attention left out, or alone."""
    run = config.Run("r", model, objective, train=config.Train(seq_len=32, batch_size=8), **more)
    family, bound = MODELS.of(model), run_objective.bind_run(run, None)
    adapter = adapted.Adapted(run.adapter, family, model)
    specs = adapter.specs() | bound.specs(model.width)
    own = family.specs(model) | bound.specs(model.width)
    p = program.Program(run, None, layout.Layout(), specs, Model(family, model, own, layout.Layout()), adapter, bound,
                         program.optimizer(run, specs, adapter, earlier.nothing()), {})  # fmt: skip
    found = p.flops_per_token()
    return (found["full"] - found["causal"]) / 6 if attention else (2 * found["causal"] - found["full"]) / 6


@pytest.mark.parametrize(("objective", "windows"), [("causal", True), ("seq2seq", False)])
def test_rows_are_known_to_be_one_document_where_windows_are_not_cut_by_documents(objective, windows, home):
    run = config_io.load(home(objective))
    tokens = run_directory.load_tokenizer(run)
    assert not program.program(run, tokens).one_document
    whole = dataclasses.replace(run, data=dataclasses.replace(run.data, document_mask=False))
    p = program.program(whole, tokens)
    assert p.one_document == windows == p._for_step().model.shard.one_document
    assert not p.model.shard.one_document  # other rows than the step's may hold more


def test_flops_count_the_weights_that_a_token_meets():
    from jaxlm.models import bert, llama, mixtral, t5
    from jaxlm.nn.moe import Moe
    from jaxlm.objectives import causal, classify, masked, next_sentence, seq2seq
    from jaxlm.weights.adapters import Lora, Vera

    D, F, V, A = 16, 24, 64, 4 * 16 * 16  # q, k, v, o of four heads of four
    shape = dict(vocab=V, layers=2, width=D, heads=4, head_width=4, ffn=F)
    assert flops(llama.Config(**shape, kv_heads=4), causal.Config()) == 2 * (A + 3 * D * F) + V * D
    assert flops(llama.Config(**shape, kv_heads=4, tied=True), causal.Config()) == 2 * (A + 3 * D * F) + V * D
    layers, head = 2 * (A + 3 * D * F), V * D
    whole, attention = llama.Config(**shape, kv_heads=4), 2 * 32 * D
    lora = 2 * 2 * (D * 4 + 4 * D)  # of q and v, trained themselves: gradients pass all, and are taken of nothing else
    assert flops(whole, causal.Config(), adapter=Lora(rank=4)) == pytest.approx(lora + (layers + head) * 2 / 3, abs=1)
    assert flops(whole, causal.Config(), attention=True) == attention
    shared = 2 * 2 * (D * 4 + 4 * D) * 2 / 3  # of q and v in each layer, of which nothing learns but factors
    assert flops(whole, causal.Config(), adapter=Vera(rank=4)) == pytest.approx(shared + (layers + head) * 2 / 3, abs=1)
    on = lambda *targets: flops(whole, causal.Config(), adapter=Lora(rank=4, targets=targets))  # noqa: E731
    assert on("embed") == pytest.approx(4 * D + (layers + head) * 2 / 3, abs=1), "rows of a are looked up"
    assert on("head") == pytest.approx(4 * (D * 2 / 3 + V) + (layers + head) / 3, abs=1), "gradients end at the head"
    above = config.Optim(freeze=("blocks", "embed"))
    assert flops(whole, causal.Config(), optim=above) == pytest.approx(layers / 3 + head * 2 / 3, abs=1)
    assert flops(whole, causal.Config(), attention=True, optim=above) == pytest.approx(attention / 3)
    experts = Moe(experts=8, top_k=2, ffn=F)
    expected = 2 * (A + D * 8 + 2 * 3 * D * F) + V * D
    assert flops(mixtral.Config(**shape, kv_heads=4, moe=experts), causal.Config()) == expected
    encoder = bert.Config(vocab=V, layers=2, width=D, heads=4, ffn=F, pooler=False)
    share = masked.target_positions(masked.Config(), 32) / 32
    assert flops(encoder, masked.Config()) == 2 * (A + 2 * D * F) + share * (D * D + V * D)
    assert flops(encoder, next_sentence.Config()) == 2 * (A + 2 * D * F) + share * (D * D + V * D)
    assert flops(encoder, classify.Config(labels=("a", "b"))) == 2 * (A + 2 * D * F), "no vocabulary"
    both = t5.Config(**shape, gated=False)
    decoder = 2 * (A + 2 * D * D + 2 * D * F) * 0.25 + 2 * 2 * D * D  # keys and values of the source are its tokens'
    expected = 2 * (A + 2 * D * F) + decoder + 0.25 * V * D
    assert flops(both, seq2seq.Config(target_len=8)) == expected


@pytest.mark.usefixtures("one_device")
def test_the_program_that_draws_weights_is_compiled_quickly_and_draws_the_same(monkeypatch):
    from jaxlm.data.tokenizer import Bytes
    from jaxlm.models import llama
    from jaxlm.objectives import causal

    run = config.Run("r", llama.Config(**LLAMA), causal.Config(), train=config.Train(seq_len=32))
    p = program.program(run, Bytes())
    asked = []
    jit = jax.jit
    monkeypatch.setattr(program.jax, "jit", lambda *a, **k: asked.append(k["compiler_options"]) or jit(*a, **k))
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        made = p.init().params
        plain = jit(p._fresh, out_shardings=p.state_shardings)(jax.random.key(run.seed), {}).params
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert asked == [{"xla_backend_optimization_level": 1}]
    jax.tree.map(np.testing.assert_array_equal, made, plain)
    p.init()
    assert asked[1:] == [None], "who asks JAX for less still gets that"


@pytest.mark.usefixtures("one_device")
def test_a_run_compiles_its_three_programs_once_and_nothing_array_by_array(home):
    """The state, the step and the validation; what JAX makes of the seed is beside them, once in a process."""
    compiled: Counter[str] = Counter()

    def heard(event: str, seconds: float, **about) -> None:
        if event.endswith("backend_compile_duration"):
            compiled[about["fun_name"].removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        assert cli.main(["train", home("causal"), "--mesh.data", "1"]) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    of_seed = {"stage", "_threefry_seed"}
    assert {name: n for name, n in compiled.items() if name not in of_seed} == {"_fresh": 1, "update": 1, "_scores": 1}


@pytest.mark.parametrize("kind", ["muon", "adamw with an adapter", "workers"])
def test_runs_that_differ_in_numbers_alone_share_a_program(kind):
    from jaxlm.core.distributed import Distributed
    from jaxlm.models import mixtral
    from jaxlm.nn.moe import Moe
    from jaxlm.objectives import causal
    from jaxlm.planning import ahead_of_time
    from jaxlm.weights.adapters import Lora

    model = mixtral.Config(vocab=512, layers=1, width=16, heads=2, kv_heads=1, head_width=8, ffn=16,
                           moe=Moe(experts=4, top_k=2, ffn=16, selection_bias=True))  # fmt: skip
    more = {"muon": {}, "adamw with an adapter": {"adapter": Lora(rank=2)},
            "workers": {"distributed": Distributed("diloco", workers=2)}}[kind]  # fmt: skip
    by = config.Optim("adamw" if "adamw" in kind else "muon", warmup=2)
    plain = config.Run("r", model, causal.Config(), optim=by,
                       train=config.Train(batch_size=16, seq_len=32, steps=60), **more)  # fmt: skip

    def lowered(optim: dict | None = None, train: dict | None = None, **changes) -> str:
        changes |= {"optim": dataclasses.replace(plain.optim, **optim or {})}
        run = dataclasses.replace(plain, train=dataclasses.replace(plain.train, **train or {}), **changes)
        p = ahead_of_time.program_of(run)
        return p.train_step().lower(p.abstract_state(), ahead_of_time.abstract_batch(p)).as_text()

    one = lowered()
    assert lowered({"lr": 1e-4, "warmup": 9}, seed=2**40 + 7) == one
    for optim in ({"muon_lr": 0.3}, {"weight_decay": 0.3}, {"decay": 0.5}, {"final": 0.2}) if kind == "muon" else ():
        assert lowered(optim) == one, optim
    assert lowered(train={"steps": 120}) == one
    assert lowered({"beta1": 0.8}) != one, "what a program is made of"
