"""Demo: RegNetY-200MF at 96 px on the hashtags of a few thousand posts, half an hour on two cores.

python -m hashvision train --config=demo --config.dataset=DATASET --workdir=WORKDIR

Variants: softmax, the default; sigmoid, another loss for comparison; drawn, the two minutes of
training of `bash launch/local.sh`.
"""

from typing import Any, Literal

import base


def get_config(variant: Literal["softmax", "sigmoid", "drawn"] = "softmax") -> Any:
    """The batch is small because in a short run the number of steps matters most."""
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
        config.data.crops = (
            (1, 64, 0.6, 1.0),
        )  # objects are anywhere in a drawn scene, so crops are large
        config.epochs = 4.0
        config.optimizer.learning_rate = 16e-3
        config.optimizer.warmup_epochs = 0.5
    return config
