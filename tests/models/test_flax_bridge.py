"""Flax modules of a user's own, linen and nnx: the same losses as in a loop of their own, on one device and on many."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.flax_decoders import Config, D, LinenLm, NnxLm, Plain, V

from jaxlm.assembly import program
from jaxlm.core import registry, spec, tree
from jaxlm.core.config import Execution, Mesh, Optim, Run, Train
from jaxlm.data.tokenizer import Bytes
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling
from jaxlm.models import MODELS
from jaxlm.models.flax_bridge import from_linen, from_nnx
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.family import ModelConfig
from jaxlm.nn.layout import Layout
from jaxlm.objectives import causal, classify, masked
from jaxlm.runtime import mesh
from jaxlm.weights.adapters import METHODS, adapted

T, B, STEPS = 16, 8, 3
EXECUTION = Execution(dtype="float32")


def make_linen(c, dtype):
    return LinenLm(c, dtype)


@dataclass(frozen=True)
class LinenConfig(Config):
    pass


@dataclass(frozen=True)
class NnxConfig(Config):
    pass


LINEN, NNX = from_linen(make_linen, LinenConfig), from_nnx(NnxLm, NnxConfig)
FAMILIES = {"linen": LINEN, "nnx": NNX}
OPTIM = Optim(lr=1e-2, schedule="constant", warmup=0)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Puts both into the table of models, as a package of one's own would."""
    for name, family in FAMILIES.items():
        registry.register(family.Config, name)
        MODELS._rows[name] = family
    yield
    for name in FAMILIES:
        del MODELS._rows[name]


def packed(rows: int = B, first: int = 1) -> dict[str, np.ndarray]:
    """Two documents a row, then padding."""
    rng = np.random.default_rng(0)
    segments = np.tile(np.repeat(np.array([1, 2, 0], np.int32), (7, 6, 3)), (rows, 1))
    positions = np.tile(np.concatenate([np.arange(7), np.arange(6), np.zeros(3, int)]).astype(np.int32), (rows, 1))
    tokens = rng.integers(first, V, (rows, T)).astype(np.int32)
    weights = (segments == np.roll(segments, -1, 1)) & (segments > 0)
    targets = np.roll(tokens, -1, 1)
    return dict(tokens=tokens, targets=targets, weights=weights.astype(np.float32), segments=segments,
                positions=positions)  # fmt: skip


def model_of(family, c=None, **execution) -> Model:
    c = c or family.Config()
    return Model(family, c, family.specs(c), Layout(execution=dataclasses.replace(EXECUTION, **execution)))


def states(m: Model, params: Any, batch: Any) -> jax.Array:
    return jax.jit(lambda p, b: m.forward(p, b).x_BTD)(params, batch)


def logits(m: Model, params: Any, batch: Any) -> jax.Array:
    return jax.jit(lambda p, b: losses.logits(m.readout(p, m.forward(p, b).x_BTD), m.shard))(params, batch)


def fresh(m: Model, seed: int = 0, scale: float = 1.0) -> Any:
    return jax.jit(lambda key: jax.tree.map(lambda w: scale * w, spec.init(m.specs, key)))(jax.random.key(seed))


def own_logits(kind: str, c: Any, params: Any, batch: Any, key: Any = None) -> jax.Array:
    """The module called as its own user would."""
    if kind == "linen":
        return LinenLm(c, jnp.float32).apply(
            {"params": params}, batch["tokens"], batch["positions"], batch["segments"], deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
        )  # fmt: skip
    with nnx.use_eager_sharding(False):
        module = NnxLm(c, rngs=nnx.Rngs(key if key is not None else 0), dtype=jnp.float32)
    flat = tree.flatten(params)
    for path, v in nnx.to_flat_state(nnx.variables(module, nnx.Param)):
        v.set_value(flat["/".join(map(str, path))])
    module.train() if key is not None else module.eval()
    return module(batch["tokens"], batch["positions"], batch["segments"])


def own_loss(kind, c, params, batch, key=None):
    each = optax.softmax_cross_entropy_with_integer_labels(own_logits(kind, c, params, batch, key), batch["targets"])
    return (each * batch["weights"]).sum() / batch["weights"].sum()


def own_loop(kind: str, c: Any, params: Any, batch: dict, steps: int) -> list[float]:
    """Trains with optax as a user's own script does; the dropout keys are those of our step."""
    matrix = tree.map_named(lambda path, w: w.ndim > 1 and not path.endswith("bias"), params)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, 0.9, 0.95, weight_decay=0.1, mask=matrix))
    state, out = tx.init(params), []

    @jax.jit
    def step(params, state, key):
        loss, grads = jax.value_and_grad(lambda p: own_loss(kind, c, p, batch, key))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for i in range(steps):
        (key,) = jax.random.split(jax.random.fold_in(jax.random.key(0), i), 1)
        params, state, loss = step(params, state, key)
        out.append(float(loss))
    return out


def trained(family: Any, m: Mesh, devices: list) -> tuple[list[float], Any, program.Program]:
    run = Run("flax", family.Config(), causal.Config(), optim=OPTIM, mesh=m, execution=EXECUTION,
              train=Train(steps=STEPS, batch_size=B, seq_len=T))  # fmt: skip
    with mesh.on_devices(devices):
        p = program.program(run, Bytes())
        with mesh.on_mesh(p.mesh):
            state, losses = p.init(), []
            first = jax.device_get(state.params)
            batch = p.to_device({name: x[None] for name, x in packed().items()}, None)
            step = p.train_step()
            for _ in range(STEPS):
                state, metrics = step(state, batch)
                losses.append(float(metrics["loss"]))
    return losses, first, p


@functools.cache
def own(kind: str) -> tuple[Any, list[float]]:
    """The first weights, which are the same on every mesh, and the losses of the module's own loop."""
    m = model_of(FAMILIES[kind])
    first = jax.device_get(fresh(m))
    return first, own_loop(kind, m.config, first, packed(), STEPS)


@pytest.mark.parametrize(
    ("kind", "devices"),
    [
        ("linen", 1),
        ("nnx", 8),
        pytest.param("linen", 8, marks=pytest.mark.slow),
        pytest.param("nnx", 1, marks=pytest.mark.slow),
    ],
)
def test_it_trains_as_in_its_own_loop_on_one_device_and_on_a_mesh(kind, devices):
    m = Mesh(data=2, fsdp=2, tensor=2) if devices == 8 else Mesh()
    losses, first, p = trained(FAMILIES[kind], m, jax.devices()[:devices])
    expected_first, expected = own(kind)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), first, expected_first)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < losses[0]
    assert "attention" not in p.notes and p.choices.attention is None, "the module attends, and no run's choice"
    assert "as LinenLm is written" in p.notes["layers"] or "as NnxLm is written" in p.notes["layers"]
    assert p.notes["precision"] == "float32 compute"
    if devices == 8:
        shardings = tree.flatten(p.state_shardings.params)
        up = "up_0/kernel" if kind == "linen" else "up/0/kernel"
        assert shardings[up].spec == jax.P("fsdp", "tensor") and shardings["head/kernel"].spec == jax.P(
            "fsdp", "tensor"
        )
        assert shardings["place/embedding"].spec == jax.P(None, "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_logits_and_gradients_are_the_module_s_own(kind):
    """With a head that is the embedding, a scale and a softcap; the other head is trained above."""
    family = FAMILIES[kind]
    c = family.Config(tied=True, cap=2.0)
    m, batch = model_of(family, c), packed(2)

    def ours(params):
        sums = causal.loss(causal.Config(), m, params, batch, None)["tokens"]
        out = losses.logits(m.readout(params, m.forward(params, batch).x_BTD), m.shard)
        return sums["loss"] / batch["weights"].sum(), out

    params = fresh(m, 1, 2.0)
    (loss, z), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    expected, own_grads = jax.jit(jax.value_and_grad(lambda p: own_loss(kind, c, p, batch)))(params)
    own = jax.jit(lambda p: own_logits(kind, c, p, batch))(params)
    np.testing.assert_allclose(z, own, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, own_grads)


def test_weights_are_drawn_by_the_module_s_own_initializers():
    c, key = LinenConfig(), jax.random.key(3)
    flat = tree.flatten(LINEN.specs(c), spec.is_spec)
    ours = jax.jit(lambda key: {path: s.init(key, s.shape) for path, s in flat.items()})(key)
    tokens = jnp.zeros((2, 8), jnp.int32)
    own = jax.jit(lambda key: nn.unbox(LinenLm(c, jnp.float32).init(key, tokens))["params"])(key)
    for path, w in tree.flatten(own).items():
        np.testing.assert_allclose(ours[path], w, rtol=1e-6, err_msg=path)
    up, deeper = (LINEN.specs(LinenConfig(layers=n))["up_0"]["kernel"] for n in (1, 2))
    np.testing.assert_array_equal(up.init(key, up.shape), deeper.init(key, up.shape))  # whatever else there is
    up = NNX.specs(NnxConfig())["up"]["0"]["kernel"]
    np.testing.assert_allclose(np.std(up.init(key, up.shape)), D**-0.5, rtol=0.2)


def test_make_is_given_the_compute_dtype():
    for family in FAMILIES.values():
        m = model_of(family, dtype="bfloat16")
        shapes = spec.abstract(m.specs)
        assert jax.eval_shape(lambda p, m=m: m.forward(p, packed(1)).x_BTD, shapes).dtype == jnp.bfloat16
        assert all(w.dtype == jnp.float32 for w in jax.tree.leaves(shapes))


def test_specs_say_what_the_module_says():
    flat = tree.flatten(LINEN.specs(LinenConfig()), spec.is_spec)
    roles = {path: s.role for path, s in flat.items()}
    assert roles["embed/embedding"] == roles["place/embedding"] == "table" and roles["head/kernel"] == "head"
    assert roles["norm1_0/scale"] == "norm" and roles["norm1_0/bias"] == "norm_bias" and roles["up_0/bias"] == "bias"
    assert roles["up_0/kernel"] == roles["attention_0/query/kernel"] == "matrix"
    assert flat["attention_0/query/kernel"].axes == ("embed", "heads", None)
    assert flat["up_0/kernel"].axes == ("embed", "ffn") and flat["norm/scale"].axes == (None,)
    assert flat["embed/embedding"].axes == ("vocab", "embed") and flat["embed/embedding"].below_layers
    tied = tree.flatten(LINEN.specs(LinenConfig(tied=True)), spec.is_spec)
    assert "head/kernel" not in tied and tied["embed/embedding"].role == "table"
    nnx_flat = tree.flatten(NNX.specs(NnxConfig()), spec.is_spec)
    assert nnx_flat["down/0/kernel"].axes == ("ffn", "embed") and nnx_flat["head/bias"].axes == (None,)
    assert nnx_flat["attention/0/query/kernel"].axes == ("embed", None, None)  # no metadata: 16 is cut, not 2 or 8
    renamed = from_linen(make_linen, LinenConfig, axes={"mlp": None, "embed": "ffn"}, roles={"place": "matrix"})
    s = tree.flatten(renamed.specs(LinenConfig()), spec.is_spec)
    assert s["up_0/kernel"].axes == ("ffn", None) and s["place/embedding"].role == "matrix"


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "nnx" else pytest.mark.slow) for k in FAMILIES])
def test_packed_is_alone_and_decoding_reads_rows_from_their_first_token(kind):
    m = model_of(FAMILIES[kind])
    params = fresh(m, 1, 2.0)
    batch = packed(1)
    x = states(m, params, batch)
    for start, stop in ((0, 7), (7, 13)):
        part = {name: a[:, start:stop] for name, a in batch.items()}
        np.testing.assert_allclose(states(m, params, part), x[:, start:stop], rtol=1e-5, atol=1e-6)
    if kind == "linen":
        assert_greedy(m, params, [[5, 6, 7], [9, 8, 7, 6, 5]])


def assert_greedy(m: Model, params: Any, prompts: list[list[int]]) -> None:
    """Generation chooses what a full forward pass over each text by itself finds likeliest."""
    made = Generator(m)(params, prompts, Sampling(tokens=3, temperature=0.0))
    texts = [[*prompt, *completion.tokens] for prompt, (completion,) in zip(prompts, made, strict=True)]
    tokens = np.array([text + [0] * (10 - len(text)) for text in texts], np.int32)
    segments = np.array([[1] * len(text) + [0] * (10 - len(text)) for text in texts], np.int32)
    positions = np.tile(np.arange(10, dtype=np.int32), (len(texts), 1))
    best = logits(m, params, dict(tokens=tokens, segments=segments, positions=positions)).argmax(-1)
    for prompt, text, row in zip(prompts, texts, best, strict=True):
        assert len(text) == len(prompt) + 3 and text[len(prompt) :] == row[len(prompt) - 1 : len(text) - 1].tolist()


# Modules that know less, or do more.


@dataclass(frozen=True)
class PlainConfig(Config):
    layers: int = 2
    positions: int = 20


PLAIN = from_linen(Plain, PlainConfig, single_document=True)


def test_a_module_without_segments_reads_whole_rows_or_is_refused():
    strict = from_linen(Plain, PlainConfig)
    m, batch = model_of(PLAIN), packed(2)
    params = fresh(m)
    with pytest.raises(ValueError, match=r"data.document_mask: Plain takes neither segments .* single_document=True"):
        model_of(strict).forward(params, batch)
    assert np.isnan(states(m, params, batch)).all(), "documents would have seen each other"
    whole = batch | {"segments": np.minimum(batch["segments"], 1)}
    x = states(m, params, whole)
    assert np.isfinite(x).all()
    left = {name: np.roll(a, 3, 1) for name, a in whole.items()}  # as evaluation pads
    np.testing.assert_allclose(states(m, params, left)[:, 3:], x[:, :13], rtol=1e-5, atol=1e-6)
    half_row = states(m, params, {name: a[:1, :13] for name, a in whole.items()})
    np.testing.assert_allclose(half_row, x[:1, :13], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_scanned_layers_generate_and_rest_as_a_stack():
    m = model_of(PLAIN)
    s = m.specs["layers"]["attention"]["query"]["kernel"]
    assert s.shape == (2, D, 2, D // 2) and s.axes == ("layers", None, "ffn", None)
    assert m.specs["head"].role == "head" and m.specs["head"].axes == ("embed", "vocab")
    params = fresh(m)
    assert_greedy(m, params, [[5, 6, 7], [9, 8, 7, 6, 5]])
    with mesh.on_mesh(mesh.make_mesh(Mesh(tensor=2))):  # its metadata names an axis that this mesh lacks
        batch = {n: a for n, a in packed().items() if n != "segments"}
        shown = jax.jit(lambda p, b: m.forward(p, b).x_BTD)(params, batch)
    np.testing.assert_allclose(shown, states(m, params, batch), rtol=1e-5, atol=1e-5)


def make_shifting(c):
    """It reads a position more than a row has."""
    return Plain(dataclasses.replace(c, positions=c.positions + 1), shifts=True)


@pytest.mark.slow
def test_a_module_that_shifts_its_inputs_says_the_same_of_the_next_token():
    """As the lm1b example of Flax does, whose logits are of each token and not of the next one."""
    shifting = from_linen(make_shifting, PlainConfig, single_document=True, shifts_inputs=True)
    m = model_of(shifting)
    params = fresh(m)
    batch = {name: a[:, :12] for name, a in packed(2).items()} | {"segments": np.ones((2, 12), np.int32)}
    z = logits(m, params, batch)
    longer = np.concatenate([batch["tokens"], np.ones((2, 1), np.int32)], 1)
    own = make_shifting(PlainConfig()).apply({"params": params}, longer)
    np.testing.assert_allclose(z, own[:, 1:], rtol=1e-5, atol=1e-5)
    assert_greedy(m, params, [[5, 6, 7], [9, 8, 7, 6, 5]])


@pytest.mark.slow
def test_an_encoder_learns_what_is_masked_and_its_states_can_be_classified():
    family = from_linen(lambda c, dtype: LinenLm(c, dtype, causal=False), Config, kind="encoder")
    batch = packed(2) | dict(at=np.array([[1, 8], [2, 9]], np.int32), weights=np.ones((2, 2), np.float32))
    batch["targets"] = batch["targets"][:, :2]
    m = model_of(family)
    params = fresh(m)

    def own(params):
        module = LinenLm(m.config, jnp.float32, causal=False)
        z = module.apply({"params": params}, batch["tokens"], batch["positions"], batch["segments"])
        at = jnp.take_along_axis(z, batch["at"][..., None], 1)
        return optax.softmax_cross_entropy_with_integer_labels(at, batch["targets"]).sum()

    loss = jax.jit(lambda p: masked.loss(masked.Config(), m, p, batch, None)["masked"]["loss"])(params)
    np.testing.assert_allclose(loss, jax.jit(own)(params), rtol=1e-6)
    with pytest.raises(ValueError, match="generates nothing"):
        m.init_cache(2, 8, jnp.float32)

    settings = classify.Config(labels=("a", "b"))
    m = model_of(family, Config(head=False))
    m = dataclasses.replace(m, specs=m.specs | classify.objective.specs(settings, D))
    text = packed(2) | dict(at=np.zeros(2, np.int32), target=np.eye(2, dtype=np.float32), rows=np.ones(2, np.float32))
    grads = jax.jit(jax.grad(lambda p: classify.loss(settings, m, p, text, None)["texts"]["loss"]))(fresh(m))
    assert all(np.any(g) for path, g in tree.flatten(grads).items() if "key/bias" not in path)
    with pytest.raises(ValueError, match=r"model.head: this Flax module returns states"):
        m.readout(grads, jnp.zeros((1, 1, D)))


def test_a_mask_is_given_to_modules_that_ask_for_one():
    class Masked(nnx.Module):
        """As the Gemma example of Flax is called."""

        def __init__(self, c, *, rngs):
            self.embed = nnx.Embed(c.vocab, c.width, rngs=rngs)

        def __call__(self, last_tokens, cache, attention_mask):
            x = self.embed(last_tokens)
            return self.embed.attend(jnp.einsum("bts,bsd->btd", attention_mask.astype(x.dtype), x)), cache

    family = from_nnx(Masked, Config, inputs={"cache": None, "attention_mask": "mask_BTT"})
    m, batch = model_of(family), packed(1)
    params = fresh(m)
    rows = params["embed"]["embedding"][batch["tokens"][0]]
    x = states(m, params, batch)[0]
    np.testing.assert_allclose(x[9], rows[7:10].sum(0), rtol=1e-5)
    prefix = batch | {"prefix": np.arange(T)[None] < 4}
    np.testing.assert_allclose(states(m, params, prefix)[0, 0], rows[:4].sum(0), rtol=1e-5)


def test_adapters_that_train_the_base_s_own_weights_work_and_others_are_refused():
    c = LinenConfig()
    trained = {name: adapted.Adapted(METHODS[name].Config(), LINEN, c) for name in ("none", "bitfit", "norms")}
    paths = tree.flatten(LINEN.specs(c), spec.is_spec)
    assert {p for p in paths if trained["bitfit"].trainable(p)} == {p for p in paths if p.endswith("bias")}
    for name in METHODS.keys() - trained:
        with pytest.raises(ValueError, match=f"^adapter: {name}: this model.*; choose bitfit or norms") as e:
            adapted.Adapted(METHODS[name].Config(), LINEN, c).specs()
        assert "\n" not in str(e.value)
    for name in trained:
        with pytest.raises(ValueError, match=r"adapter\.base: .* could be stored as int8; use float32"):
            adapted.Adapted(METHODS[name].Config(base="int8"), LINEN, c).specs()


@pytest.mark.parametrize(("part", "field"), [
    (dict(mesh=Mesh(stage=2)), "mesh.stage"),
    (dict(execution=dataclasses.replace(EXECUTION, remat="full")), "execution.remat"),
])  # fmt: skip
def test_what_a_module_decides_is_refused_before_a_run_has_weights(part, field):
    run = Run("flax", LinenConfig(), causal.Config(), optim=OPTIM, **dict(execution=EXECUTION) | part,
              train=Train(steps=1, batch_size=B, seq_len=T))  # fmt: skip
    with mesh.on_devices(jax.devices()[:2]), pytest.raises(ValueError, match=f"^{field}: a Flax module"):
        program.program(run, Bytes())


class Stateful(nnx.Module):
    def __init__(self, c, *, rngs):
        self.embed = nnx.Embed(c.vocab, c.width, rngs=rngs)
        self.count = nnx.Variable(jnp.zeros(()))

    def __call__(self, tokens, segments):
        self.count[...] += 1
        return self.embed.attend(self.embed(tokens))


class Random(Stateful):
    def __init__(self, c, *, rngs):
        super().__init__(c, rngs=rngs)
        self.count = nnx.Variable(jax.random.normal(rngs.params()))


class Custom(nn.Module):
    """Its logits are what `after` makes of states and an embedding."""

    c: Any
    after: Any

    @nn.compact
    def __call__(self, tokens, segments):
        embed = nn.Embed(self.c.vocab, self.c.width, name="embed")
        return self.after(self, embed(tokens), embed.embedding)


class NeedsMore(nn.Module):
    c: Any

    @nn.compact
    def __call__(self, tokens, cache):
        return nn.Embed(self.c.vocab, self.c.width)(tokens)


@dataclass(frozen=True)
class Small(ModelConfig):
    pass


Thawed = dataclasses.make_dataclass("Thawed", [("vocab", int, 9)], bases=(ModelConfig,))


def run_with(m: Mesh, batch: Any = None, **execution: Any) -> None:
    layout = Layout.of(m, dataclasses.replace(EXECUTION, **execution))
    c = LinenConfig()
    Model(LINEN, c, LINEN.specs(c), layout).forward({}, packed(1) | (batch or {}))


def custom(after):
    return from_linen(lambda c: Custom(c, after), Config)


def counted(module, x, w):
    module.variable("counts", "n", lambda: jnp.zeros(()))
    return x @ w.T


ones = nn.initializers.ones
LM = dict(make=make_linen, Config=Config)
REFUSED = {
    "a config that is none": (lambda: from_linen(make_linen, dict), "Config: .*dict.* as a frozen dataclass"),
    "a config that thaws": (lambda: from_linen(make_linen, Thawed), "Config: .*Thawed.* as a frozen dataclass"),
    "a config without sizes": (lambda: from_linen(make_linen, Small), "Config: Small lacks vocab"),
    "an encoder-decoder": (lambda: from_linen(**LM, kind="encoder_decoder"), "kind: 'encoder_decoder' is none of"),
    "an unknown input": (lambda: from_linen(**LM, inputs={"x": "tokenz"}), "inputs: 'tokenz' is none of positions"),
    "an unknown axis": (lambda: from_linen(**LM, axes={"mlp": "wide"}), "axes: 'wide' is none of layers"),
    "an unknown role": (lambda: from_linen(**LM, roles={"up": "big"}), "roles: 'big' is none of matrix"),
    "a role of nothing": (lambda: from_linen(**LM, roles={"nope": "head"}).specs(Config()), "roles: pattern 'nope'"),
    "an argument that isn't there": (
        lambda: from_linen(**LM, inputs={"mask": "mask"}).specs(Config()), "LinenLm.__call__ has no argument 'mask'"),
    "an argument that is needed": (
        lambda: from_linen(NeedsMore, Config).specs(Config()), "NeedsMore.__call__ needs 'cache'"),
    "another vocabulary": (
        lambda: from_linen(lambda c: Plain(PlainConfig()), Config).specs(Config(vocab=9)),
        "model.vocab: 9, and Plain makes logits of 264 tokens"),
    "another width": (
        lambda: from_linen(lambda c: Plain(PlainConfig()), Config).specs(Config(width=9)),
        "model.width: 9, and the states of Plain have width 16"),
    "state of a module": (lambda: from_nnx(Stateful, Config).specs(Config()), "count changes when Stateful is called"),
    "a random constant": (lambda: from_nnx(Random, Config).specs(Config()), "count is drawn at random"),
    "a collection": (lambda: custom(counted).specs(Config()), "Custom keeps counts beside its weights"),
    "an axis that no rule maps": (
        lambda: custom(lambda m, x, w: x @ m.param("k", nn.with_partitioning(ones, ("odd", None)), (D, V))).specs(
            Config()),
        "axes: k names an axis 'odd'; map it to one of layers"),
    "more names than dimensions": (
        lambda: custom(lambda m, x, w: (x + m.param("k", nn.with_partitioning(ones, ("ffn", None)), (D,))[None, None])
                       @ w.T).specs(Config()), "k has shape .16,. and metadata"),
    "logits that are no product": (
        lambda: custom(lambda m, x, w: jax.nn.relu(x @ w.T)).specs(Config()), "are not states times a weight: "),
    "a product with what is computed": (
        lambda: custom(lambda m, x, w: x @ jnp.exp(w).T).specs(Config()), "not that of states with a weight as it is"),
    "stages": (lambda: run_with(Mesh(stage=2)), "mesh.stage: a Flax module"),
    "explicit axes": (lambda: run_with(Mesh(axis_type="explicit")), "mesh.axis_type: a Flax module"),
    "a ring": (lambda: run_with(Mesh(context_by="ring")), "mesh.context_by: a Flax module"),
    "remat": (lambda: run_with(Mesh(), remat="full"), "execution.remat: a Flax module"),
    "scan": (lambda: run_with(Mesh(), scan=True), "execution.scan: a Flax module"),
    "a kernel": (lambda: run_with(Mesh(), attention="splash"), "execution.attention: a Flax module"),
    "a prefix": (
        lambda: run_with(Mesh(), batch={"prefix": np.ones((1, T), bool)}), "inputs: LinenLm takes no mask"),
    "published files": (lambda: LINEN.to_hf(LinenConfig()), "no published format"),
    "files of others": (lambda: LINEN.from_hf({}), "no published files"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_told_in_one_line(case):
    act, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as e:
        act()
    assert "\n" not in str(e.value)
