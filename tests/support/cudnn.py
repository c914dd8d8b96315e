"""A stand-in for cuDNN's attention of documents: it gets what cuDNN does, and reads and writes memory as cuDNN does."""

import jax
import jax.numpy as jnp

from jaxlm.nn.kernels import packed_attention

DTYPE = "bfloat16"


def documents(x: jax.Array, begins: jax.Array, T: int) -> jax.Array:
    """Reads `[D, T, heads, C]` from memory: a document's numbers follow each other from where it begins."""
    heads, C = x.shape[2:]
    numbers = jnp.pad(x.reshape(-1), (0, T * heads * C))
    each = jax.vmap(lambda at: jax.lax.dynamic_slice(numbers, (at,), (T * heads * C,)))(begins)
    return each.reshape(-1, T, heads, C)


def put(each: jax.Array, like: jax.Array, begins: jax.Array, lengths: jax.Array) -> jax.Array:
    """Writes documents to memory that holds NaN wherever no document lies."""
    D, T, heads, C = each.shape
    at = begins[:, None] + jnp.arange(T * heads * C)[None]
    at = jnp.where(jnp.arange(T * heads * C)[None] < (lengths * heads * C)[:, None], at, like.size)
    numbers = jnp.full(like.size, jnp.nan, like.dtype).at[at].set(each.reshape(D, -1).astype(like.dtype), mode="drop")
    return numbers.reshape(like.shape)


def padded_attention(how, length_D, q, k, v):
    """Attention of sequences of unlike lengths, `[D, T, H, C]`, and the log of each sum of exponentials `[D, H, T]`."""
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, G, 2), jnp.repeat(v, G, 2)
    t, s = jnp.arange(T)[:, None], jnp.arange(T)[None]
    seen = (s < length_D[:, None, None]) & ((t >= s) | (not how.causal))[None]
    if how.window is not None:
        seen &= (t - s < how.window)[None]
    scores = jnp.einsum("dthc,dshc->dhts", q, k, preferred_element_type=jnp.float32) * how.scale
    scores = jnp.where(seen[:, None], scores, -1e30)
    sums = jax.nn.logsumexp(scores, -1)
    return jnp.einsum("dhts,dshc->dthc", jnp.exp(scores - sums[..., None]), v.astype(jnp.float32)), sums


class CuDNN:
    """Answers as cuDNN does: by lengths, by offsets in numbers, and leaving what is no document's as it was."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    @staticmethod
    def how(settings) -> packed_attention.How:
        assert settings["dropout_rate"] == 0.0 and settings["variadic_args"] == (False, False)
        causal, window = settings["mask_type"] == "causal", settings["sliding_window_length"]
        return packed_attention.How(causal, window, settings["scale"])

    def laid_out(self, how, q, k, v, lengths, k_lengths, q_offsets, k_offsets):
        assert lengths.dtype == q_offsets.dtype == k_offsets.dtype == jnp.int32 and q.dtype == DTYPE
        (B, M), T = lengths.shape, q.shape[1]
        assert q_offsets.shape == k_offsets.shape == (B, M + 1) and M > 1  # as JAX wants it
        D = B * M
        ends = (q_offsets.reshape(-1)[:D], k_offsets.reshape(-1)[:D])
        given = [documents(x, at, T) for x, at in ((q, ends[0]), (k, ends[1]), (v, ends[1]))]
        return ends, lengths.reshape(-1), given

    def forward(self, q, k, v, bias, *rest, is_training, **settings):
        assert bias.size == 0 and rest[-1].size == rest[-2].size == 0
        how = self.how(settings)
        (at, _), lengths, given = self.laid_out(how, q, k, v, *rest[:4])
        self.calls.append(len(lengths))
        o, sums = padded_attention(how, lengths, *given)
        sums = jnp.where(jnp.arange(q.shape[1])[None, None] < lengths[:, None, None], sums, jnp.nan)
        return [put(o, q, at, lengths), sums] if is_training else [put(o, q, at, lengths)]

    def backward(self, q, k, v, bias, *rest, **settings):
        *places, _, _, sums, o, do = rest
        how = self.how(settings)
        (at, k_at), lengths, given = self.laid_out(how, q, k, v, *places)
        given = [x.astype(jnp.float32) for x in given]
        inside = jnp.arange(q.shape[1])[None] < lengths[:, None]
        pull = jnp.where(inside[..., None, None], documents(do, at, q.shape[1]).astype(jnp.float32), 0)
        (out, exact), back = jax.vjp(lambda *x: padded_attention(how, lengths, *x), *given)
        # The real one computes probabilities from the sums, and needs its own result: wrong ones must not pass.
        own = documents(o, at, q.shape[1]) - out
        off = [jnp.abs(jnp.where(inside[:, None], sums - exact, 0)).max(),
               jnp.abs(jnp.where(inside[..., None, None], own, 0)).max() / 4]  # fmt: skip
        spoilt = jnp.where(jnp.stack(off).max() < 0.02, 1.0, jnp.nan)
        grads = back((pull * spoilt, jnp.zeros_like(exact)))
        return [put(g, x, a, lengths) for g, x, a in zip(grads, (q, k, v), (at, k_at, k_at), strict=True)]


def install(monkeypatch) -> CuDNN:
    """Makes programs for a Hopper GPU whose cuDNN is the stand-in, with room for a document in 8 positions of a row."""
    stand_in = CuDNN()

    class Call:
        def __init__(self, answer):
            self.answer = answer

        def bind(self, *operands, **settings):
            with jax.numpy_rank_promotion("allow"):
                return self.answer(*operands, **settings)

    real = packed_attention._private()
    private = packed_attention._Private(
        Call(stand_in.forward), Call(stand_in.backward), "causal", "all", real.layout, real.operands
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(packed_attention.chips, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(packed_attention, "_private", lambda: private)
    monkeypatch.setattr(packed_attention, "POSITIONS", 8)
    return stand_in
