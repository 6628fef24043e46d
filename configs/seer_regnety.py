"""SEER (Goyal et al. 2021 and 2022, arXiv 2103.01988, 2202.08360): RegNetY by SwAV on any photos.

Variants: 32gf, 64gf, 128gf, 256gf (the default; one epoch of a billion photos) and 10b.

python -m hashvision train --config=seer_regnety:256gf --config.dataset=DATASET \
    --workdir=WORKDIR --config.mesh.fsdp=8

For an endless stream of photos the authors kept the learning rate constant and halved it on
plateaus: --config.optimizer.schedule=plateau --config.steps=STEPS.

From the released configs and the names of the released files: the batches of 128gf (16 machines of
8 GPUs with 32 photos each), 256gf and 10b, the constant learning rate of 128gf, and the warm-up
from 0.15 in 8,000 steps. The batch of 32gf is computed (a billion photos in 244,000 steps). The
batch of 64gf and the schedules of 32gf and 64gf are unknown; they are those of 256gf.
"""

from typing import Any, Literal

import base

# The authors' SyncBN groups. By the names of the released files, 64 GPUs of 32 photos for 128GF and
# of 16 for 256GF; by the released config, 8 GPUs of 16 photos for 10B. Those of 32GF and 64GF are
# unknown; here they are an eighth of the batch.
NORM_PHOTOS = {"32gf": 512, "64gf": 1024, "128gf": 2048, "256gf": 1024, "10b": 128}


def get_config(variant: Literal["32gf", "64gf", "128gf", "256gf", "10b"] = "256gf") -> Any:
    """SwAV with 16,000 prototypes, a head without BatchNorm, and LARC.

    Batch, schedule and BatchNorm groups depend on the variant.
    """
    config = base.get_config()
    config.batch_size = 4096 if variant in ("32gf", "128gf") else 8192
    config.epochs = 1.0
    config.data.lanes = 512
    config.data.sampling = "natural"
    config.data.crops = ((2, 224, 0.14, 1.0), (4, 96, 0.05, 0.14))
    config.augment.distortion = 1.0
    config.augment.grey = 0.2
    config.augment.blur = 0.5
    config.model.name = f"regnety_{variant}"
    config.model.zero_scale = False
    config.model.norm_photos = NORM_PHOTOS[variant]
    config.model.remat = (True, True, True, True)
    config.objective.name = "swav"
    config.swav.prototypes = 16_000
    config.swav.temperature = 0.1
    config.swav.epsilon = 0.05
    config.swav.iterations = 10
    config.swav.head = (8192, 8192, 256)
    config.swav.head_norm = False
    config.swav.frozen_steps = 313
    config.swav.queue = 0
    config.optimizer.name = "larc"
    config.optimizer.learning_rate = 0.3  # per 256 photos: 9.6 at 8192
    config.optimizer.schedule = "constant" if variant == "128gf" else "cosine"
    config.optimizer.warmup_epochs = 8000 * config.batch_size / 1e9  # 8,000 steps
    config.optimizer.warmup_start = 0.15
    config.optimizer.final = 1e-3
    config.optimizer.weight_decay = 1e-5
    if variant == "10b":
        config.batch_size = 7936  # 496 GPUs of 16
        config.data.lanes = 256
        config.data.crops = ((2, 160, 0.14, 1.0), (4, 96, 0.05, 0.14))
        config.swav.epsilon = 0.03
        config.optimizer.warmup_epochs = 0.0436
    return config
