"""The formulas of continual learning: penalties, paths and projections, against figures worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from jaxlm.assembly.earlier import Earlier, Task
from jaxlm.core import config, spec
from jaxlm.core.continual import SI, Continual, PackNet, RWalk
from jaxlm.training import optimizers
from jaxlm.training import step as steps
from jaxlm.training.continual import importance, packnet, path, penalty, projection


def tree(seed: int, scale: float = 1.0) -> dict:
    a, b = jax.random.split(jax.random.key(seed))
    return {"w": scale * jax.random.normal(a, (3, 4)), "part": {"b": scale * jax.random.normal(b, (4,)), "none": None}}


def test_a_penalty_is_zero_without_a_pull_at_its_anchor():
    weights = tree(0)
    q = penalty.joined(None, jax.tree.map(jnp.ones_like, weights), weights)
    value, pull = jax.value_and_grad(lambda w: penalty.value(q, w))(weights)
    assert value == 0 and all(not g.any() for g in jax.tree.leaves(pull))
    moved = jax.tree.map(lambda w: w + 0.5, weights)
    assert penalty.value(q, moved) == pytest.approx(0.5 * 16 * 0.25)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_the_penalties_of_several_tasks_are_one(decay):
    """Its gradient is that of all of them, though it has one anchor; a task that is older by one counts `decay`."""
    tasks = [(jax.tree.map(jnp.square, tree(i)), tree(10 + i)) for i in range(3)]
    q = None
    for omega, anchor in tasks:
        q = penalty.joined(q, omega, anchor, decay)
    weights = tree(20)

    def by_hand(weights):
        total = 0.0
        for age, (omega, anchor) in zip((2, 1, 0), tasks, strict=True):
            terms = jax.tree.map(lambda o, a, w: (o * (w - a) ** 2).sum(), omega, anchor, weights)
            total += 0.5 * decay**age * sum(jax.tree.leaves(terms))
        return total

    ours, theirs = jax.grad(lambda w: penalty.value(q, w))(weights), jax.grad(by_hand)(weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, theirs)


def test_the_fisher_information_is_the_mean_of_squared_gradients_whatever_the_batch():
    """Squares of a batch's mean gradient would shrink with the batch."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 4)).astype(np.float32), rng.integers(0, 2, 12).astype(np.float32)
    weights = {"w": jnp.asarray(rng.normal(size=4), jnp.float32)}

    def loss(weights, row):
        z = row["x"] @ weights["w"]
        return (jnp.logaddexp(0.0, z) - row["y"] * z).sum()

    p = 1 / (1 + np.exp(-x @ np.asarray(weights["w"])))
    by_hand = (((p - y)[:, None] * x) ** 2).mean(0)  # the gradient of a row's logistic loss is (p - y) x
    for size in (1, 4, 12, 5):
        pad = -12 % size
        padded = {"x": np.pad(x, ((0, pad), (0, 0))), "y": np.pad(y, (0, pad))}
        present = np.pad(np.ones(12, np.float32), (0, pad))
        cut = [({name: a[i : i + size] for name, a in padded.items()}, present[i : i + size])
               for i in range(0, 12 + pad, size)]  # fmt: skip

        def sums(weights, part):
            return importance.over_rows(loss, jnp.square, weights, *part), part[1].sum()

        found = importance.mean_over(sums, weights, cut)
        np.testing.assert_allclose(found["w"], by_hand, rtol=1e-5)
    with pytest.raises(ValueError, match=r"continual\.old"):
        importance.mean_over(sums, weights, [])


def _quadratic_path(rate: float, updates: int):
    """The tracks of gradient descent on ½ (w − t)ᵀ A (w − t), with the loss that it came down by."""
    rng = np.random.default_rng(1)
    A = jnp.asarray(np.diag(rng.uniform(0.5, 2.0, 5)), jnp.float32)
    target = jnp.asarray(rng.normal(size=5), jnp.float32)
    loss = lambda w: 0.5 * (w["w"] - target) @ A @ (w["w"] - target)  # noqa: E731
    first = {"w": jnp.zeros(5)}

    def update(carry, _):
        w, si, walk = carry
        g = jax.grad(loss)(w)
        new = jax.tree.map(lambda a, b: a - rate * b, w, g)
        return (new, path.si_observe(si, g, w, new), path.rwalk_observe(RWalk(), walk, g, w, new, 4)), None

    start = (first, path.si_start(first), path.rwalk_start(first))
    (last, si, walk), _ = jax.lax.scan(update, start, None, updates)
    return last, si, walk, float(loss(first) - loss(last))


def test_the_path_of_synaptic_intelligence_is_the_drop_of_the_loss():
    last, si, _, drop = _quadratic_path(1e-3, 4000)
    assert float(si["path"]["w"].sum()) == pytest.approx(drop, rel=2e-3)
    omega = path.si_importance(SI(damping=1e-3), si, last)["w"]
    np.testing.assert_allclose(omega, 2 * si["path"]["w"] / (last["w"] ** 2 + 1e-3), rtol=1e-5)
    # On a quadratic that ends at its minimum that is the curvature: half the penalty of strength 1 is the loss itself.
    assert np.all(omega > 0)


def test_the_riemannian_walk_adds_two_scores_of_at_most_one():
    _, _, walk, _ = _quadratic_path(1e-2, 300)
    omega = path.rwalk_importance(walk)["w"]
    assert 1 <= omega.max() <= 2 and omega.min() >= 0
    fisher = jnp.zeros(3)
    tracks = {"fisher": {"w": fisher}, "score": {"w": fisher}}
    g, old, new = ({"w": jnp.asarray(v)} for v in ([1.0, 2.0, -1.0], [0.0, 0.0, 0.0], [-0.1, 0.1, 0.1]))
    after = path.rwalk_observe(RWalk(decay=0.75), tracks, g, old, new, rows=8)
    np.testing.assert_allclose(after["fisher"]["w"], 0.25 * 8 * np.array([1, 4, 1]), rtol=1e-6)
    np.testing.assert_allclose(after["score"]["w"], [0.1 / (0.5 * 2 * 0.01), -0.2 / (0.5 * 8 * 0.01), 0.1 / 0.01],
                               rtol=1e-5)  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_an_averaged_gradient_never_opposes_the_reference(seed):
    g, r = tree(seed), tree(100 + seed)
    new = projection.agem(g, r)
    assert float(projection.dot(new, r)) >= -1e-4
    if float(projection.dot(g, r)) >= 0:
        jax.tree.map(np.testing.assert_array_equal, new, g)
    else:  # the nearest such gradient: what was taken away lies along the reference
        gone = jax.tree.map(jnp.subtract, g, new)
        cosine = projection.dot(gone, r) / jnp.sqrt(projection.dot(gone, gone) * projection.dot(r, r))
        assert float(cosine) == pytest.approx(-1, abs=1e-5)


def test_a_reference_of_zeros_changes_nothing():
    g, zero = tree(0), jax.tree.map(jnp.zeros_like, tree(0))
    jax.tree.map(np.testing.assert_array_equal, projection.agem(g, zero), g)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(projection.gem(g, [zero, tree(1)])))


@pytest.mark.parametrize("tasks", [1, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_gem_solves_its_quadratic_program(tasks, seed):
    """Against scipy's non-negative least squares: min ‖G v + g‖² over v ≥ 0 is the dual."""
    rng = np.random.default_rng(seed)
    G, g = rng.normal(size=(20, tasks)), rng.normal(size=20)
    g -= 0.5 * G.sum(1)  # so that some are opposed
    wanted = g + G @ scipy.optimize.nnls(G, -g)[0]
    as_tree = lambda v: {"a": jnp.asarray(v[:8], jnp.float32), "b": jnp.asarray(v[8:], jnp.float32)}  # noqa: E731
    new = projection.gem(as_tree(g), [as_tree(column) for column in G.T])
    np.testing.assert_allclose(np.concatenate([new["a"], new["b"]]), wanted, rtol=1e-3, atol=1e-3)
    assert all(float(projection.dot(new, as_tree(column))) > -1e-3 for column in G.T)


def test_gem_leaves_a_gradient_that_opposes_nothing():
    g = {"w": jnp.asarray([1.0, 1.0])}
    same = projection.gem(g, [{"w": jnp.asarray([1.0, 0.0])}], margin=0.5)
    np.testing.assert_array_equal(same["w"], g["w"])
    turned = projection.gem({"w": jnp.asarray([-1.0, 1.0])}, [{"w": jnp.asarray([1.0, 0.0])}], margin=2.0)
    np.testing.assert_allclose(turned["w"], [1.0, 1.0], rtol=1e-4)  # v = max(margin, 1)


def test_optax_and_the_penalty_meet_at_the_balance():
    """Descent on a loss with a penalty ends where both pulls are equal: (a + λΩ) w = a t + λΩ w*."""
    anchor, omega = {"w": jnp.asarray([1.0, -1.0])}, {"w": jnp.asarray([2.0, 0.0])}
    q = penalty.joined(None, omega, anchor)
    tx, w = optax.sgd(0.1), {"w": jnp.zeros(2)}
    state = tx.init(w)
    for _ in range(200):
        g = jax.grad(lambda w: 0.5 * ((w["w"] - 3.0) ** 2).sum() + 1.5 * penalty.value(q, w))(w)
        updates, state = tx.update(g, state)
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(w["w"], [(3 + 1.5 * 2 * 1) / (1 + 1.5 * 2), 3.0], rtol=1e-4)


@pytest.mark.parametrize("keep", [0.5, 0.3, 1.0])
def test_the_smallest_free_weights_of_each_matrix_are_pruned(keep):
    """Their numbers are exact in each layer and each expert, whatever its magnitudes are, ties included."""
    rng = np.random.default_rng(0)
    w = rng.integers(-9, 9, (2, 3, 7, 5)).astype(np.float32) * np.array([1, 1e-3])[:, None, None, None]
    free = rng.random(w.shape) < np.array([0.9, 0.4])[:, None, None, None]
    free[1, 2] = False
    plan = packnet.Plan(lambda path: {"w": (2, 3), "v": None}[path], keep, 1)
    trees = [{"w": jnp.asarray(x), "v": jnp.asarray(x[0, 0, 0])} for x in (w, free)]
    found = jax.jit(lambda w, free: packnet.smallest(plan, w, free))(*trees)
    assert not found["v"].any()
    for one, is_free, pruned in zip(
        w.reshape(6, 35), free.reshape(6, 35), np.asarray(found["w"]).reshape(6, 35), strict=True
    ):
        order = [i for i in np.argsort(np.abs(one), kind="stable") if is_free[i]]
        n = len(order)
        count = n - max(round(keep * n + 1e-6), min(n, 1))
        assert sorted(order[:count]) == np.flatnonzero(pruned).tolist()


def test_a_run_that_is_given_more_steps_is_pruned_once():
    plan = packnet.Plan(lambda path: (0, 1), 0.5, 3)
    w = {"w": jax.random.normal(jax.random.key(0), (4, 4))}
    same, pruned = packnet.settled(plan, jnp.int32(2), w, w, packnet.nothing_pruned(w))
    assert not pruned["w"].any() and (same["w"] == w["w"]).all()
    for at in (3, 5):
        w, pruned = packnet.settled(plan._replace(at=at), jnp.int32(at), w, w, pruned)
        assert int(pruned["w"].sum()) == 8 == int((w["w"] == 0).sum())


@pytest.mark.parametrize("n", [0, 1, 3, 1000, 123_457, 2**31 - 1])
@pytest.mark.parametrize("keep", [1e-9, 0.1, 0.25, 1.0])
def test_counts_of_kept_weights_do_not_overflow(n, keep):
    found = int(packnet.kept(jnp.int32(n), keep))
    assert min(n, 1) <= found <= n and abs(found - keep * n) <= 1 + n * 2**-15
    assert keep not in (0.25, 1.0) or found == max(int(keep * n + 0.5), min(n, 1))


def test_tasks_share_the_weights_evenly():
    c, left = PackNet(tasks=4), 1.0
    for number in range(1, 5):
        taken = packnet.share(c, number) * left
        assert taken == pytest.approx(0.25)
        left -= taken
    with pytest.raises(ValueError, match=r"continual\.packnet\.tasks: 4 tasks share the weights and this is task 5"):
        packnet.share(c, 5)
    assert [packnet.last_dense_step(PackNet(retrain=r), 10) for r in (0.0, 0.3, 0.99)] == [10, 7, 1]


@pytest.mark.parametrize("name", list(optimizers.OPTIMIZERS))
def test_no_optimizer_moves_what_an_earlier_task_owns(name):
    """Nor its average: with weight decay and momentum, and bit for bit. What is pruned stays zero, even if the update
    in which it is pruned is left out."""
    specs = {
        "blocks": {"w": spec.Spec((2, 8, 6), ("layers", "embed", "ffn"), spec.normal(0.3)),
                   "b": spec.Spec((2, 6), ("layers", None), spec.normal(0.3), role="bias")},
        "table": spec.table(5, 8, spec.normal(0.3)),
    }  # fmt: skip
    c = config.Optim(name=name, lr=0.05, muon_lr=0.05, weight_decay=0.5, warmup=0, momentum=0.9, schedule="constant")
    optimizer = optimizers.make(c, 6, specs)
    task = Task("first", None, 1, packed=1)
    kept = Earlier(Continual(("packnet",), packnet=PackNet(keep=0.25, retrain=0.5)), (task,), ())

    def loss(weights, batch, key, memory=None):
        x = weights["table"][batch["x"]]
        for layer in range(2):
            x = x.at[:, :6].add(jnp.tanh(x @ weights["blocks"]["w"][layer] + weights["blocks"]["b"][layer][None]))
        return {"toy": {"loss": jnp.square(x - batch["y"][:, None]).sum() / batch["fine"].min()}}

    train = steps.make_train_step(
        loss, lambda batch: {"toy": jnp.float32(20)}, optimizer, seed=0, clip=1.0, ema=0.9,
        keeping=kept.keeping(5, specs, {}, 6),
    )  # fmt: skip
    params = spec.init(specs, jax.random.key(0))
    owner = jax.tree.map(lambda w: jax.random.bernoulli(jax.random.key(1), 0.5, w.shape).astype(jnp.int8), params)
    owner["blocks"]["b"] = jnp.ones((2, 6), jnp.int8)
    params = jax.tree.map(lambda w, o: jnp.where(o == 0, 0.0, w), params, owner)  # what is free begins at zero
    state = steps.start(params, jax.tree.map(lambda w: None, params), optimizer, True, kept.tracks(params))
    state = state.replace(memory={"packnet": {"owner": owner}})
    train, first = jax.jit(train), jax.device_get(params)
    for i in range(6):
        fine = jnp.full(1, 0.0 if i == 2 else 1.0)  # of the third update, after which it is pruned
        state, metrics = train(state, {"x": jnp.arange(5)[None], "y": jnp.arange(5.0)[None] - i, "fine": fine[None]})
        assert bool(metrics["finite"]) == (i != 2)
        for now in jax.device_get((state.params, state.ema)):
            jax.tree.map(lambda w, a, o: np.testing.assert_array_equal(w[o > 0], a[o > 0]), now, first, owner)
        pruned = state.tracks["packnet"]["pruned"]
        zeros = jax.tree.map(lambda w, e, p: bool(((w != 0) | (e != 0))[p].any()), state.params, state.ema, pruned)
        assert not any(jax.tree.leaves(zeros))
        free, gone = ((x["blocks"]["w"]).sum((1, 2)) for x in (jax.tree.map(lambda o: o == 0, owner), pruned))
        wanted = free - (free + 2) // 4 if i >= 2 else 0 * free
        np.testing.assert_array_equal(gone, wanted)
    moved = jax.tree.map(lambda w, o, p: bool((w != 0)[(o == 0) & ~p].all()), state.params, owner, pruned)
    assert moved["blocks"]["w"] and moved["table"], "what is free is trained"
