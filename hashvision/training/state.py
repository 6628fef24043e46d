"""The training state, its initial value and the train step that every objective shares."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hashvision.objectives import Batch, Objective
from hashvision.training import mesh as meshes
from hashvision.training.optim import Schedule, plateau_scale

Cut = Callable[[Batch], Batch]  # a batch of photos made into one of crops


class State(NamedTuple):
    """All that a checkpoint holds; everything else follows from it and the config."""

    step: jax.Array  # int32, steps done; with the seed, the position in the data
    params: Any
    extra: Any  # BatchNorm statistics, queues
    opt_state: Any
    average: Any  # exponential moving average of params, or () without one


def abstract_batch(
    batch_size: int, side: int, max_labels: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a global batch, as `data.stream` yields it."""
    sharding = meshes.batch_sharding(mesh)
    members = {
        "photos": ((side, side, 3), jnp.uint8),
        "shape": ((2,), jnp.int32),
        "labels": ((max_labels,), jnp.int32),
        "key": ((2,), jnp.uint32),
    }
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in members.items()
    }


def initializer(
    objective: Objective, tx: optax.GradientTransformation, average: bool, batch: Any, cut: Cut
) -> Callable[[jax.Array], State]:
    """Rng -> the state of step 0, for `jax.jit` or `jax.eval_shape`; `batch` gives shapes only."""
    # Parameters depend on the shape of an image, not on how many there are.
    one = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), jax.eval_shape(cut, batch))

    def init(rng: jax.Array) -> State:
        params, extra = objective.init(rng, one)
        params = objective.after_update(params)
        return State(
            jnp.zeros((), jnp.int32),
            params,
            extra,
            tx.init(params),
            params if average else (),
        )

    return init


def abstract_state(init: Callable[[jax.Array], State], mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of the state; takes no memory."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        meshes.state_shardings(shapes, mesh),
    )


def train_step(
    objective: Objective,
    cut: Cut,
    tx: optax.GradientTransformationExtraArgs,
    rate: Schedule,
    abstract: State,
    mesh: Mesh,
    seed: int,
    decay: float = 0.0,
    parts: int = 1,
) -> Any:
    """The jitted step: (state, batch) -> (state, metrics), with the state donated.

    Args:
      objective: what is learnt.
      cut: a batch of photos -> one of crops, which the objective takes.
      tx: the optimiser.
      rate: its learning rate, for the metrics.
      abstract: from `abstract_state`.
      mesh: the mesh in force.
      seed: of the run.
      decay: of the moving average; the first steps average over what there is:
        min(decay, (1 + step) / (10 + step)).
      parts: gradients accumulate over that many parts of the batch, one after the other, which
        takes less memory; 1 takes the batch as it is. BatchNorm's statistics are those of a part.

    Returns:
      A jitted function; metrics are replicated float32 scalars, `loss` and `learning_rate` among
      them, of the step the state came with.
    """

    def accumulated(
        differentiate: Callable[..., Any], state: State, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, Any, dict[str, jax.Array], Any]:
        """Loss, extra, metrics and gradients: the means over the parts, gone through in turn."""
        # Photo i goes to part i % parts: each device's photos are spread evenly, and stay there.
        split = {
            name: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()
        }
        split, extra = objective.of_whole_batch(state.params, state.extra, split, state.step)

        def add(carry: tuple[Any, Any], part: Batch) -> tuple[tuple[Any, Any], Any]:
            extra, total = carry
            (loss, (extra, metrics)), grads = differentiate(
                state.params, extra, part, rng, state.step
            )
            return (extra, jax.tree.map(jnp.add, total, grads)), {"loss": loss, **metrics}

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (extra, total), metrics = jax.lax.scan(add, (extra, zeros), split)
        metrics = jax.tree.map(jnp.mean, metrics)
        return metrics.pop("loss"), extra, metrics, jax.tree.map(lambda g: g / parts, total)

    def step_fn(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        batch = cut(batch)
        differentiate = jax.value_and_grad(objective.loss, has_aux=True)
        if parts == 1:
            (loss, (extra, metrics)), grads = differentiate(
                state.params, state.extra, batch, rng, state.step
            )
        else:
            loss, extra, metrics, grads = accumulated(differentiate, state, batch, rng)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
        params = objective.after_update(optax.apply_updates(state.params, updates))
        average = state.average
        if decay:
            d = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
            average = jax.tree.map(lambda a, p: d * a + (1 - d) * p, average, params)
        metrics = {
            "loss": loss,
            "learning_rate": rate(state.step) * plateau_scale(state.opt_state),
            "gradient_norm": optax.tree.norm(grads),
            **metrics,
        }
        return State(state.step + 1, params, extra, opt_state, average), metrics

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    batch = meshes.batch_sharding(mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        step_fn,
        in_shardings=(shardings, batch),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )


def evaluated(state: State) -> Any:
    """The parameters to evaluate: the moving average where there is one."""
    return state.params if state.average == () else state.average
