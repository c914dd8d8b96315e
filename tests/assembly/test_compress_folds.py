"""AWQ and SmoothQuant divide norms and matrices instead of inputs: where that is exact, and what comes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import tiny_published
from support.killed_compressions import killed_in_layer
from support.tiny_models import random_weights

from jaxlm.assembly import compress, compress_folds, convert
from jaxlm.assembly.compress_folds import Fold, multiplied_rows
from jaxlm.assembly.layer_walk import LayerWalk
from jaxlm.assembly.open_model import open_model
from jaxlm.core import config, tree
from jaxlm.core.compress_request import Calibration, Comparison, Settings
from jaxlm.models import MODELS, llama
from jaxlm.nn import moe
from jaxlm.nn.layout import Layout
from jaxlm.weights.few_bits import Int4, Scaled
from jaxlm.weights.matrices import matrices

SMALL = dict(vocab=40, layers=2, width=16, heads=2)
DECODER = dict(kv_heads=2, head_width=8, ffn=24)
QKV, GATED = ("k", "q", "v"), ("gate", "up")
LLAMA = {("norm1", QKV), ("norm2", GATED), ("up", ("down",)), ("v", ("o",))}
FOLDS = {
    "llama": ("llama", DECODER, {"blocks": LLAMA}),
    "llama_grouped": ("llama", DECODER | dict(kv_heads=1, window=4, windowed=(True, False)),
                      {"blocks": LLAMA - {("v", ("o",))}}),
    "gemma": ("gemma", DECODER, {"blocks": LLAMA}),
    "gpt2": ("gpt2", dict(positions=32), {"blocks": {("norm1", QKV), ("norm2", ("up",)), ("v", ("o",))}}),
    "bert": ("bert", dict(ffn=24, positions=32), {"blocks": {("v", ("o",))}}),
    "mixtral": ("mixtral", DECODER | dict(model_type="qwen3_moe", qk_norm=True,
                                          moe=moe.Moe(experts=4, top_k=2, ffn=12)),
                {"blocks": {("norm1", QKV), ("v", ("o",))}}),
    "t5": ("t5", dict(head_width=8, ffn=24),
           {"encoder/blocks": LLAMA,
            "decoder/blocks": LLAMA | {("norm_cross", ("cross_q",)), ("cross_v", ("cross_o",))}}),
}  # fmt: skip


def walk_of(name: str):
    family, more, _ = FOLDS[name]
    family = MODELS[family]
    c = family.Config(**SMALL | more)
    weights = jax.device_put(random_weights(family.specs(c)))
    rng = np.random.default_rng(0)
    ids = lambda: jnp.asarray(rng.integers(0, 40, (2, 12)), jnp.int32)  # noqa: E731
    rows = dict(segments=jnp.asarray([[1] * 12, [1] * 7 + [0] * 5], jnp.int32))
    rows["positions"] = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
    batch = dict(tokens=ids(), **rows)
    if family.kind == "encoder_decoder":
        batch |= dict(source=ids(), **{f"source_{n}": x for n, x in rows.items()})
    return LayerWalk(family, c, weights, [batch], Layout(execution=config.Execution(dtype="float32"))), weights


def folds_of(walk: LayerWalk) -> dict[str, tuple[Fold, ...]]:
    found = {}
    for stack in walk.stacks:
        prefix = f"{stack.path}/"
        every = matrices(walk.family, walk.c).items()
        own = {path.removeprefix(prefix): m for path, m in every if path.startswith(prefix)}
        found[stack.path] = compress_folds.find(walk, stack, own, walk.shard, None)
    return found


@pytest.mark.parametrize(
    "name",
    [
        "llama_grouped",
        "gemma",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "gpt2", "bert", "mixtral", "t5")),
    ],
)
def test_what_is_divided_leaves_the_states_as_they_were(one_device, name):
    walk, weights = walk_of(name)
    found, rng, changed = folds_of(walk), np.random.default_rng(5), weights
    own = matrices(walk.family, walk.c)
    for stack in walk.stacks:
        folds, layers = found[stack.path], []
        assert {(f.source, f.readers) for f in folds} == FOLDS[name][2][stack.path]
        assert {f.offset for f in folds if f.source.startswith("norm")} <= {1.0 if name == "gemma" else 0.0}
        for i in range(stack.layers):
            layer = jax.tree.map(lambda w, i=i: w[i], tree.at(weights, stack.path))
            for fold in folds:
                width = int(np.prod(own[f"{stack.path}/{fold.readers[0]}"].in_shape))
                by = jnp.asarray(rng.uniform(0.3, 3, width), jnp.float32)
                layer = fold.divided(layer, by)
                for path in fold.readers:
                    layer = tree.put(layer, path, multiplied_rows(tree.at(layer, path), by))
            layers.append(layer)
        changed = tree.put(changed, stack.path, jax.tree.map(lambda *x: jnp.stack(x), *layers))
    forward = jax.jit(lambda w: walk.family.forward(walk.c, walk.specs, w, walk.batches[0], shard=walk.shard).x_BTD)
    np.testing.assert_allclose(forward(changed), forward(weights), atol=2e-5)


C = llama.Config(vocab=tiny_published.VOCAB, layers=2, width=32, ffn=64, heads=2, kv_heads=1, head_width=32,
                 positions=64)  # fmt: skip
SIZES = Comparison(compare="sizes")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model one channel of whose states is far larger than the others, as AWQ is made for."""
    folder = tiny_published.directory(tmp_path_factory.mktemp("folds") / "plain", C)
    weights = load_file(folder / "model.safetensors")
    for name, w in weights.items():
        if name.endswith("layernorm.weight"):
            w[3] *= 20
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder.parent / "text.txt").write_text(f"{tiny_published.TEXT}\n" * 40)
    return folder


def made(plain, out: str, method: str = "awq", **more) -> compress.Compressed:
    group = {} if method == "smooth" else dict(group=32)
    c = Calibration((str(plain.parent / "text.txt"),), rows=4, length=32, batch_size=4)
    return compress.compress(plain, plain.parent / out, Settings(method, **group | more), c, SIZES)


def test_awq_leaves_plain_int4_that_its_own_files_hold(one_device, plain, tmp_path):
    small = made(plain, "awq")
    assert set(small.record["stored"].values()) == {"int4:32"}
    p = open_model(small.folder)
    blocks = p.model.bound(p.params)["blocks"]
    assert all(isinstance(blocks[n], Int4) for n in ("q", "k", "v", "o", "gate", "up", "down"))
    by_source: dict = {}
    for w in small.record["weights"]:
        by_source.setdefault((w["layer"], w["divides"]), []).append(w)
    assert {source for _, source in by_source} == {"blocks/norm1", "blocks/norm2", "blocks/up", None}
    for (_, source), group in by_source.items():
        error, nearest = (sum(w[n] for w in group) for n in ("error", "plain_error"))
        assert error < nearest * (0.7 if source in ("blocks/norm1", "blocks/norm2") else 1 + 1e-5)
    assert [w["weight"] for w in small.record["weights"] if w["divides"] is None] == ["blocks/o"] * 2
    _, record = convert.export(small.folder, tmp_path / "files", format="awq")
    assert record["relative_difference"] < 1e-5
    np.testing.assert_allclose(convert.logits(open_model(tmp_path / "files")), convert.logits(p), atol=1e-4)


def test_a_compression_with_divided_norms_goes_on_to_the_same_weights(one_device, plain):
    settings = dict(skip=("blocks/(v|gate|down)",), ratios=4)
    whole = made(plain, "whole", **settings)
    with killed_in_layer(1):
        made(plain, "again", **settings)
    again = made(plain, "again", **settings)
    before, *after = (tree.flatten(open_model(x).params) for x in (plain, whole.folder, again.folder))
    for path, w in after[0].items():
        np.testing.assert_array_equal(w, after[1][path], err_msg=path)
    # What is left out stays plain, and its rows follow the norm that it shares with what is not.
    for path, norm in {"blocks/v": "blocks/norm1", "blocks/gate": "blocks/norm2"}.items():
        assert after[0][path].dtype == jnp.float32
        factors = before[norm] / after[0][norm]
        assert (np.abs(factors - 1) > 0.1).any()
        np.testing.assert_allclose(
            after[0][path].reshape(2, 32, -1), before[path].reshape(2, 32, -1) * factors[..., None], rtol=1e-5
        )
    np.testing.assert_array_equal(after[0]["blocks/down"], before["blocks/down"])


@pytest.mark.slow
def test_smoothquant_divides_norms_and_a_vector_of_their_own_is_asked_for(one_device, plain, tmp_path):
    small = made(plain, "smooth", "smooth")
    assert set(small.record["stored"].values()) == {"int8"}
    _, record = convert.export(small.folder, tmp_path / "files", format="compressed-tensors")
    assert record["relative_difference"] < 1e-5
    own = made(plain, "own", "smooth", own_scales=True)
    assert {path for path, form in own.record["stored"].items() if form == "int8:scaled"} == {"blocks/o"}
    assert isinstance(open_model(own.folder).model.bound(open_model(own.folder).params)["blocks"]["o"], Scaled)
    with pytest.raises(ValueError, match=r"blocks/o: multiplies its inputs by a vector first.*without own_scales"):
        convert.export(own.folder, tmp_path / "refused", format="compressed-tensors")


def test_a_model_that_nothing_can_be_divided_in_is_refused(one_device, plain):
    with pytest.raises(ValueError, match=r"method: nothing in .* can take the factors of awq; .*`own_scales`"):
        made(plain, "none", skip=("blocks/[^o]",))
    assert not (plain.parent / "none.part").exists()
