"""What BERT's kin and ModernBERT have of their own; logits and files are compared in `test_published.py`."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from support.hf_rows import ROWS, draw, inputs

from jaxlm.core import config, spec, tree, weight_names
from jaxlm.core.spec import is_spec
from jaxlm.formats import huggingface
from jaxlm.models import MODELS, bert, modernbert
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.nn.rope import Rope

T = 12
TINY = bert.Config(vocab=32, layers=1, width=8, heads=2, ffn=16, positions=T, dropout=0.0)
KINDS = {  # the fields by which each differs from BERT
    "bert": {},
    "roberta": dict(offset=2, types=1, eps=1e-5),
    "xlm-roberta": dict(offset=2, types=1, eps=1e-5),
    "distilbert": dict(types=0, pooler=False),
    "mpnet": dict(types=0, offset=2, relative=True),
}
CONFIGS = {kind: dataclasses.replace(TINY, model_type=kind, **more) for kind, more in KINDS.items()}
MODERN = modernbert.Config(vocab=32, layers=4, width=8, heads=2, ffn=12, window=3)


def make_model(c) -> Model:
    family = bert if isinstance(c, bert.Config) else modernbert
    layout = Layout(execution=config.Execution(dtype="float32"))
    return Model(family, c, family.specs(c), layout)


def make_batch(rows: int = 1) -> dict:
    tokens = np.random.default_rng(0).integers(0, 32, (rows, T)).astype(np.int32)
    return dict(tokens=tokens, positions=np.broadcast_to(np.arange(T, dtype=np.int32), (rows, T)))


@pytest.mark.parametrize("kind", KINDS)
def test_positions_count_from_the_offset_and_restart_in_each_document(kind):
    """By the gradient of the position table: only the rows that positions stand for are read."""
    model = make_model(CONFIGS[kind])
    weights = spec.init(model.specs, jax.random.key(0))
    packed = make_batch() | dict(
        positions=np.array([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]], np.int32),
        segments=np.array([[1] * 5 + [2] * 3 + [3] * 4], np.int32),
    )
    pull = np.random.default_rng(1).standard_normal((1, T, 8)).astype(np.float32)
    table = jax.grad(lambda w: (model.forward(weights | {"position": w}, packed).x_BTD * pull).sum())
    used = np.abs(np.asarray(table(weights["position"]))).max(1) > 1e-6
    offset = CONFIGS[kind].offset
    assert len(used) == T + offset
    assert used.nonzero()[0].tolist() == [offset + i for i in range(5)]


def reach(c: modernbert.Config) -> np.ndarray:
    """[T, T]: whether the output at each position depends on the token at each position."""
    model = make_model(c)
    weights, batch = spec.init(model.specs, jax.random.key(0)), make_batch()
    embedded, own = weights["embed"][batch["tokens"][0]], np.arange(T, dtype=np.int32)[None]

    def run(x_TD):
        return model.forward(weights | {"embed": x_TD}, batch | {"tokens": own}).x_BTD[0]

    return np.abs(np.asarray(jax.jit(jax.jacrev(run))(embedded))).max((1, 3)) > 1e-9


def test_local_layers_see_so_far_and_global_ones_everything():
    distance = np.abs(np.arange(T)[:, None] - np.arange(T)[None])
    near = dataclasses.replace(MODERN, layers=2, windowed=(True,))
    np.testing.assert_array_equal(reach(near), distance <= 4)  # two layers, two positions each
    assert reach(dataclasses.replace(near, windowed=(True, False))).all()
    assert reach(dataclasses.replace(near, windowed=(False, True))).all()


def test_the_rope_of_each_kind_of_layer_is_its_own():
    def output(**ropes):
        model = make_model(dataclasses.replace(MODERN, **ropes))
        weights = jax.tree.map(lambda w: 3 * w, spec.init(model.specs, jax.random.key(0)))
        return np.asarray(model.forward(weights, make_batch()).x_BTD)

    first, other = output(), Rope(theta=50.0)
    assert np.abs(output(rope=other) - first).max() > 1e-4
    assert np.abs(output(rope_local=other) - first).max() > 1e-4


def test_layers_of_a_file_are_ours_one_by_one():
    """The first layer stands alone, and the stack goes on from the second."""
    specs = modernbert.specs(MODERN)
    found = weight_names.tensors(modernbert.names(MODERN), specs)
    assert "model.layers.0.attn_norm.weight" not in found
    assert [found[f"model.layers.{i}.attn_norm.weight"].parts[0].index for i in (1, 2, 3)] == [(0,), (1,), (2,)]
    assert [p.path for p in found["model.layers.0.mlp.Wi.weight"].parts] == ["first/gate", "first/up"]
    assert sum(np.prod(t.shape) for t in found.values()) == spec.count(specs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [{}, {"head": False}, {"pooler": False}, {"head": False, "pooler": False}])
def test_what_config_json_says_comes_back(kind, parts):
    c = dataclasses.replace(CONFIGS[kind], **parts)
    assert bert.from_hf(bert.to_hf(c)) == c
    prefixed = [
        name for name in weight_names.tensors(bert.names(c), bert.specs(c)) if name.endswith("word_embeddings.weight")
    ]
    stem = "roberta" if kind == "xlm-roberta" else kind
    assert prefixed == [f"{stem}.embeddings.word_embeddings.weight" if c.head else "embeddings.word_embeddings.weight"]


@pytest.mark.parametrize(
    ("architectures", "present"),
    [
        (["BertModel"], {"pooler"}),
        (None, {"pooler"}),
        (["BertForMaskedLM"], {"transform"}),
        (["BertForPreTraining"], {"pooler", "transform", "next_sentence"}),
    ],
)
def test_architectures_decide_which_heads_exist(architectures, present):
    c = dataclasses.replace(TINY, next_sentence=True)  # whose config.json needs no word on the pooler
    c = bert.from_hf(bert.to_hf(c) | {"architectures": architectures})
    assert present == {"pooler", "transform", "next_sentence"} & bert.specs(c).keys()


def test_early_and_late_configurations_of_modernbert_say_the_same():
    late = modernbert.to_hf(dataclasses.replace(MODERN, rope=Rope(theta=777.0)))
    early = {k: v for k, v in late.items() if k not in ("rope_parameters", "layer_types")}
    early |= dict(global_rope_theta=777.0, local_rope_theta=1e4, global_attn_every_n_layers=3)
    expected = dataclasses.replace(MODERN, rope=Rope(theta=777.0))
    for values in (late, early):
        found = modernbert.from_hf(values)
        kinds = [found.windowed[i % len(found.windowed)] for i in range(4)]
        assert kinds == [False, True, True, False]
        assert dataclasses.replace(found, windowed=MODERN.windowed) == expected


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (bert, {"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' of bert"),
        (bert, {"is_decoder": True}, "is_decoder True of bert is not supported, only False"),
        (bert, {"tie_word_embeddings": False}, "tie_word_embeddings False"),
        (bert, {"hidden_act": "mish"}, "'mish' of bert is unknown"),
        (modernbert, {"classifier_activation": "mish"}, "classifier_activation 'mish' of modernbert is unknown"),
    ],
)
def test_files_that_compute_something_else_are_refused(family, change, message):
    c = TINY if family is bert else MODERN
    with pytest.raises(ValueError, match=message):
        family.from_hf(family.to_hf(c) | change)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("bert", {"types": 0}, r"model\.types: 0 isn't in 'bert' files"),
        ("roberta", {"offset": 0}, r"model\.offset"),
        ("mpnet", {"relative": False}, r"model\.relative"),
        ("distilbert", {"pooler": True}, r"model\.pooler"),
        ("distilbert", {"eps": 1e-5}, r"model\.eps"),
        ("roberta", {"next_sentence": True}, r"model\.next_sentence"),
    ],
)
def test_models_that_no_file_can_express_are_not_written(kind, change, message):
    with pytest.raises(ValueError, match=message):
        bert.to_hf(dataclasses.replace(CONFIGS[kind], **change))


def test_a_model_without_a_head_says_so():
    for c in (dataclasses.replace(TINY, head=False), dataclasses.replace(MODERN, head=False)):
        model = make_model(c)
        with pytest.raises(ValueError, match=r"model\.head"):
            model.readout({}, jnp.zeros((1, T, 8)))
    with pytest.raises(ValueError, match=r"model\.pooler"):
        make_model(dataclasses.replace(TINY, pooler=False)).pooled({}, jnp.zeros((1, T, 8)))
    with pytest.raises(ValueError, match=r"model\.layers: 1 is too few"):
        modernbert.specs(dataclasses.replace(MODERN, layers=1))


def published_files(folder, c, change=lambda files: files) -> bert.Config:
    """Write a model's files, changed, and load them; returns the Config that was found."""
    specs = bert.specs(c)
    files = {key: draw(key, tensor.shape) for key, tensor in weight_names.tensors(bert.names(c), specs).items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(bert.to_hf(c)))
    safetensors.numpy.save_file(change(files), folder / "model.safetensors", metadata={"format": "pt"})
    family, found = huggingface.describe(folder, MODELS)
    specs = family.specs(found)
    weights = huggingface.load(folder, family, found, specs, Layout().shardings(specs, None))
    embedding = next(w for key, w in files.items() if key.endswith("word_embeddings.weight"))
    np.testing.assert_array_equal(weights["embed"], embedding.astype(np.float32))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_files_may_hold_the_head_twice_but_not_two_heads(tmp_path, kind):
    c = dataclasses.replace(CONFIGS[kind], pooler=False)
    entries = bert.names(c)
    head, bias = entries["head"].file, entries["head_bias"].file

    def twice(files):
        more = {} if kind == "distilbert" else {head.replace("weight", "bias"): files[bias].copy()}
        return files | more | {head: files[entries["embed"].file].copy()}

    assert published_files(tmp_path / "twice", c, twice) == c
    with pytest.raises(ValueError, match=r"though config\.json ties them"):
        published_files(tmp_path / "two", c, lambda files: twice(files) | {head: -files[entries["embed"].file]})


def test_early_files_of_bert_are_read(tmp_path):
    """TensorFlow's names of norms, a buffer, and heads of BertForPreTraining under the name of BertForMaskedLM."""
    c = dataclasses.replace(TINY, pooler=False)
    more = {"bert.pooler.dense.weight": (8, 8), "bert.pooler.dense.bias": (8,)}
    more |= {"cls.seq_relationship.weight": (2, 8), "cls.seq_relationship.bias": (2,)}

    def early(files):
        old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): w
               for k, w in files.items()}  # fmt: skip
        assert old.keys() != files.keys()
        old["bert.embeddings.position_ids"] = np.arange(T)[None]
        return old | {key: draw(key, shape) for key, shape in more.items()}

    assert published_files(tmp_path / "early", c, early) == dataclasses.replace(c, pooler=True, next_sentence=True)


@pytest.mark.parametrize("kind", KINDS)
def test_files_decide_over_what_config_json_calls_them(tmp_path, kind):
    """Sentence encoders often bear the name of the masked-LM class that they were made from."""
    c = dataclasses.replace(CONFIGS[kind], head=False)

    def as_masked(files):
        path, other = tmp_path / "bare" / "config.json", {"architectures": [f"{bert.STEMS[kind]}ForMaskedLM"]}
        path.write_text(json.dumps(json.loads(path.read_text()) | other))
        return files

    assert published_files(tmp_path / "bare", c, as_masked) == c
    stem = "roberta." if kind == "xlm-roberta" else f"{kind}."
    assert published_files(tmp_path / "whole", c, lambda files: {stem + k: w for k, w in files.items()}) == c
    with pytest.raises(ValueError, match=r"1 tensor is not this model's \(qa_outputs.weight\)"):
        published_files(tmp_path / "task", c, lambda files: files | {"qa_outputs.weight": np.zeros((2, 8), np.float16)})


@pytest.mark.parametrize("name", ["bert", "roberta_bare", "xlm_roberta_bare", "mpnet_bare"])
def test_pooled_states_equal_transformers(name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing is compared live")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing is compared live")
    row = ROWS[name]
    cls = getattr(transformers, row.model)
    theirs = cls(cls.config_class(**row.config, attn_implementation="eager")).eval()
    for key, w in theirs.state_dict(keep_vars=True).items():
        w.data = torch.from_numpy(draw(key, tuple(w.shape)).astype(np.float32))
    theirs.tie_weights()
    c = bert.from_hf(theirs.config.to_dict() | {"architectures": [row.model]})
    model = make_model(c)
    flat = {path: np.zeros(s.shape, np.float32) for path, s in tree.flatten(model.specs, is_spec).items()}
    state = {key: w.numpy() for key, w in theirs.state_dict().items()}
    for key, tensor in weight_names.tensors(bert.names(c), model.specs).items():
        for part, w in zip(tensor.parts, tensor.split(state[key]), strict=True):
            flat[part.path][part.index] = w
    weights = tree.map_named(lambda path, _: flat[path], model.specs)
    given = inputs(row.inputs)
    batch = make_batch(2) | dict(tokens=given["input_ids"], segments=given["attention_mask"])
    batch |= {"types": given["token_type_ids"]} if "token_type_ids" in given else {}
    pooled = model.pooled(weights, model.forward(weights, batch).x_BTD)
    with torch.no_grad():
        out = theirs(**{k: torch.from_numpy(v).long() for k, v in given.items()})
    if name == "bert":
        pooled = pooled @ weights["next_sentence"] + weights["next_sentence_bias"][None]
    expected = out["seq_relationship_logits" if name == "bert" else "pooler_output"].numpy()
    np.testing.assert_allclose(pooled, expected, atol=1e-5)
