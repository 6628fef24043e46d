"""Demo of SwAV: RegNetY-200MF on a few thousand photos without tags, forty minutes on two cores.

python -m hashvision train --config=demo_swav --config.dataset=DATASET --workdir=WORKDIR
"""

from typing import Any

import base


def get_config() -> Any:
    """Few prototypes, a high temperature and AdamW.

    With the published settings the loss of small batches stays at ln K.
    """
    config = base.get_config()
    config.batch_size = 32
    config.epochs = 9.0
    config.data.sampling = "natural"
    config.data.photo_size = 192
    config.data.crops = ((2, 96, 0.2, 1.0), (4, 48, 0.08, 0.3))
    config.augment.distortion = 0.4
    config.augment.grey = 0.1
    config.model.name = "regnety_200mf"
    config.model.dtype = "float32"
    config.model.unroll = 0
    config.objective.name = "swav"
    config.swav.prototypes = 60
    config.swav.temperature = 0.3
    config.swav.head = (512, 128)
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 8e-3  # 1e-3 at batch 32
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_epochs = 1.0
    config.log_every = 20
    config.checkpoint.every = 500
    return config
