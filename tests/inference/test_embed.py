"""A text's vector is the same in any company, and for a published model the published one."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from support import public_weights

from jaxlm.core import config, spec
from jaxlm.data import tokenizer
from jaxlm.formats import huggingface
from jaxlm.inference import embed
from jaxlm.inference.embed import Recipe
from jaxlm.models import MODELS, bert, llama
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.runtime.mesh import make_mesh, on_mesh

V = 264  # of the bytes tokenizer
BERT = bert.Config(vocab=V, layers=2, width=16, heads=4, ffn=24, positions=70, pooler=False, head=False)
GOLDEN = Path(__file__).parents[1] / "golden"


def tiny(c=BERT, family="bert") -> tuple[Model, dict]:
    layout = Layout(execution=config.Execution(dtype="float32", scan=True))
    specs = MODELS[family].specs(c)
    return Model(MODELS[family], c, specs, layout), spec.init(specs, jax.random.key(0))


def texts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, n).tolist() for n in lengths]


def test_pooling_as_the_formulas_say():
    model, w = tiny()
    tokens = texts(5, 9)
    forward = jax.jit(model.forward)
    for ids, mean, cls, plain in zip(
        tokens,
        embed.make_embed(model)(w, tokens),
        embed.make_embed(model, pooling="cls")(w, tokens),
        embed.make_embed(model, normalize=False)(w, tokens),
        strict=True,
    ):
        given = {"tokens": np.array([ids], np.int32), "positions": np.arange(len(ids), dtype=np.int32)[None]}
        x_TD = np.asarray(forward(w, given).x_BTD)[0]
        np.testing.assert_allclose(plain, x_TD.mean(0), atol=1e-6)
        np.testing.assert_allclose(mean, x_TD.mean(0) / np.linalg.norm(x_TD.mean(0)), atol=1e-6)
        np.testing.assert_allclose(cls, x_TD[0] / np.linalg.norm(x_TD[0]), atol=1e-6)


def test_a_vector_does_not_depend_on_the_company_its_text_is_in():
    model, w = tiny()
    tokens = texts(2, 30, 17, 16, 5, 32, 20, 2, 9)
    run = embed.make_embed(model, batch=4)
    together = run(w, tokens)
    assert together.shape == (9, 16) and together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=-1), 1, atol=1e-6)
    for ids, vector in zip(tokens, together, strict=True):
        np.testing.assert_allclose(run(w, [ids])[0], vector, atol=1e-6)
    assert np.abs(together[0] - together[7]).max() > 1e-3, "other texts have other vectors"
    assert run(w, []).shape == (0, 16)


def test_new_lengths_compile_seldom():
    model, w = tiny()
    run = embed.make_embed(model, batch=4)
    run(w, texts(20, 30, 25, 32))
    with jax.no_tracing():
        run(w, texts(17, 18, 19, 31))
    lengths = {embed.length_bucket(n) for n in range(1, 513)}
    assert lengths == {16, 32, 48, 64, 96, 128, 192, 256, 384, 512}
    assert all(n <= embed.length_bucket(n) <= max(16, 1.5 * n + 14) for n in range(1, 2000))


def test_a_mesh_gives_the_same_vectors():
    model, w = tiny()
    tokens = texts(2, 30, 17, 16, 5, 20, 9)
    mesh = make_mesh(config.Mesh(fsdp=2, data=4))
    expected = embed.make_embed(model)(w, tokens)
    with on_mesh(mesh):
        spread = jax.device_put(w, model.shard.shardings(model.specs, mesh))
        np.testing.assert_allclose(embed.make_embed(model, batch=4)(spread, tokens), expected, atol=1e-6)


def test_special_tokens_stand_once_at_both_ends_and_long_texts_are_cut():
    t = tokenizer.load("bytes")
    short, long, none = embed.encode(t, [" ab\n", "x" * 99, ""], Recipe(longest=12), positions=70)
    assert short == [t.cls_id, *b"ab", t.sep_id]
    assert long == [t.cls_id, *b"x" * 10, t.sep_id]
    assert none == [t.cls_id, t.sep_id]
    assert len(embed.encode(t, ["x" * 99], Recipe(), positions=70)[0]) == 70
    assert embed.encode(t, ["AB"], Recipe(prompt="Q: ", lower=True)) == [[t.cls_id, *b"q: ab", t.sep_id]]
    with pytest.raises(ValueError, match="2 tokens leave no room"):
        embed.encode(t, ["a"], Recipe(longest=2))


def sentence_folder(folder: Path, kinds=("Transformer", "Pooling", "Normalize"), pooling="cls_token") -> Path:
    def write(name: str, values) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(values))

    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
    write("modules.json", [{"path": paths[k], "type": f"sentence_transformers.models.{k}"} for k in kinds])
    modes = dict.fromkeys(("cls_token", "mean_tokens", "max_tokens"), False) | dict.fromkeys(pooling.split("+"), True)
    write(
        "1_Pooling/config.json", {f"pooling_mode_{k}": v for k, v in modes.items()} | {"word_embedding_dimension": 16}
    )
    write("sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": True})
    write(
        "config_sentence_transformers.json", {"prompts": {"query": "query: ", "x": ""}, "default_prompt_name": "query"}
    )
    return folder


def test_recipes_of_sentence_transformers_are_read(tmp_path):
    assert embed.read_recipe(tmp_path) is None
    full = Recipe("cls", normalize=True, longest=128, prompt="query: ", lower=True)
    assert embed.read_recipe(sentence_folder(tmp_path)) == full
    found = embed.read_recipe(sentence_folder(tmp_path, ("Transformer", "Pooling"), "mean_tokens"))
    assert found is not None and (found.pooling, found.normalize) == ("mean", False)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("1_Pooling/config.json", {"include_prompt": False}, None),
        ("1_Pooling/config.json", {"include_prompt": True, "weights": [1, 2]}, "weights"),
        ("sentence_bert_config.json", {"max_seq_length": 9, "layer": 3}, "layer 3"),
        ("config_sentence_transformers.json", {"truncate_dim": 8}, "truncate_dim 8"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type 'SparseEncoder'"),
    ],
)
def test_settings_of_their_files_are_followed_or_refused(tmp_path, file, change, message):
    folder = sentence_folder(tmp_path, pooling="mean_tokens")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    if message is None:
        assert not embed.read_recipe(folder).include_prompt
        return
    with pytest.raises(ValueError, match=f"{message}.* is not known; embed with sentence-transformers"):
        embed.read_recipe(folder)


def test_a_mean_may_leave_the_prompt_out():
    model, w = tiny()
    t = tokenizer.load("bytes")
    recipe = Recipe(prompt="q: ", include_prompt=False, normalize=False)
    vectors = embed.embed_texts(model, w, t, ["abc", "de"], recipe)
    for text, vector in zip(["abc", "de"], vectors, strict=True):
        [ids] = embed.encode(t, [text], recipe)
        batch = dict(tokens=np.array([ids]), positions=np.arange(len(ids))[None], segments=np.ones((1, len(ids)), int))
        x_TD = np.asarray(model.forward(w, batch).x_BTD)[0]
        np.testing.assert_allclose(vector, x_TD[4:].mean(0), atol=1e-5)  # without <cls> and "q: "


@pytest.mark.parametrize(
    ("kinds", "pooling", "message"),
    [
        (("Transformer", "Pooling", "Dense"), "cls_token", r"modules\.json: Transformer, Pooling, Dense: only"),
        (("Transformer", "Pooling"), "max_tokens", r"1_Pooling/config\.json: pooling by max_tokens is not known"),
        (("Transformer", "Pooling"), "cls_token+mean_tokens", "pooling by cls_token and mean_tokens is not known"),
    ],
)
def test_recipes_we_cannot_follow_are_refused(tmp_path, kinds, pooling, message):
    with pytest.raises(ValueError, match=message):
        embed.read_recipe(sentence_folder(tmp_path, kinds, pooling))


def test_what_cannot_embed_says_so():
    with pytest.raises(ValueError, match="pooling 'max' is not known; choose one of mean, cls"):
        embed.make_embed(tiny()[0], pooling="max")
    c = llama.Config(vocab=V, layers=1, width=16, heads=4, kv_heads=2, head_width=4, ffn=16)
    with pytest.raises(ValueError, match="an encoder such as bert"):
        embed.make_embed(tiny(c, "llama")[0])


@pytest.fixture(scope="module")
def minilm() -> tuple[Path, Model, dict, tokenizer.Tokenizer]:
    folder = public_weights.minilm()
    family, c = huggingface.describe(folder, MODELS)
    layout, specs = Layout(execution=config.Execution(dtype="float32", scan=True)), family.specs(c)
    w = huggingface.load(folder, family, c, specs, layout.shardings(specs, None))
    return folder, Model(family, c, specs, layout), w, tokenizer.load(folder)


def test_minilm_tokens_and_vectors_equal_transformers(minilm):
    folder, model, w, t = minilm
    assert spec.count(model.specs) == 22_713_216
    golden = np.load(GOLDEN / "minilm.npz")
    ids = np.split(golden["ids"], np.cumsum(golden["lengths"])[:-1])
    recipe = embed.read_recipe(folder)
    assert recipe == Recipe("mean", normalize=True, longest=256)
    ours = embed.encode(t, golden["texts"].tolist(), recipe, model.config.positions)
    assert ours == [i.tolist() for i in ids]
    vectors = embed.embed_texts(model, w, t, golden["texts"].tolist(), recipe)
    seen = np.stack([v[i % 6 :: 6] for i, v in enumerate(vectors)])
    np.testing.assert_allclose(seen, golden["vectors"], atol=1e-5, rtol=0)


def test_minilm_knows_what_is_like_what(minilm):
    _, model, w, t = minilm
    a, b, c = embed.embed_texts(
        model, w, t, ["A man is eating food.", "A man is eating a piece of bread.", "The stock market fell."], Recipe()
    )
    assert a @ b > 0.7 and a @ c < 0.2
