"""A worker of train_step.py: the step that `train` runs for SwAV, always on the same photos.

python tests/bench/swav_step_ours.py MODEL BATCH SIZE FORM

The step cuts two crops of SIZE and four of half of it from photos of SIZE, with flips but no other
augmentation. There are two prototypes per photo, and the optimiser is SGD. The peer starts from
ready crops.
"""

import sys

import jax
import numpy as np

from figures import ROOT
from hashvision import objectives
from hashvision.config import recipes
from hashvision.models.layers import GROUP_CONV_FORMS
from hashvision.training import program
from serve import serve


def main(name: str, batch: str, size: str, form: str) -> None:
    form = GROUP_CONV_FORMS[jax.default_backend()] if form == "auto" else form
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    crops = f"((2, {size}, 0.14, 1.0), (4, {int(size) // 2}, 0.05, 0.14))"
    settings = {
        "batch_size": batch,
        "steps": 1000,
        "data.photo_size": size,
        "data.crops": crops,
        "augment.distortion": 0.0,
        "augment.grey": 0.0,
        "augment.blur": 0.0,
        "model.name": name,
        "model.dtype": dtype,
        "model.norm_photos": 0,
        "model.unroll": 0,
        "model.group_conv": form,
        "swav.prototypes": 2 * int(batch),
        "swav.queue": 0,
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.1,
    }
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    config = recipes.load(str(ROOT / "configs" / "swav_resnet50.py"), overrides)
    objectives.fill(config, 1e6)
    built = program.build(config, 0, 1e6)
    rng = np.random.default_rng(0)
    photos = {
        key: jax.device_put(rng.integers(0, 256, x.shape).astype(x.dtype), x.sharding)
        for key, x in built.abstract_batch.items()
    }
    photos["shape"] = np.full_like(photos["shape"], int(size))
    with jax.set_mesh(built.mesh):
        state = program.initial_state(built, 0)

        def work() -> None:
            nonlocal state
            state, _ = jax.block_until_ready(built.step(state, photos))

        serve(work)


if __name__ == "__main__":
    main(*sys.argv[1:])
