"""RegNetY-200MF at 96 px on a few thousand posts: two cores, half an hour.

python -m hashvision train --config=configs/demo.py --config.dataset=DATASET --workdir=WORKDIR

Variants: sigmoid, the comparison loss; drawn, the two minutes of `bash launch/local.sh`.
"""

from typing import Any, Literal

import base


def get_config(variant: Literal["softmax", "sigmoid", "drawn"] = "softmax") -> Any:
    """Small batches, because a short run is decided by how many steps it takes."""
    config = base.get_config()
    config.batch_size = 32
    config.epochs = 30.0
    config.data.sampling = "natural"
    config.data.photo_size = 192
    config.data.crops = ((1, 96, 0.2, 1.0),)
    config.augment.distortion = 0.4
    config.augment.grey = 0.1
    config.model.name = "regnety_200mf"
    config.model.dtype = "float32"
    config.model.unroll = 0
    config.objective.loss = "sigmoid" if variant == "sigmoid" else "softmax"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 8e-3  # 1e-3 at batch 32
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_epochs = 1.0
    config.log_every = 20
    config.checkpoint.every = 500
    if variant == "drawn":
        config.data.sampling = "square_root"
        config.augment.distortion = 0.0
        config.augment.grey = 0.0
        config.data.photo_size = 128
        config.data.crops = ((1, 64, 0.6, 1.0),)  # an object may stand anywhere in a drawn scene
        config.epochs = 4.0
        config.optimizer.learning_rate = 16e-3
        config.optimizer.warmup_epochs = 0.5
    return config
