"""An optimizer and a schedule of one's own: signs of the gradient, with a rate that halves at half time."""

from typing import Any

import jax.numpy as jnp
import optax

import jaxlm


def sign_descent(c: jaxlm.Optim, schedule: Any, decay_mask: Any, specs: Any) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_sign(),
        optax.add_decayed_weights(c.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def halved(c: jaxlm.Optim, steps: int) -> Any:
    return lambda t: jnp.where(t < (steps - c.warmup) // 2, c.lr, c.lr / 2)


jaxlm.register_optimizer("sign_descent", sign_descent)
jaxlm.register_schedule("halved", halved)
