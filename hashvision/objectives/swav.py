"""The objective of SwAV (Caron et al. 2020) and SEER: predict a crop's cluster from other crops."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray, UInt8

from hashvision import models
from hashvision.config import Config, derive
from hashvision.errors import UserError
from hashvision.models.layers import gathered
from hashvision.objectives import Batch, Loss, Metrics, Objective, Tree
from hashvision.pixels import augment, crops

# A prototype with less than this share of an even part of the batch counts as dead.
DEAD = 0.1

# Metrics that show whether a run learns or has collapsed; see `health`.
WATCH = ("loss_per_ln_k", "prototype_entropy", "dead_prototypes", "cosine")

fill = derive.swav


class Settings(NamedTuple):
    """The settings of SwAV; hashvision/config/schema.py documents each."""

    batch_size: int
    prototypes: int
    temperature: float
    epsilon: float
    iterations: int
    assigned: int  # crops of the first size that codes are computed for
    frozen_steps: int
    queue: int  # batches in the queue; 0: no queue
    queue_start: int  # step
    augmentation: augment.Augmentation
    patience: int = 0  # steps without learning that stop a run


def from_config(config: Config, classes: int, platform: str) -> Objective:
    """The SwAV objective of a config; see objectives.from_config. `classes` is not used.

    Raises:
      UserError: there are too few crops per photo.
    """
    del classes
    sizes, wanted = crops.from_config(config), config.swav
    if wanted.assigned > sizes[0].per_photo or sum(size.per_photo for size in sizes) < 2:
        raise UserError(
            f"data.crops={config.data.crops!r} cuts too few crops: swav.assigned={wanted.assigned}"
            " needs that many of the first size, and SwAV at least two in all; set"
            " --config.data.crops to more crops per photo."
        )
    settings = Settings(
        batch_size=config.batch_size,
        prototypes=wanted.prototypes,
        temperature=wanted.temperature,
        epsilon=wanted.epsilon,
        iterations=wanted.iterations,
        assigned=wanted.assigned,
        frozen_steps=wanted.frozen_steps,
        queue=wanted.queue // config.batch_size,
        queue_start=wanted.queue_start,
        augmentation=augment.from_config(config),
        patience=wanted.patience,
    )
    return objective(models.trunk(config, platform), models.projection_head(config), settings)


def sinkhorn(
    scores: Float[Array, "*photos K"],
    epsilon: float,
    iterations: int,
    *,
    valid: Bool[Array, "*photos"] | None = None,
) -> Float32[Array, "*photos K"]:
    """Codes: an even soft assignment of photos to prototypes (equations 3 to 5).

    The alternating normalisation of Sinkhorn and Knopp, in the log domain and float32, so that it
    overflows for no epsilon. If photos are sharded, devices exchange only sums over photos: two
    numbers per prototype and iteration, whatever the batch.

    Args:
      scores: (..., K), products of normalised embeddings and prototypes, a row per photo.
      epsilon: weight of the entropy term; smaller values give sharper codes.
      iterations: at least 1.
      valid: bool (...), the rows to use; all if None.

    Returns:
      float32 (..., K); rows sum to 1, and columns to rows / K after convergence. Rows that are not
      valid are zero.
    """
    log = scores.astype(jnp.float32) / epsilon
    if valid is not None:
        log = jnp.where(valid[..., None], log, -jnp.inf)
    photos = tuple(range(log.ndim - 1))

    def iterate(_: Int[Array, ""], log: jax.Array) -> jax.Array:
        log = log - jax.nn.logsumexp(log, axis=photos)
        row = jax.nn.logsumexp(log, axis=-1, keepdims=True)
        return log - jnp.where(jnp.isfinite(row), row, 0.0)

    return jnp.exp(lax.fori_loop(0, iterations, iterate, log))


def swapped_loss(
    scores: Float[Array, "B V K"], codes: Float[Array, "B A K"], temperature: float
) -> Float[Array, ""]:
    """Mean cross-entropy of each crop's prediction with the codes of the other crops (eqs. 2, 6).

    Args:
      scores: float32 (B, V, K), of all V crops of each photo.
      codes: float32 (B, A, K), of the first A crops.
      temperature: of the softmax over prototypes.

    Returns:
      float32 scalar, the mean over photos and over all pairs of different crops.
    """
    predicted = jax.nn.log_softmax(scores / temperature, axis=-1)
    photos, crops, _ = scores.shape
    assigned = codes.shape[1]
    # The sum over all pairs, minus the pairs of a crop with itself.
    every = jnp.sum(jnp.sum(codes, 1) * jnp.sum(predicted, 1))
    own = jnp.sum(codes * predicted[:, :assigned])
    return (own - every) / (photos * assigned * (crops - 1))


def health(
    scores: Float[Array, "B K"], embeddings: Float[Array, "B E"], temperature: float
) -> Metrics:
    """Metrics that distinguish a run that learns from one that has collapsed or not yet started to.

    Args:
      scores: float32 (B, K).
      embeddings: float32 (B, E) of length 1.
      temperature: of the softmax.

    Returns:
      prototype_entropy: the entropy of the mean prediction as a share of ln K: 1 if all prototypes
      are used evenly, 0 if only one is used. dead_prototypes: the share of prototypes with less
      than DEAD / K of the mean prediction. cosine: the mean cosine of pairs of different photos: 1
      if all embeddings are equal.
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
    """The cause and the three likeliest remedies if a run learns nothing, else None."""
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
            f"the loss stays at ln K ({scalars['loss_per_ln_k']:.3f} of it), since the codes are"
            " nearly even: lower --config.swav.epsilon (0.02 for small batches), lower"
            " --config.swav.prototypes towards the batch size, or lower"
            " --config.optimizer.learning_rate"
        )
    return None


def unit(x: Float[Array, "*rows E"]) -> Float32[Array, "*rows E"]:
    """Scales rows to length 1, in float32."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))


def objective(trunk: models.Network, head: models.Network, settings: Settings) -> Objective:
    """The SwAV objective over a trunk and a projection head.

    Batches hold crops0, crops1, ... uint8 (B, n, S, S, 3), the crops of each size, and key uint32
    (B, 2). The trunk processes all crops of one size together, and BatchNorm's statistics are over
    them: one pass per resolution, as in the authors' code.

    The queue is float32 (B, N, A, E): the embeddings of the last N batches, newest first. Row b is
    on the device that holds photo b of the batch, so embeddings never move between devices. The
    queue is used once it is full.

    Args:
      trunk: maps photos to features (B, D).
      head: maps features to embeddings (B, E).
      settings: the settings of SwAV.
    """
    assigned = settings.assigned

    def init(rng: PRNGKeyArray, batch: Batch) -> tuple[Tree, Tree]:
        trunk_rng, head_rng, prototypes_rng = jax.random.split(rng, 3)
        images = augment.normalize(batch["crops0"][:, 0])
        network = trunk.init(trunk_rng, images)
        features, _ = jax.eval_shape(lambda: trunk.apply(network, images, train=False))
        features = jnp.zeros(features.shape, jnp.float32)
        projection = head.init(head_rng, features)
        embeddings, _ = jax.eval_shape(lambda: head.apply(projection, features, train=False))
        width = embeddings.shape[-1]
        # (E, K), since fsdp shards the last axis.
        prototypes = jax.random.normal(prototypes_rng, (width, settings.prototypes), jnp.float32)
        params = {
            "trunk": network.params,
            "head": projection.params,
            "prototypes": {"kernel": prototypes},
        }
        extra = {"trunk": network.statistics, "head": projection.statistics}
        if settings.queue:
            shape = (settings.batch_size, settings.queue, assigned, width)
            extra["queue"] = jnp.zeros(shape, jnp.float32)
        return params, extra

    def embed(
        params: Tree, extra: Tree, batch: Batch, rng: PRNGKeyArray
    ) -> tuple[Float32[Array, "B V E"], Tree]:
        """Embeddings of length 1, float32 (B, V, E), and the new statistics."""
        features, first = [], 0
        statistics = extra["trunk"]
        for name in sorted(name for name in batch if name.startswith("crops")):
            photos, count, *shape = batch[name].shape
            # The crops of a photo are neighbours, so that each device has those of its own photos.
            together = batch[name].reshape(photos * count, *shape)
            keys = augment.crop_keys(batch["key"], first, count).reshape(-1, 2)
            images = augment.augmented(together, keys, settings.augmentation)
            variables = models.Variables(params["trunk"], statistics)
            out, statistics = trunk.apply(variables, images, train=True, rng=rng)
            features.append(out.reshape(photos, count, -1))
            first += count
        views = jnp.concatenate(features, 1)
        variables = models.Variables(params["head"], extra["head"])
        out, head_statistics = head.apply(
            variables, views.reshape(-1, views.shape[-1]), train=True, rng=rng
        )
        embeddings = unit(out).reshape(*views.shape[:2], -1)
        return embeddings, {"trunk": statistics, "head": head_statistics}

    def assign(
        embeddings: Float32[Array, "B A E"],
        prototypes: Float32[Array, "E K"],
        extra: Tree,
        step: Int[Array, ""],
    ) -> tuple[Float32[Array, "B A K"], Tree]:
        """Codes float32 (B, A, K) of the batch's embeddings (B, A, E), and the updated queue."""
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

        def codes_of_crop(
            scores: Float32[Array, "*photos K"],
        ) -> Float32[Array, "*photos K"]:
            return sinkhorn(scores, settings.epsilon, settings.iterations, valid=valid)

        codes = jax.vmap(codes_of_crop, in_axes=2, out_axes=2)(scores)
        return codes[:, 0], changed

    def loss_fn(
        params: Tree, extra: Tree, batch: Batch, rng: PRNGKeyArray, step: Int[Array, ""]
    ) -> Loss:
        prototypes = params["prototypes"]["kernel"]
        frozen = step < settings.frozen_steps
        prototypes = jnp.where(frozen, lax.stop_gradient(prototypes), prototypes)
        embeddings, changed = embed(params, extra, batch, rng)
        if "codes" in batch:  # this is a part of a batch; before_parts has computed the codes
            codes = batch["codes"]
        else:
            codes, queue = assign(embeddings[:, :assigned], prototypes, extra, step)
            changed |= queue
        scores = _products(embeddings, prototypes)
        value = swapped_loss(scores, codes, settings.temperature)
        metrics = health(scores[:, 0], embeddings[:, 0], settings.temperature)
        metrics["loss_per_ln_k"] = value / math.log(settings.prototypes)
        return value, (changed, metrics)

    def before_parts(
        params: Tree, extra: Tree, parts: Batch, rng: PRNGKeyArray, step: Int[Array, ""]
    ) -> tuple[Batch, Tree]:
        """Computes the codes over the whole batch, and adds them to each of its parts."""

        def first_pass(part: Batch) -> jax.Array:
            return embed(params, extra, part, rng)[0][:, :assigned]

        embeddings = lax.map(first_pass, parts).swapaxes(0, 1)  # (B / N, N, A, E)
        whole = embeddings.reshape(-1, *embeddings.shape[2:])
        codes, queue = assign(whole, params["prototypes"]["kernel"], extra, step)
        codes = codes.reshape(*embeddings.shape[:3], -1).swapaxes(0, 1)
        return {**parts, "codes": codes}, queue

    def after_update(params: Tree) -> Tree:
        kernel = params["prototypes"]["kernel"]
        return {**params, "prototypes": {"kernel": unit(kernel.T).T}}

    def predict(
        params: Tree, extra: Tree, images: UInt8[Array, "B H W 3"]
    ) -> tuple[Float32[Array, "B D"], None]:
        variables = models.Variables(params["trunk"], extra["trunk"])
        return trunk.apply(variables, augment.normalize(images), train=False)[0], None

    return Objective(
        init=init,
        loss=loss_fn,
        predict=predict,
        after_update=after_update,
        before_parts=before_parts,
        watch=WATCH,
        diagnose=diagnose,
        patience=settings.patience,
    )


def _products(
    embeddings: Float32[Array, "*rows E"], prototypes: Float32[Array, "E K"]
) -> Float32[Array, "*rows K"]:
    """Scores float32 (..., K) of embeddings (..., E), computed in float32."""
    return jnp.dot(embeddings, gathered(prototypes), precision=lax.Precision.HIGHEST)
