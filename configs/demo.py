"""RegNetY-200MF at 96 px on a few thousand posts: two cores, some twenty minutes.

python -m hashvision train --config=configs/demo.py --config.dataset=DATASET --workdir=WORKDIR
"""

import base
import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The demo; `bash launch/local.sh` shortens it for the drawn posts."""
    config = base.get_config()
    config.batch_size = 64
    config.epochs = 30.0
    config.data.resolution = 96
    config.data.smallest_crop = 0.2
    config.model.name = "regnety_200mf"
    config.model.dtype = "float32"
    config.model.unroll = 0
    config.optimizer.learning_rate = 0.4
    config.optimizer.warmup_epochs = 2.0
    config.log_every = 20
    config.checkpoint.every = 500
    return config
