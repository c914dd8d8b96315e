"""LoRA on the table of embeddings and on the head, tied or not. What PEFT makes of them: `formats/test_peft.py`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from support.adapted_models import batch_of, make
from support.tiny_models import published, random_weights

from jaxlm.assembly import convert
from jaxlm.commands import cli
from jaxlm.core import config, tree
from jaxlm.models.model import Model
from jaxlm.nn import layers, losses
from jaxlm.runtime.mesh import NamedSharding, make_mesh, on_mesh
from jaxlm.weights import adapters
from jaxlm.weights.adapters import per_row

BOTH = adapters.Lora(rank=3, targets=("embed", "head"))


def loss(model, weights, batch):
    """Through the loss that holds no logits, whose gradient of a head is cut over devices; of a model without blocks,
    which take long to compile."""
    trainable, frozen = tree.partition(weights, model.adapter.trainable)

    def mean(p):
        w = tree.merge(p, frozen)
        r = model.readout(w, layers.embed(model.bound(w)["embed"], batch["tokens"], model.shard))
        ones = jnp.ones(batch["tokens"].shape)
        return losses.cross_entropy(r, jnp.roll(batch["tokens"], -1, 1), ones, shard=model.shard).loss

    return jax.value_and_grad(mean)(trainable)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])  # tied, and not
def test_a_mesh_gives_the_same_as_one_device_and_both_updates_learn(name):
    model = make(name, BOTH)
    weights = jax.device_put(random_weights(model.adapter.specs()))
    batch = batch_of(name)
    expected = jax.jit(lambda w: loss(model, w, batch))(weights)
    assert {path: float(jnp.abs(g).max()) > 1e-3 for path, g in tree.flatten(expected[1]).items()} == {
        f"adapter/{part}/{n}": True for part in ("embed", "head") for n in "ab"
    }
    mesh = config.Mesh(data=2, fsdp=2, tensor=2)
    there, made = make(name, BOTH, mesh), make_mesh(mesh)
    with on_mesh(made):
        placed = jax.device_put(weights, there.shard.shardings(model.adapter.specs(), made))
        rows = jax.device_put(batch, NamedSharding(made, there.shard.spec(("batch", None))))
        got = jax.jit(lambda w, b: loss(there, w, b))(placed, rows)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-4), jax.device_get(got[1]), expected[1])


@pytest.mark.parametrize("targets", [("embed",), ("head",), ("embed", "head")])
def test_merged_a_tied_head_is_its_own_and_does_the_same(targets):
    model = make("gpt2", adapters.Lora(rank=3, targets=targets))
    weights, ids = jax.device_put(random_weights(model.adapter.specs())), batch_of("gpt2")["tokens"]
    merged, c = model.adapter.merged(weights), model.adapter.merged_config
    assert not c.tied and merged.keys() == model.family.specs(c).keys()
    plain = Model(model.family, c, model.family.specs(c), model.shard)

    def states_and_logits(m, w):
        x_BTD = layers.embed(m.bound(w)["embed"], ids, m.shard)
        return x_BTD, losses.logits(m.readout(w, x_BTD), m.shard)

    for got, expected in zip(states_and_logits(plain, merged), states_and_logits(model, weights), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_trains_them_and_its_export_has_a_head_of_its_own(tmp_path, capsys):
    published(tmp_path / "base", tied=True, positions=256)
    (tmp_path / "text.txt").write_text("\n".join(f"the {i}th line of a text" for i in range(300)))
    assert cli.main([
        "train", "quickstart", "--start", str(tmp_path / "base"), "--name", "r", "--out", str(tmp_path / "runs"),
        "--data.train", str(tmp_path / "text.txt"), "--data.cache", str(tmp_path / "cache"), "--adapter", "lora",
        "--adapter.targets", "embed", "head", "--train.steps", "3", "--train.batch-size", "4", "--train.seq-len", "16",
        "--train.eval-every", "0", "--optim.lr", "0.1", "--optim.warmup", "0", "--execution.dtype", "float32",
    ]) == 0  # fmt: skip
    run = tmp_path / "runs" / "r"
    assert "lora on embed head:" in capsys.readouterr().out
    convert.export(str(run), tmp_path / "merged")  # compares logits before and after
    written = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    tables = {name: x for name, x in written.items() if "embed" in name or "head" in name}
    assert len(tables) == 2 and not np.array_equal(*tables.values())
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    convert.export(str(run), tmp_path / "adapter", format="peft")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"] == [
        "embed_tokens", "lm_head",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "c", "says"), [
    ("llama", adapters.Dora(rank=2, targets=("head",)), "adapter.targets: head: dora can't be put on it in this model"),
    ("bert", adapters.Lora(rank=2, targets=("q$", "embed")), "adapter.targets: embed: lora can't be put on it in this"),
    ("t5", adapters.Lora(rank=2, targets=("^head$",)), "adapter.targets: head: lora can't be put on it in this model"),
])  # fmt: skip
def test_where_they_can_not_be_targets(name, c, says):
    with pytest.raises(ValueError, match=says):
        make(name, c).adapter.specs()


def test_they_are_no_adapters_of_single_rows():
    a = make("llama", BOTH).adapter
    with pytest.raises(ValueError, match="lora on embed and head can't be mixed with others in a batch"):
        per_row.mix([(a, {})], [0], a.disabled)
    assert not make("llama", adapters.Lora(targets=("all",))).adapter.tables
