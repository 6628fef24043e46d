"""A worker of train_step.py: our training step, once per line that it reads.

python tests/bench/train_step_ours.py MODEL BATCH SIZE FORM

FORM is one of the values of GROUP_CONV_FORMS, or auto.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hashvision import models
from hashvision.models.layers import GROUP_CONV_FORMS
from serve import serve


def main(name: str, batch: str, size: str, form: str) -> None:
    platform = jax.default_backend()
    form = GROUP_CONV_FORMS[platform] if form == "auto" else form
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    model = models.build(name, unroll=0, group_conv=form, dtype=dtype)
    images = np.random.default_rng(0).standard_normal((int(batch), int(size), int(size), 3), "f4")
    images = jnp.asarray(images, dtype)
    tx = optax.sgd(0.1, momentum=0.9)

    def loss(params: Any, statistics: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": statistics}
        features, after = model.apply(variables, images, True, mutable=["batch_stats"])
        return jax.nn.logsumexp(features, 1).mean(), after["batch_stats"]

    def step(params: Any, statistics: Any, moments: Any) -> Any:
        gradients, statistics = jax.grad(loss, has_aux=True)(params, statistics)
        updates, moments = tx.update(gradients, moments)
        return optax.apply_updates(params, updates), statistics, moments

    variables = jax.jit(lambda rng: model.init(rng, images[:2], False))(jax.random.key(0))
    params = variables["params"]
    state = params, variables["batch_stats"], tx.init(params)
    jitted = jax.jit(step, donate_argnums=(0, 1, 2))

    def work() -> None:
        nonlocal state
        state = jax.block_until_ready(jitted(*state))

    serve(work)


if __name__ == "__main__":
    main(*sys.argv[1:])
