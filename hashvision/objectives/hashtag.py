"""The objective that predicts a photo's hashtags: softmax (WSL, SWAG), or sigmoids to compare."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray, UInt8

from hashvision import models
from hashvision.config import Config
from hashvision.errors import UserError
from hashvision.models.layers import gathered
from hashvision.objectives import Batch, Loss, Objective, Tree
from hashvision.pixels import augment, crops

# Label vectors are padded with this value, which is no class number.
NO_LABEL = -1


def sum_of_tags(logits: Float[Array, "B K"], labels: Int[Array, "B T"]) -> Float[Array, " B"]:
    """The sum of each photo's logits over its tags, float32 (B,); arguments as for the losses.

    It compares instead of gathering: XLA fuses that, while the gradient of a gather is a scatter,
    which is slow on TPU. A scatter on a SparseCore (v5p) would also make the compiled program
    unreadable for `plan`.
    """
    classes = jnp.arange(logits.shape[1])
    times = jnp.sum(labels[:, :, None] == classes, axis=1)
    return jnp.sum(logits * times.astype(logits.dtype), axis=1)


def softmax_loss(
    logits: Float[Array, "B K"], labels: Int[Array, "B T"], smoothing: float = 0.0
) -> Float[Array, " B"]:
    """Cross-entropy of the softmax against a target of 1/k for each of a photo's k tags.

    Mahajan et al. 2018, section 2.3. With smoothing e the target becomes (1 - e)/k for the tags
    plus e/K for all K classes (Szegedy et al. 2016, section 7).

    Args:
      logits: float32 (B, K).
      labels: int32 (B, T), class numbers, padded with NO_LABEL; at least one per photo.
      smoothing: e, in [0, 1).

    Returns:
      float32 (B,).
    """
    tags = jnp.sum(labels != NO_LABEL, axis=1).astype(logits.dtype)
    mean = sum_of_tags(logits, labels) / tags
    target = (1 - smoothing) * mean + smoothing * jnp.mean(logits, axis=1)
    return jax.nn.logsumexp(logits, axis=1) - target


def sigmoid_loss(
    logits: Float[Array, "B K"], labels: Int[Array, "B T"], smoothing: float = 0.0
) -> Float[Array, " B"]:
    """Binary cross-entropy of each class, summed over the classes.

    Mahajan et al. 2018, section 2.3, compare the softmax with it; the softmax was better. With
    smoothing e the targets 0 and 1 become e/2 and 1 - e/2.

    Args:
      logits: float32 (B, K).
      labels: int32 (B, T), class numbers without repetition, padded with NO_LABEL.
      smoothing: e, in [0, 1).

    Returns:
      float32 (B,).
    """
    # -log sigmoid(x) = softplus(x) - x, so a target y costs softplus(x) - y x.
    positive = sum_of_tags(logits, labels)
    target = (1 - smoothing) * positive + smoothing / 2 * jnp.sum(logits, axis=1)
    return jnp.sum(jax.nn.softplus(logits), axis=1) - target


def from_config(config: Config, classes: int, platform: str) -> Objective:
    """The hashtag objective of a config; see objectives.from_config.

    Raises:
      UserError: the config cuts more than one crop per photo.
    """
    if [size.per_photo for size in crops.from_config(config)] != [1]:
        raise UserError(
            f"data.crops={config.data.crops!r} cuts more than one crop per photo, but the hashtag"
            " objective uses only one; set --config.data.crops='((1, 224, 0.08, 1.0),)'."
        )
    return objective(
        models.trunk(config, platform),
        classes,
        loss=config.objective.loss,
        smoothing=config.objective.label_smoothing,
        augmentation=augment.from_config(config),
    )


def fill(config: Config, epoch_length: float) -> list[str]:
    """Sets nothing, since no setting of this objective is derived from others."""
    return []


def objective(
    trunk: models.Network,
    classes: int,
    *,
    loss: str = "softmax",
    smoothing: float = 0.0,
    augmentation: augment.Augmentation = augment.FLIPS,
) -> Objective:
    """The hashtag objective over a trunk, with a linear head of `classes` outputs.

    Batches hold crops0 uint8 (B, 1, H, W, 3), labels int32 (B, T) and key uint32 (B, 2).

    Args:
      trunk: maps photos to features.
      classes: K.
      loss: softmax or sigmoid.
      smoothing: label smoothing, in [0, 1).
      augmentation: of the photos in training; WSL only flips them.
    """
    loss_of = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}[loss]

    def init(rng: PRNGKeyArray, batch: Batch) -> tuple[Tree, Tree]:
        trunk_rng, head_rng = jax.random.split(rng)
        images = augment.normalize(batch["crops0"][:, 0])
        variables = trunk.init(trunk_rng, images)
        features, _ = jax.eval_shape(lambda: trunk.apply(variables, images, train=False))
        kernel = 0.01 * jax.random.normal(head_rng, (features.shape[-1], classes), jnp.float32)
        # Sigmoids start at the prior probability 1 / K, so that the first loss is small enough not
        # to disturb the trunk (focal loss, Lin et al. 2017, section 3.3). Softmax needs no prior.
        prior = 0.0 if loss == "softmax" else -math.log(max(classes - 1, 1))
        head = {"kernel": kernel, "bias": jnp.full((classes,), prior, jnp.float32)}
        return {"trunk": variables.params, "head": head}, {"trunk": variables.statistics}

    def loss_fn(
        params: Tree, extra: Tree, batch: Batch, rng: PRNGKeyArray, step: Int[Array, ""]
    ) -> Loss:
        del step
        # Random draws for a photo are keyed by its record; only the trunk uses `rng`.
        images = augment.augmented(batch["crops0"][:, 0], batch["key"], augmentation)
        variables = models.Variables(params["trunk"], extra["trunk"])
        features, statistics = trunk.apply(variables, images, train=True, rng=rng)
        logits = head_logits(params["head"], features)
        value = jnp.mean(loss_of(logits, batch["labels"], smoothing))
        top = jnp.argmax(logits, axis=1)[:, None] == batch["labels"]
        metrics = {"precision_at_1": jnp.mean(jnp.any(top, axis=1).astype(jnp.float32))}
        return value, ({"trunk": statistics}, metrics)

    def predict(
        params: Tree, extra: Tree, images: UInt8[Array, "B H W 3"]
    ) -> tuple[Float32[Array, "B D"], Float32[Array, "B K"]]:
        variables = models.Variables(params["trunk"], extra["trunk"])
        features, _ = trunk.apply(variables, augment.normalize(images), train=False)
        logits = head_logits(params["head"], features)
        score = jax.nn.log_softmax if loss == "softmax" else jax.nn.log_sigmoid
        return features, score(logits)

    return Objective(init=init, loss=loss_fn, predict=predict)


def head_logits(head: Tree, features: Float32[Array, "B D"]) -> Float32[Array, "B K"]:
    """Logits float32 (B, K) of features float32 (B, D), computed in float32."""
    kernel = gathered(head["kernel"])
    product = jnp.dot(features, kernel, precision=jax.lax.Precision.HIGHEST)
    return product + head["bias"]
