"""Small training steps of both objectives on simulated devices, and checks of their results."""

import functools
import itertools

import jax
import numpy as np

from hashvision.models import Groups, ProjectionHead, from_module
from hashvision.models.regnet import RegNetParameters, RegNetY
from hashvision.objectives import hashtag, swav
from hashvision.pixels.augment import Augmentation
from hashvision.pixels.crops import Crops, cut
from hashvision.training import optim, sharding, state

# Two stages, the second scanned; small, since each sharding needs its own compilation.
MODEL = RegNetY(RegNetParameters(4, 16, 8.0, 2.0, 8))
SMALLEST = RegNetY(RegNetParameters(2, 8, 8.0, 2.0, 8))
CLASSES, BATCH, SIDE, STEPS = 24, 32, 16, 10


# Softer codes and a lower learning rate than SwAV's own: with those, a perturbation of 1e-7 grows
# to a percent in ten steps, even on one device.
SWAV = swav.Settings(
    batch_size=BATCH, prototypes=24, temperature=0.3, epsilon=0.2, iterations=3, assigned=2,
    frozen_steps=2, queue=2, queue_start=3, augmentation=Augmentation(1.0, 0.2, 0.5),
)  # fmt: skip
CROPS = {"hashtag": [Crops(1, SIDE)], "swav": [Crops(2, SIDE), Crops(2, SIDE // 2)]}


def build(data, fsdp, model=MODEL, average=0.0, side=SIDE, name="hashtag", parts=1, photos=0):
    mesh = sharding.make_mesh(fsdp, jax.devices()[: data * fsdp])
    groups = Groups(photos, BATCH // parts // photos) if photos else None
    if name == "swav":
        model = SMALLEST if model is MODEL else model  # SwAV applies the network twice
    trunk = from_module(model.clone(norm_groups=groups))
    if name == "hashtag":
        objective = hashtag.objective(trunk, CLASSES)
    else:
        head = from_module(ProjectionHead((32, 16), True, groups))
        objective = swav.objective(trunk, head, SWAV)
    rate = optim.schedule(
        "cosine", 0.05 if name == "hashtag" else 5e-4, total_steps=STEPS, warmup_steps=2
    )
    tx = optim.build("sgd", rate, weight_decay=1e-4)
    sizes = [crops._replace(size=crops.size * side // SIDE) for crops in CROPS[name]]
    batch = state.abstract_batch(BATCH, side=side, max_labels=3, mesh=mesh)
    into_crops = functools.partial(cut, sizes=sizes)
    init = state.initializer(objective, tx, average=average > 0, batch=batch, cut=into_crops)
    abstract = state.abstract_state(init, mesh)
    step = state.train_step(
        objective, into_crops, tx=tx, rate=rate, abstract=abstract,
        mesh=mesh, seed=0, decay=average, parts=parts,
    )  # fmt: skip
    return mesh, init, abstract, batch, step


def batches():
    """Photos of four coloured quarters; pure noise would look the same everywhere to a network."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        quarters = rng.integers(0, 216, (BATCH, 2, 2, 3)).repeat(SIDE // 2, 1).repeat(SIDE // 2, 2)
        noise = rng.integers(0, 40, quarters.shape)
        batch: dict[str, np.ndarray] = {"photos": (quarters + noise).astype(np.uint8)}
        batch["shape"] = rng.integers(SIDE // 2, SIDE + 1, (BATCH, 2), np.int32)
        labels = [rng.choice(CLASSES, 3, replace=False) for _ in range(BATCH)]
        batch["labels"] = np.stack(labels).astype(np.int32)
        batch["key"] = rng.integers(0, 2**32, (BATCH, 2), np.uint32)
        yield batch


def losses(data, fsdp, steps=STEPS, **options):
    mesh, init, abstract, _, step = build(data, fsdp, **options)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    values = []
    current = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    with jax.set_mesh(mesh):
        for batch in itertools.islice(batches(), steps):
            current, metrics = step(current, jax.device_put(batch, sharding.batch_sharding(mesh)))
            values.append(float(metrics["loss"]))
    return np.array(values), jax.device_get(current)


def same_as_alone(single, data, fsdp, name):
    """Asserts that ten steps on a mesh of 8 give the losses and parameters of one device.

    Args:
      single: what `losses(1, 1, name=name)` returned.
      data: devices that share the batch only.
      fsdp: devices that share the state too.
      name: of the objective.

    Returns:
      The final states on the mesh and on one device.
    """
    wanted, alone = single
    values, final = losses(data, fsdp, name=name)
    np.testing.assert_allclose(values, wanted, rtol=1e-5)
    assert np.ptp(values) > 0.01  # the network learns
    for a, b in zip(jax.tree.leaves(final.params), jax.tree.leaves(alone.params), strict=True):
        features = b.shape[-1]  # `a` may be padded with zeros
        np.testing.assert_allclose(a[..., :features], b, rtol=1e-3, atol=1e-4)
        assert not a[..., features:].any()
    return final, alone


@functools.cache
def whole(name):
    """Losses and state after four steps of whole batches on one device, 8 photos per BatchNorm."""
    return losses(1, 1, steps=4, model=SMALLEST, name=name, photos=8)


def parts_change_nothing(name, data, fsdp, parts):
    """Asserts that accumulating over parts updates the state as a whole batch does."""
    values, final = losses(data, fsdp, steps=4, model=SMALLEST, name=name, photos=8, parts=parts)
    wanted, after = whole(name)
    np.testing.assert_allclose(values, wanted, rtol=2e-6)
    for name, found in {"params": final.params, **final.extra}.items():
        expected = {"params": after.params, **after.extra}[name]
        # Embeddings are computed last and accumulate the most rounding.
        tolerance = 2e-5 if name == "queue" else 2e-6
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
