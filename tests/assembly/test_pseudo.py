"""Rows of an earlier task that the model writes itself, for models of every kind that write."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.assembly import continual_methods, corpus, earlier, pseudo, remember
from jaxlm.assembly import program as programs
from jaxlm.assembly.model_source import StartModel
from jaxlm.core import config
from jaxlm.core.continual import Continual, Replay
from jaxlm.data.tokenizer import Bytes
from jaxlm.models import llama, t5
from jaxlm.nn.losses import logits
from jaxlm.objectives import causal, classify, seq2seq, sft
from jaxlm.objectives.objective import Written
from jaxlm.runtime import mesh

DECODER = llama.Config(vocab=384, layers=1, width=16, heads=2, kv_heads=2, head_width=8, ffn=32)
KINDS = {
    "text": (DECODER, causal.Config()),
    "chat": (DECODER, sft.Config()),
    "pairs": (DECODER, seq2seq.Config()),
    "encoder_decoder": (
        t5.Config(vocab=384, layers=1, width=16, heads=2, head_width=8, ffn=32, decoder_start=0, dropout=0.0),
        seq2seq.Config(target_len=16),
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    folder, rng = tmp_path_factory.mktemp("new"), np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdef"), 4)) for _ in range(160)]
    rows = {
        "text": [{"text": " ".join(words[i : i + 40])} for i in range(40)],
        "chat": [{"messages": [
            {"role": "user", "content": f"{w}?"}, {"role": "assistant", "content": "well"},
            {"role": "user", "content": w}, {"role": "assistant", "content": w[::-1]},
        ]} for w in words],
        "pairs": [{"source": w, "target": w[::-1]} for w in words],
    }  # fmt: skip
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: str(folder / f"{name}.jsonl") for name in rows}


def made(kind: str, sources: dict, folder, **replay) -> tuple[programs.Program, dict]:
    """The program of a run after a task of its own kind, whose data are gone, and its weights."""
    model, objective = KINDS[kind]
    run = config.Run(
        name=kind, out=str(folder), model=model, objective=objective,
        data=config.Data((sources[{"encoder_decoder": "pairs"}.get(kind, kind)],), tokenizer="bytes",
                         cache=str(folder / "cache"), tokenize_workers=0, holdout=0.1),
        train=config.Train(steps=4, batch_size=16, seq_len=32, prompts=(), eval_every=0, save_every=0),
        continual=Continual(("replay",), replay=Replay(source="model", **{"examples": 6} | replay)),
        optim=config.Optim(warmup=0), execution=config.Execution(dtype="float32"),
    )  # fmt: skip
    task = earlier.Task("old", objective, 32, None, ("gone.txt",), own_head=False)
    p = programs.program(run, Bytes(), None, [task])
    with mesh.on_mesh(p.mesh):
        return p, p.init().all_params


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_writes_what_it_predicts(kind, sources, tmp_path, one_device):
    """Without chance the targets of its rows are the likeliest tokens there, whether it is asked or begins itself."""
    p, weights = made(kind, sources, tmp_path, temperature=1e-6)
    rows = pseudo.rows(p, weights, 0)
    assert len(rows) == 6 and list(rows.priorities) == sorted(rows.priorities)
    batch = {name: jnp.asarray(leaf) for name, leaf in rows.arrays.items()}
    now = p.objective.outputs(p.model, weights, batch)
    likeliest = np.asarray(logits(now.logits, p.model.shard)[..., : p.objective.vocab_size].argmax(-1))
    told = (rows.arrays["weights"] > 0) & (rows.arrays["targets"] != p.tokens.eos_id)
    assert told.sum() > 60 and np.array_equal(rows.arrays["targets"][told], likeliest[told])


@pytest.mark.parametrize("kind", ["chat", "pairs", "encoder_decoder"])
def test_a_row_of_the_true_answers_is_the_row_of_the_data(kind, sources, tmp_path, one_device):
    """What is asked is all that stands before an answer, and an answer with its end is put back where it stood."""
    p, _ = made(kind, sources, tmp_path)
    own = p.objective.writes
    [part] = corpus.corpus(p.run.data, p.objective, ["train"]).train
    read = p.objective.read_prompts(p.run.data.train[0], 4, p.objective.prompts).prompts
    records = corpus.as_records(p.objective, part, document_mask=True, seed=0)
    for i in range(3):
        bound = p.objective.settings, records[i], p.objective.row, p.tokens
        row = p.objective.example(records[i], np.random.default_rng(0))
        asked, texts = own.asked(*bound), []
        for k, one in enumerate(asked):
            if kind == "encoder_decoder":  # it reads the source elsewhere, and its own row begins with an extra token
                tokens, after = row["targets"][row["segments"] == k + 1], 0
                assert one.inputs == row["source"][row["source_segments"] == k + 1].tolist()
            else:
                window, at = np.append(row["tokens"], row["targets"][-1]), np.flatnonzero(row["segments"] == k + 1)
                end = at[-1] + (1 if window[at[-1]] == p.tokens.eos_id else 2)  # a row's last token is a target alone
                tokens, after = window[at[0] : end], len(one.prompt)
                assert tokens[:after].tolist() == one.prompt
            assert one.prompt in read, "as it is evaluated"
            assert tuple(tokens[-len(one.end) :]) == one.end == (p.tokens.eos_id,)
            texts.append(Written(one, tokens[after:].tolist()))
        again = p.objective.example(own.record(p.objective.settings, texts, *bound[2:]), np.random.default_rng(0))
        for name in row:
            if name != "weights" or kind != "chat":
                np.testing.assert_array_equal(again[name], row[name], err_msg=name)
        if kind == "chat":  # of each conversation the last answer alone is learned
            assert again["weights"].sum() == sum(len(text.answer) for text in texts) < row["weights"].sum()


def test_its_rows_are_as_many_as_asked_for_and_the_same_on_every_mesh(sources, tmp_path):
    found = []
    for devices, examples in ((1, 70), (8, 3)):
        with mesh.on_devices(jax.devices()[:devices]):
            p, weights = made("text", sources, tmp_path, examples=examples)
            with mesh.on_mesh(p.mesh):
                found.append(pseudo.rows(p, weights, 0))
    many, few = found
    assert len(many) == 70 and len(few) == 3
    for name, leaf in few.arrays.items():
        np.testing.assert_array_equal(leaf, many.arrays[name][:3], err_msg=name)
    tokens, segments, positions = (many.arrays[name] for name in ("tokens", "segments", "positions"))
    first = (positions == 0) & (segments > 0)
    assert (tokens[first] == p.tokens.bos_id).all() and first.any(1).all(), "every text is whole from its beginning"
    assert len(np.unique(tokens, axis=0)) == 70, "no two are the same"
    with mesh.on_devices(jax.devices()[:1]):
        p, weights = made("text", sources, tmp_path, examples=0, tokens=100)
        assert len(pseudo.rows(p, weights, 0)) == -(-100 // 32)


def test_a_memory_is_made_of_what_the_model_writes(sources, tmp_path, one_device):
    """Files of the old task that are gone aren't missed, and its rows hold the model's logits where those are kept."""
    p, _ = made("text", sources, tmp_path)
    continual = dataclasses.replace(p.run.continual, methods=("der", "lwf"))
    run = dataclasses.replace(p.run, continual=continual)
    p = programs.program(run, Bytes(), None, p.earlier.tasks)
    run.folder.mkdir()
    state = remember.remember(p, p.init(), StartModel(""), begins=True)
    assert set(state.memory) == {"teacher"}
    with np.load(run.folder / "memory" / "rows0.npz") as rows:
        assert len(rows["priorities"]) == 6 and {"stored", "stored_classes", "tokens"} <= set(rows.files)
    assert remember.replayed(p, None)(0)["replay/0/tokens"].shape == (1, 4, 32)


@pytest.mark.slow
def test_a_memory_that_the_model_wrote_serves_a_run_whose_old_data_are_gone(sources, tmp_path, one_device):
    """It goes on in its middle, is handed on to the next run, and a published model speaks for itself."""
    old = tmp_path / "old.jsonl"
    old.write_text("".join(json.dumps({"text": f"old text {i} " * 4}) + "\n" for i in range(20)))
    run = config.Run(
        name="old", out=str(tmp_path), model=DECODER, objective=causal.Config(),
        data=config.Data((str(old),), tokenizer="bytes", cache=str(tmp_path / "cache"), tokenize_workers=0,
                         holdout=0.3),
        train=config.Train(steps=2, batch_size=8, seq_len=32, prompts=(), eval_every=0, save_every=2),
        optim=config.Optim(warmup=0), execution=config.Execution(dtype="float32"),
    )  # fmt: skip
    first = jaxlm.train(run)
    old.unlink()
    keeps = Continual(("replay", "der"), replay=Replay(source="model", examples=6))

    def following(name: str, start, stop: int = 0):
        changes = {
            "data.train": (sources["text"],),
            "data.cache": str(tmp_path / "cache2"),
            "train.steps": 4,
            "data.holdout": 0.2,
        }

        def hook(step: int, metrics: dict) -> None:
            if step == stop:
                raise KeyboardInterrupt

        return jaxlm.train(jaxlm.load(run, start=str(start), name=name, continual=keeps, **changes), on_step=hook)

    whole = following("whole", first.path)
    with pytest.raises(KeyboardInterrupt):
        following("parts", first.path, stop=3)
    parts = following("parts", first.path)
    for a, b in zip(
        *(jax.tree.leaves(jax.device_get(r.open().pretrained.params)) for r in (whole, parts)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    with np.load(whole.path / "memory" / "rows0.npz") as rows:
        assert len(rows["priorities"]) == 6 and {"stored", "stored_classes", "tokens"} <= set(rows.files)
        before = rows["tokens"]
    first.open().save(tmp_path / "published")
    published = following("published_next", tmp_path / "published")
    [task] = earlier.read_index(published.path)
    assert (task.name, task.data) == ("before", ()) and (published.path / "memory" / "rows0.npz").is_file()
    (tmp_path / "cache2").rename(tmp_path / "cache3")
    after = following("after", whole.path)
    with np.load(after.path / "memory" / "rows0.npz") as kept, np.load(after.path / "memory" / "rows1.npz") as new:
        assert {tuple(row) for row in kept["tokens"]} <= {tuple(row) for row in before}
        assert len(kept["priorities"]) == len(new["priorities"]) == 3


def test_distillation_needs_no_old_data(sources, tmp_path, one_device):
    run = made("text", sources, tmp_path)[0].run
    assert not continual_methods.reads_old_data(Continual(("lwf", "features", "l2", "si")))
    assert continual_methods.reads_old_data(Continual(("ewc",))) and continual_methods.reads_old_data(
        Continual(("replay",))
    )
    assert not continual_methods.reads_old_data(run.continual)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (classify.Config(labels=("a", "b")), r"replay\.source: a model can't write rows of old, .* choose lwf"),
        (sft.Config(), r"replay\.source: old answers texts of sft, which the new data have to hold.*for causal"),
    ],
)
def test_rows_that_no_model_writes_are_one_line(task, message, sources, tmp_path, one_device):
    run = made("text", sources, tmp_path)[0].run
    before = earlier.Task("old", task, 32, own_head=False)
    with pytest.raises(ValueError, match=message) as raised:
        programs.program(run, Bytes(), None, [before])
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="bound the memory by examples or tokens"):
        programs.program(dataclasses.replace(run, continual=Continual(("replay",), replay=Replay(examples=0))), Bytes())
