"""SwAV (Caron et al. 2020) and SEER: predicting a crop's cluster from another crop of its photo."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hashvision.models.layers import gathered
from hashvision.objectives import Batch, Objective, Tree
from hashvision.pixels import augment

# A prototype that takes less than this share of an even part of the batch is dead.
DEAD = 0.1


class Settings(NamedTuple):
    """SwAV's own numbers; hashvision/config/schema.py says what each means."""

    batch_size: int
    prototypes: int
    temperature: float
    epsilon: float
    iterations: int
    assigned: int  # the first so many crops of the first size give codes
    frozen_steps: int
    queue: int  # batches that are remembered; 0: none
    queue_start: int  # step
    augmentation: augment.Augmentation


def sinkhorn(
    scores: jax.Array, epsilon: float, iterations: int, valid: jax.Array | None = None
) -> jax.Array:
    """Codes: scores made into an even assignment of photos to prototypes (equations 3 to 5).

    Sinkhorn and Knopp's alternate normalisation, in the log domain and float32, so that no epsilon
    overflows. Sums over photos are all that is communicated where photos are sharded: two numbers a
    prototype and iteration, whatever the batch.

    Args:
      scores: (..., K), products of normalised embeddings and prototypes; a photo each row.
      epsilon: of the entropic regularisation; the smaller, the sharper.
      iterations: at least 1.
      valid: bool (...), rows that count; all if None.

    Returns:
      float32 (..., K); rows sum to 1, columns to rows / K after convergence. Rows that do not count
      are zero.
    """
    log = scores.astype(jnp.float32) / epsilon
    if valid is not None:
        log = jnp.where(valid[..., None], log, -jnp.inf)
    photos = tuple(range(log.ndim - 1))

    def iterate(_: int, log: jax.Array) -> jax.Array:
        log = log - jax.nn.logsumexp(log, axis=photos)
        row = jax.nn.logsumexp(log, axis=-1, keepdims=True)
        return log - jnp.where(jnp.isfinite(row), row, 0.0)

    return jnp.exp(lax.fori_loop(0, iterations, iterate, log))


def swapped_loss(scores: jax.Array, codes: jax.Array, temperature: float) -> jax.Array:
    """Mean cross-entropy of each crop's prediction against the codes of the others (eqs. 2, 6).

    Args:
      scores: float32 (B, V, K), of all crops of a photo.
      codes: float32 (B, A, K), of the first A crops.
      temperature: of the softmax over prototypes.

    Returns:
      float32 scalar, the mean over photos, and over all pairs of different crops.
    """
    predicted = jax.nn.log_softmax(scores / temperature, axis=-1)
    photos, crops, _ = scores.shape
    assigned = codes.shape[1]
    # All pairs at once, less those of a crop with itself.
    every = jnp.sum(jnp.sum(codes, 1) * jnp.sum(predicted, 1))
    own = jnp.sum(codes * predicted[:, :assigned])
    return (own - every) / (photos * assigned * (crops - 1))


def health(scores: jax.Array, embeddings: jax.Array, temperature: float) -> dict[str, jax.Array]:
    """What tells a run that has collapsed, or has not begun to learn, from one that learns.

    Args:
      scores: float32 (B, K).
      embeddings: float32 (B, E) of length 1.
      temperature: of the softmax.

    Returns:
      prototype_entropy: of the mean prediction, as a share of ln K: 1 where all prototypes are
      used evenly, 0 where one takes all. dead_prototypes: the share with less than DEAD / K of the
      mean prediction. cosine: the mean over pairs of different photos: 1 where all are one point.
    """
    count, prototypes = scores.shape
    mean = jnp.mean(jax.nn.softmax(scores / temperature, axis=-1), axis=0)
    entropy = -jnp.sum(jax.scipy.special.xlogy(mean, mean)) / math.log(prototypes)
    together = jnp.sum(jnp.square(jnp.sum(embeddings, axis=0)))
    return {
        "prototype_entropy": entropy,
        "dead_prototypes": jnp.mean((mean < DEAD / prototypes).astype(jnp.float32)),
        "cosine": (together - count) / (count * max(count - 1, 1)),
    }


def diagnose(scalars: Mapping[str, float]) -> str | None:
    """The cause and the three likeliest remedies, where a run learns nothing; None otherwise."""
    if scalars["cosine"] > 0.98:
        return (
            f"all photos have nearly the same features (mean cosine {scalars['cosine']:.3f}): lower"
            " --config.optimizer.learning_rate, put BatchNorm into the head"
            " (--config.swav.head_norm=True), or raise --config.swav.frozen_steps"
        )
    if scalars["dead_prototypes"] > 0.9:
        return (
            f"{scalars['dead_prototypes']:.0%} of the prototypes take no photo: lower"
            " --config.swav.prototypes, raise --config.swav.iterations, or lower"
            " --config.optimizer.learning_rate"
        )
    if scalars["loss_per_ln_k"] > 0.99:
        return (
            f"the loss sits at ln K ({scalars['loss_per_ln_k']:.3f} of it), for the codes are"
            " nearly even: lower --config.swav.epsilon (0.02 for small batches), lower"
            " --config.swav.prototypes towards the batch size, or lower"
            " --config.optimizer.learning_rate"
        )
    return None


def unit(x: jax.Array) -> jax.Array:
    """Rows of length 1, float32 whatever comes in."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))


def objective(model: Any, head: Any, settings: Settings) -> Objective:
    """The SwAV objective over a trunk and a projection head.

    Batches hold crops0, crops1, ... uint8 (B, n, S, S, 3), the crops of each size, and key uint32
    (B, 2). Crops of one size go through the trunk together, and BatchNorm takes its statistics over
    them: one pass a resolution, as the authors' code has it.

    The queue is float32 (B, N, A, E): the embeddings of the last N batches, newest first, where
    the batch's own are, so that no photo's embedding moves between devices. It counts once full.

    Args:
      model: a module of (images, train) that returns features float32 (B, D).
      head: a module of (features, train) that returns embeddings float32 (B, E).
      settings: SwAV's own numbers.
    """
    assigned = settings.assigned

    def init(rng: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        trunk_rng, head_rng, prototypes_rng = jax.random.split(rng, 3)
        images = augment.normalize(batch["crops0"][:, 0])
        trunk = model.init(trunk_rng, images, train=False)
        features = jax.eval_shape(lambda: model.apply(trunk, images, train=False))
        features = jnp.zeros(features.shape, jnp.float32)
        projection = head.init(head_rng, features, train=False)
        width = jax.eval_shape(lambda: head.apply(projection, features, train=False)).shape[-1]
        # (E, K): the last axis is the one that fsdp shards.
        prototypes = jax.random.normal(prototypes_rng, (width, settings.prototypes), jnp.float32)
        params = {
            "trunk": trunk["params"],
            "head": projection["params"],
            "prototypes": {"kernel": prototypes},
        }
        extra = {
            "batch_stats": trunk["batch_stats"],
            "head_stats": projection.get("batch_stats", {}),
        }
        if settings.queue:
            shape = (settings.batch_size, settings.queue, assigned, width)
            extra["queue"] = jnp.zeros(shape, jnp.float32)
        return params, extra

    def embed(params: Tree, extra: Tree, batch: Batch) -> tuple[jax.Array, Tree]:
        """Embeddings of length 1, float32 (B, V, E), and the new statistics."""
        features, first = [], 0
        stats = extra["batch_stats"]
        for name in sorted(name for name in batch if name.startswith("crops")):
            photos, count, *shape = batch[name].shape
            # Photo by photo, so that a device's crops are those of its own photos.
            together = batch[name].reshape(photos * count, *shape)
            keys = augment.crop_keys(batch["key"], first, count).reshape(-1, 2)
            images = augment.augmented(together, keys, settings.augmentation)
            variables = {"params": params["trunk"], "batch_stats": stats}
            out, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
            stats = updated["batch_stats"]
            features.append(out.reshape(photos, count, -1))
            first += count
        views = jnp.concatenate(features, 1)
        variables = {"params": params["head"], "batch_stats": extra["head_stats"]}
        out, updated = head.apply(
            variables, views.reshape(-1, views.shape[-1]), train=True, mutable=["batch_stats"]
        )
        head_stats = updated.get("batch_stats", {})
        embeddings = unit(out).reshape(*views.shape[:2], -1)
        return embeddings, {"batch_stats": stats, "head_stats": head_stats}

    def assign(
        embeddings: jax.Array, prototypes: jax.Array, extra: Tree, step: jax.Array
    ) -> tuple[jax.Array, Tree]:
        """Codes float32 (B, A, K) of the batch's embeddings (B, A, E), and the queue moved on."""
        embeddings, prototypes = lax.stop_gradient((embeddings, prototypes))
        together, valid, changed = embeddings[:, None], None, {}
        if settings.queue:
            queue = extra["queue"]
            full = step - settings.queue_start >= settings.queue
            counts = jnp.where(jnp.arange(1 + settings.queue) == 0, True, full)
            valid = jnp.broadcast_to(counts, (len(queue), 1 + settings.queue))
            together = jnp.concatenate([together, queue], 1)
            changed["queue"] = jnp.where(step >= settings.queue_start, together[:, :-1], queue)
        scores = _products(together, prototypes)
        codes = jax.vmap(lambda s: sinkhorn(s, settings.epsilon, settings.iterations, valid), 2, 2)(
            scores
        )
        return codes[:, 0], changed

    def loss_fn(
        params: Tree, extra: Tree, batch: Batch, rng: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Tree, dict[str, jax.Array]]]:
        del rng  # every draw of this objective is keyed by the record
        prototypes = params["prototypes"]["kernel"]
        frozen = step < settings.frozen_steps
        prototypes = jnp.where(frozen, lax.stop_gradient(prototypes), prototypes)
        embeddings, changed = embed(params, extra, batch)
        if "codes" in batch:  # of the whole batch, of which this is a part
            codes = batch["codes"]
        else:
            codes, queue = assign(embeddings[:, :assigned], prototypes, extra, step)
            changed |= queue
        scores = _products(embeddings, prototypes)
        value = swapped_loss(scores, codes, settings.temperature)
        metrics = health(scores[:, 0], embeddings[:, 0], settings.temperature)
        metrics["loss_per_ln_k"] = value / math.log(settings.prototypes)
        return value, (changed, metrics)

    def of_whole_batch(
        params: Tree, extra: Tree, parts: Batch, step: jax.Array
    ) -> tuple[Batch, Tree]:
        def first_pass(part: Batch) -> jax.Array:
            return embed(params, extra, part)[0][:, :assigned]

        embeddings = lax.map(first_pass, parts).swapaxes(0, 1)  # (B / N, N, A, E)
        whole = embeddings.reshape(-1, *embeddings.shape[2:])
        codes, queue = assign(whole, params["prototypes"]["kernel"], extra, step)
        codes = codes.reshape(*embeddings.shape[:3], -1).swapaxes(0, 1)
        return {**parts, "codes": codes}, queue

    def after_update(params: Tree) -> Tree:
        kernel = params["prototypes"]["kernel"]
        return {**params, "prototypes": {"kernel": unit(kernel.T).T}}

    def predict(params: Tree, extra: Tree, images: jax.Array) -> tuple[jax.Array, None]:
        variables = {"params": params["trunk"], "batch_stats": extra["batch_stats"]}
        return model.apply(variables, augment.normalize(images), train=False), None

    return Objective(init, loss_fn, after_update, predict, of_whole_batch, diagnose)


def _products(embeddings: jax.Array, prototypes: jax.Array) -> jax.Array:
    """Scores float32 (..., K) of embeddings (..., E): float32 whatever the trunk computes in."""
    return jnp.dot(embeddings, gathered(prototypes), precision=lax.Precision.HIGHEST)
