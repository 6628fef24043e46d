"""Tests of SwAV: codes and loss against the paper's equations and PyTorch, the queue, sharding."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hashvision.models import Network, ProjectionHead, Variables, from_module
from hashvision.objectives import swav
from hashvision.pixels.augment import Augmentation
from hashvision.planning import hlo, plan
from places import GOLDEN


def quarters_trunk():
    """A trunk that compiles quickly: a ReLU of a projection of the photo's four quarters."""

    def init(rng, images):
        return Variables({"kernel": jax.random.normal(rng, (12, 10))}, {"mean": jnp.zeros(10)})

    def apply(variables, images, train, rng=None):
        photos, side, _, _ = images.shape
        quarters = images.reshape(photos, 2, side // 2, 2, side // 2, 3).mean((2, 4))
        features = jax.nn.relu(quarters.reshape(photos, 12) @ variables.params["kernel"])
        if not train:
            return features, variables.statistics
        seen = 0.9 * variables.statistics["mean"] + 0.1 * features.mean(0)
        return features, {"mean": seen}

    return Network(init, apply)


def plain_codes(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """Equations 3 to 5 as in the paper: Diag(u) exp(C'Z / eps) Diag(v), with photos as columns."""
    q = np.exp(scores.astype(np.float64).T / epsilon)
    prototypes, photos = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdims=True) / prototypes
        q = q / q.sum(0, keepdims=True) / photos
    return (q * photos).T


def plain_loss(scores: np.ndarray, codes: np.ndarray, temperature: float) -> float:
    """Equations 1 and 2 and the sum over crops of section 3.2, pair by pair; arrays (V, B, K)."""
    total, pairs = 0.0, 0
    for a in range(len(codes)):
        for v in range(len(scores)):
            if v == a:
                continue
            for code, score in zip(codes[a], scores[v].astype(np.float64), strict=True):
                p = np.exp(score / temperature) / np.exp(score / temperature).sum()
                total -= (code * np.log(p)).sum()
                pairs += 1
    return total / pairs


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def scores():
    """Scores of 5 crops of 24 photos with 10 prototypes: (5, 24, 10)."""
    rng = np.random.default_rng(0)
    z, c = unit(rng.standard_normal((5, 24, 8))), unit(rng.standard_normal((10, 8)))
    return (z @ c.T).astype(np.float32)


@pytest.mark.parametrize("epsilon", [0.02, 0.05, 0.5])
def test_codes_equal_the_papers_equations(scores, epsilon):
    codes = swav.sinkhorn(jnp.array(scores[0]), epsilon, 3)
    np.testing.assert_allclose(codes, plain_codes(scores[0], epsilon, 3), atol=1e-5)


def test_sinkhorn_takes_photos_along_several_axes(scores):
    codes = swav.sinkhorn(jnp.array(scores[:2]), 0.05, 3)
    flat = plain_codes(scores[:2].reshape(-1, 10), 0.05, 3)
    np.testing.assert_allclose(codes.reshape(-1, 10), flat, atol=1e-5)


def test_codes_converge_to_even_marginals(scores):
    codes = np.asarray(swav.sinkhorn(jnp.array(scores[0]), 0.05, 200))
    np.testing.assert_allclose(codes.sum(1), 1, atol=1e-4)
    np.testing.assert_allclose(codes.sum(0), len(codes) / codes.shape[1], atol=1e-4)


def test_codes_do_not_overflow_at_a_small_epsilon_in_bfloat16(scores):
    codes = swav.sinkhorn(jnp.array(scores[0], jnp.bfloat16), 0.01, 10)
    assert codes.dtype == jnp.float32 and np.isfinite(codes).all()
    np.testing.assert_allclose(np.asarray(codes).sum(1), 1, atol=1e-4)


def test_invalid_rows_do_not_change_the_codes(scores):
    wanted = swav.sinkhorn(jnp.array(scores[0]), 0.05, 3)
    more = np.concatenate([scores[0], scores[1]])
    valid = jnp.arange(len(more)) < len(scores[0])
    codes = np.asarray(swav.sinkhorn(jnp.array(more), 0.05, 3, valid=valid))
    np.testing.assert_allclose(codes[: len(scores[0])], wanted, atol=1e-6)
    assert not codes[len(scores[0]) :].any()


def test_the_loss_equals_the_papers_equations(scores):
    codes = np.stack([plain_codes(scores[a], 0.05, 3) for a in (0, 1)])
    photos_first = jnp.array(scores.swapaxes(0, 1)), jnp.array(codes.swapaxes(0, 1), jnp.float32)
    loss = swav.swapped_loss(*photos_first, 0.1)
    np.testing.assert_allclose(loss, plain_loss(scores, codes, 0.1), rtol=1e-5)


def test_codes_and_loss_equal_pytorchs():
    """tests/golden/make_swav.py made the golden with lightly's SwaVLoss."""
    golden = np.load(GOLDEN / "swav.npz")
    for epsilon, iterations in ((0.05, 3), (0.02, 10)):
        name = f"{epsilon}-{iterations}"
        high, low, queue = golden["high"], golden["low"], golden["queue"]
        codes = jnp.stack(
            [swav.sinkhorn(jnp.array(high[a]), epsilon, iterations) for a in (0, 1)], 1
        )
        scores = jnp.array(np.concatenate([high, low]).swapaxes(0, 1))
        np.testing.assert_allclose(codes[:, 0], golden[f"codes-{name}"], atol=1e-5)
        np.testing.assert_allclose(
            swav.swapped_loss(scores, codes, 0.1), golden[f"loss-{name}"], rtol=1e-5
        )
        with_queue = jnp.stack(
            [
                swav.sinkhorn(jnp.array(np.concatenate([high[a], queue[a]])), epsilon, iterations)
                for a in (0, 1)
            ],
            1,
        )[: high.shape[1]]
        np.testing.assert_allclose(
            swav.swapped_loss(scores, with_queue, 0.1), golden[f"queue-{name}"], rtol=1e-5
        )


def test_health_distinguishes_collapse_from_learning():
    rng = np.random.default_rng(1)
    alive = unit(rng.standard_normal((64, 8)))
    prototypes = unit(rng.standard_normal((12, 8)))
    numbers = swav.health(jnp.array(alive @ prototypes.T), jnp.array(alive), 0.1)
    wanted = ((alive @ alive.T).sum() - 64) / (64 * 63)
    np.testing.assert_allclose(numbers["cosine"], wanted, atol=1e-5)
    assert numbers["prototype_entropy"] > 0.8 and numbers["dead_prototypes"] < 0.3
    point = np.repeat(alive[:1], 64, 0)
    numbers = swav.health(jnp.array(point @ prototypes.T), jnp.array(point), 0.1)
    np.testing.assert_allclose(numbers["cosine"], 1, atol=1e-4)
    assert numbers["prototype_entropy"] < 0.7 and numbers["dead_prototypes"] > 0.5


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"cosine": 0.995}, "same features"),
        ({"dead_prototypes": 0.95}, "95% of the prototypes"),
        ({"loss_per_ln_k": 0.999}, "stays at ln K"),
    ],
)
def test_diagnose_names_each_failure_with_remedies(changed, words):
    healthy = {"cosine": 0.3, "dead_prototypes": 0.1, "loss_per_ln_k": 0.8}
    found = swav.diagnose({**healthy, **changed})
    if words is None:
        assert found is None
    else:
        assert words in found and found.count("--config.") == 3


def settings(**changes):
    base = swav.Settings(
        batch_size=8, prototypes=16, temperature=0.1, epsilon=0.05, iterations=3, assigned=2,
        frozen_steps=0, queue=0, queue_start=0, augmentation=Augmentation(1.0, 0.2, 0.5),
    )  # fmt: skip
    return base._replace(**changes)


def made(chosen, photos=8, norm=False):
    rng = np.random.default_rng(0)
    batch = {
        "crops0": jnp.array(rng.integers(0, 256, (photos, 2, 16, 16, 3), np.uint8)),
        "crops1": jnp.array(rng.integers(0, 256, (photos, 3, 8, 8, 3), np.uint8)),
        "key": jnp.array(rng.integers(0, 2**32, (photos, 2), np.uint32)),
    }
    objective = swav.objective(quarters_trunk(), from_module(ProjectionHead((16, 8), norm)), chosen)
    params, extra = objective.init(jax.random.key(0), batch)
    return objective, objective.after_update(params), extra, batch


@pytest.mark.slow
def test_prototypes_have_length_one_and_no_gradient_while_frozen():
    objective, params, extra, batch = made(settings(frozen_steps=3))
    lengths = jnp.linalg.norm(params["prototypes"]["kernel"], axis=0)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)

    @jax.jit
    def gradient(step):
        return jax.grad(lambda p: objective.loss(p, extra, batch, jax.random.key(0), step)[0])(
            params
        )

    assert not np.any(gradient(2)["prototypes"]["kernel"])
    assert np.any(gradient(3)["prototypes"]["kernel"])
    assert np.any(gradient(2)["head"]["dense1"]["kernel"])


@pytest.mark.slow
def test_the_queue_is_newest_first_and_used_only_when_full():
    objective, params, extra, batch = made(settings(queue=2, queue_start=1))
    plain, *_ = made(settings())
    step = jax.jit(lambda extra, n: objective.loss(params, extra, batch, jax.random.key(0), n))
    reference = jax.jit(
        lambda extra: plain.loss(params, extra, batch, jax.random.key(0), jnp.int32(0))
    )
    without = {name: value for name, value in extra.items() if name != "queue"}
    wanted, (without, _) = reference(without)
    loss, (extra, _) = step(extra, 0)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert not np.any(extra["queue"])  # not started
    queues = []
    for number in (1, 2):
        wanted, (without, _) = reference(without)
        loss, (extra, _) = step(extra, number)
        np.testing.assert_allclose(loss, wanted, rtol=1e-6)
        queues.append(np.asarray(extra["queue"]))
    assert queues[0].shape == (8, 2, 2, 8)
    assert queues[0][:, 0].any() and not queues[0][:, 1].any()
    np.testing.assert_array_equal(queues[1][:, 1], queues[0][:, 0])
    others = unit(np.random.default_rng(5).standard_normal(queues[0].shape))
    loss, _ = step({**extra, "queue": jnp.array(others, jnp.float32)}, 3)  # full
    assert abs(loss - wanted) > 1e-3


@pytest.mark.slow
def test_codes_with_a_full_queue_are_computed_over_all_photos():
    objective, params, extra, batch = made(settings(queue=3))
    rng = np.random.default_rng(5)
    queue = unit(rng.standard_normal((8, 3, 2, 8))).astype(np.float32)
    parts = {name: x[:, None].swapaxes(0, 1) for name, x in batch.items()}
    found, _ = jax.jit(objective.before_parts)(
        params, {**extra, "queue": queue}, parts, jax.random.key(0), 99
    )
    # The batch's own embeddings, which the step has put into the queue.
    _, (moved, _) = jax.jit(objective.loss)(
        params, {**extra, "queue": queue}, batch, jax.random.key(0), 99
    )
    own = np.asarray(moved["queue"])[:, 0]
    for a in (0, 1):
        together = np.concatenate([own[:, a], queue[:, :, a].reshape(-1, 8)])
        scores = together @ np.asarray(params["prototypes"]["kernel"])
        wanted = plain_codes(scores, 0.05, 3)[:8]
        np.testing.assert_allclose(found["codes"][0][:, a], wanted, atol=1e-4)


@pytest.mark.slow
def test_accumulating_over_parts_learns_the_same_as_the_whole_batch():
    """The codes of each part are computed over the whole batch."""
    objective, params, extra, batch = made(settings(queue=2))
    differentiate = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    (loss, (whole, _)), grads = differentiate(params, extra, batch, jax.random.key(0), 0)
    parts = {name: x.reshape(4, 2, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}
    parts, moved = jax.jit(objective.before_parts)(params, extra, parts, jax.random.key(0), 0)
    np.testing.assert_allclose(moved["queue"], whole["queue"], atol=1e-6)
    losses, summed = [], jax.tree.map(jnp.zeros_like, params)
    for part in (0, 1):
        own = jax.tree.map(lambda x, part=part: x[part], parts)
        (value, _), gradient = differentiate(params, {**extra, **moved}, own, jax.random.key(0), 0)
        losses.append(value)
        summed = jax.tree.map(lambda a, b: a + b / 2, summed, gradient)
    np.testing.assert_allclose(np.mean(losses), loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), summed, grads)
    # Codes computed over a part alone would differ.
    alone = {name: x[0] for name, x in parts.items() if name != "codes"}
    plain, *_ = made(settings())
    by_itself, _ = jax.jit(plain.loss)(params, extra, alone, jax.random.key(0), 0)
    assert abs(by_itself - losses[0]) > 1e-3


@pytest.mark.slow
def test_the_heads_batchnorm_statistics_are_updated():
    objective, params, extra, batch = made(settings(), norm=True)
    _, (after, _) = jax.jit(objective.loss)(params, extra, batch, jax.random.key(0), 0)
    assert set(after["head"]) == {"norm1"}
    assert np.any(after["head"]["norm1"]["mean"] != extra["head"]["norm1"]["mean"])


@pytest.mark.slow
def test_each_crop_size_updates_the_statistics_once():
    objective, params, extra, batch = made(settings())
    _, (after, _) = jax.jit(objective.loss)(params, extra, batch, jax.random.key(0), 0)
    assert not np.allclose(after["trunk"]["mean"], 0)
    # Two updates with momentum 0.9, one per size, rather than five, one per crop.
    doubled = {"trunk": {"mean": jnp.ones(10)}, "head": {}}
    _, (later, _) = jax.jit(objective.loss)(params, doubled, batch, jax.random.key(0), 0)
    np.testing.assert_allclose(later["trunk"]["mean"] - after["trunk"]["mean"], 0.81, atol=1e-5)


@pytest.mark.slow
def test_metrics_hold_the_loss_relative_to_ln_k():
    objective, params, extra, batch = made(settings())
    loss, (_, metrics) = jax.jit(objective.loss)(params, extra, batch, jax.random.key(0), 0)
    np.testing.assert_allclose(metrics["loss_per_ln_k"], loss / math.log(16), rtol=1e-6)
    assert 0.5 < metrics["loss_per_ln_k"] < 3


@pytest.mark.slow
def test_8_devices_give_the_same_codes_and_exchange_only_numbers_per_prototype(scores):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    codes = jax.jit(lambda s: swav.sinkhorn(s, 0.05, 3), out_shardings=sharding)
    found = codes(jax.device_put(scores[0], sharding))
    np.testing.assert_allclose(found, swav.sinkhorn(jnp.array(scores[0]), 0.05, 3), atol=1e-6)

    def communicated(photos):
        shape = jax.ShapeDtypeStruct((photos, 10), jnp.float32, sharding=sharding)
        found = hlo.collectives(codes.lower(shape).compile().as_text())
        return [(each.kind, each.elements) for each in found]

    few, many = communicated(64), communicated(6400)
    assert few == many and few
    # A maximum and a sum of one number per prototype.
    assert {(kind, size) for kind, size in few} == {("all-reduce", 10)}


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="no TPU compiler: pip install libtpu"
)
@pytest.mark.parametrize("queue", [0, 3])
def test_tpus_exchange_only_numbers_per_prototype_for_codes(queue):
    """In the TPU compiler's program the bytes do not depend on the batch or the queue."""
    mesh = jax.sharding.Mesh(np.array(plan.devices_of("v5e:2x4")), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def communicated(photos, prototypes):
        shape = jax.ShapeDtypeStruct(
            (photos, 1 + queue, prototypes), jnp.float32, sharding=sharding
        )
        codes = jax.jit(lambda s: swav.sinkhorn(s, 0.05, 3), out_shardings=sharding)
        found = hlo.collectives(codes.lower(shape).compile().as_text())
        return [(each.kind, each.elements) for each in found]

    # A maximum and a sum of one number per prototype, in each iteration.
    for photos, prototypes in ((256, 3000), (2048, 3000), (256, 6000)):
        assert communicated(photos, prototypes) == [("all-reduce", prototypes)] * 2
