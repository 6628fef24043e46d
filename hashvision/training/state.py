"""The training state, its initial value, and the training step, for all objectives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hashvision.objectives import Batch, Objective
from hashvision.training import sharding
from hashvision.training.optim import Schedule, plateau_scale

Cut = Callable[[Batch], Batch]  # a batch of photos -> a batch of crops


class State(NamedTuple):
    """Everything a checkpoint holds; together with the config it determines the rest of the run."""

    step: jax.Array  # int32, steps done; step and seed give the position in the data
    params: Any
    extra: Any  # updated without gradients: statistics and queues
    opt_state: Any
    average: Any  # moving average of what `averaged` returns; () if the config has none


def abstract_batch(
    batch_size: int, *, side: int, max_labels: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a global batch of data.reader, of photos of `side` pixels."""
    over_devices = sharding.batch_sharding(mesh)
    members = {
        "photos": ((side, side, 3), jnp.uint8),
        "shape": ((2,), jnp.int32),
        "labels": ((max_labels,), jnp.int32),
        "key": ((2,), jnp.uint32),
    }
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=over_devices)
        for name, (shape, dtype) in members.items()
    }


def network_initializer(
    objective: Objective, batch: Any, cut: Cut
) -> Callable[[jax.Array], tuple[Any, Any]]:
    """Returns rng -> (params, extra) at step 0; only the shapes of `batch` matter."""
    # One photo suffices: parameters do not depend on the number of photos.
    one = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), jax.eval_shape(cut, batch))

    def init(rng: jax.Array) -> tuple[Any, Any]:
        params, extra = objective.init(rng, one)
        return objective.after_update(params), extra

    return init


def initializer(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    average: bool,
    batch: Any,
    cut: Cut,
) -> Callable[[jax.Array], State]:
    """Returns rng -> state at step 0, for jax.jit; only the shapes of `batch` matter."""
    network = network_initializer(objective, batch, cut)

    def init(rng: jax.Array) -> State:
        params, extra = network(rng)
        return State(
            jnp.zeros((), jnp.int32),
            params,
            extra,
            tx.init(params),
            averaged(params, extra) if average else (),
        )

    return init


def abstract_state(init: Callable[[jax.Array], Any], mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of what `init` returns; allocates nothing."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        shapes,
        sharding.state_shardings(shapes, mesh),
    )


def train_step(
    objective: Objective,
    cut: Cut,
    *,
    tx: optax.GradientTransformationExtraArgs,
    rate: Schedule,
    abstract: State,
    mesh: Mesh,
    seed: int,
    decay: float = 0.0,
    parts: int = 1,
) -> Any:
    """The jitted step: (state, batch) -> (state, metrics). The state is donated.

    Args:
      objective: the training objective.
      cut: turns a batch of photos into the batch of crops that the objective takes.
      tx: the optimiser.
      rate: the learning rate by step, for the metrics.
      abstract: the state's shapes and shardings, from `abstract_state`.
      mesh: the mesh that state and batch are sharded over.
      seed: of the run.
      decay: of the moving average (`averaged`); 0: no average. Early steps use min(decay, (1 +
        step) / (10 + step)), so that the average forgets the initial parameters.
      parts: number of parts of the batch that gradients accumulate over in turn. More parts take
        less memory and learn the same: BatchNorm's groups are those of the whole batch
        (models.Groups), and its running statistics change once per step.

    Returns:
      A jitted function. Its metrics are replicated float32 scalars of the step just taken, among
      them `loss`, `learning_rate` and `gradient_norm`.
    """

    def accumulated(
        differentiate: Callable[..., Any], state: State, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, Any, dict[str, jax.Array], Any]:
        """Loss, new extra, metrics and gradients, averaged over the parts."""
        # Photo i goes to part i % parts, so each device has photos of its own in every part.
        split = {
            name: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()
        }
        split, extra = objective.before_parts(state.params, state.extra, split, rng, state.step)
        extra = {**state.extra, **extra}

        def add(total: Any, part: Batch) -> tuple[Any, Any]:
            (loss, each), grads = differentiate(state.params, extra, part, rng, state.step)
            return jax.tree.map(jnp.add, total, grads), (loss, each)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        total, of_parts = jax.lax.scan(add, zeros, split)
        loss, (changed, metrics) = jax.tree.map(lambda x: jnp.mean(x, 0), of_parts)
        grads = jax.tree.map(lambda g: g / parts, total)
        return loss, {**extra, **changed}, metrics, grads

    def step_fn(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        batch = cut(batch)
        differentiate = jax.value_and_grad(objective.loss, has_aux=True)
        if parts == 1:
            (loss, (changed, metrics)), grads = differentiate(
                state.params, state.extra, batch, rng, state.step
            )
            extra = {**state.extra, **changed}
        else:
            loss, extra, metrics, grads = accumulated(differentiate, state, batch, rng)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
        params = objective.after_update(optax.apply_updates(state.params, updates))
        average = state.average
        if decay:
            done = state.step.astype(jnp.float32)
            d = jnp.minimum(decay, (1.0 + done) / (10.0 + done))
            now = averaged(params, extra)
            average = jax.tree.map(lambda a, x: d * a + (1 - d) * x, average, now)
        metrics = {
            "loss": loss,
            "learning_rate": rate(state.step) * plateau_scale(state.opt_state),
            "gradient_norm": optax.tree.norm(grads),
            **metrics,
        }
        return State(state.step + 1, params, extra, opt_state, average), metrics

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    batch = sharding.batch_sharding(mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        step_fn,
        in_shardings=(shardings, batch),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )


def averaged(params: Any, extra: Any) -> dict[str, Any]:
    """The part of a state that is averaged: parameters, and the trunk's statistics as "trunk".

    Activations of the averaged network have another mean and variance than those of the last step's
    network, so the last step's statistics would normalise them wrongly. Statistics averaged with
    the same decay (as torchvision's use_buffers does) come from the same steps as the parameters
    and cost nothing. Recomputing them over some batches (precise BN: Wu and Johnson 2021, arXiv
    2105.07576, section 3) would be exact, but would need photos wherever a checkpoint is read.
    """
    return {"params": params, "trunk": extra["trunk"]}


def evaluated(state: State) -> tuple[Any, Any]:
    """The (params, extra) to evaluate: those of the moving average, if there is one."""
    if state.average == ():
        return state.params, state.extra
    return state.average["params"], {**state.extra, "trunk": state.average["trunk"]}
