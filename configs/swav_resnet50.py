"""SwAV (Caron et al. 2020, arXiv 2006.09882): ResNet-50 on photos without tags.

Variants: 4096 (the default) and 256, the batch size.

python -m hashvision train --config=swav_resnet50 --config.dataset=DATASET --workdir=WORKDIR

--config.batch_size can be any multiple of model.norm_photos. Learning rate, queue, prototypes and
frozen steps follow from the batch and the dataset; `train` prints how.
"""

from typing import Any, Literal

import base


def get_config(variant: Literal["4096", "256"] = "4096") -> Any:
    """2x224 + 6x96 crops, LARC, cosine; batch 4096 for 800 epochs, or 256 with a queue for 200."""
    config = base.get_config()
    config.batch_size = int(variant)
    config.epochs = 800.0 if variant == "4096" else 200.0
    config.data.lanes = 128
    config.data.sampling = "natural"
    config.data.crops = ((2, 224, 0.14, 1.0), (6, 96, 0.05, 0.14))
    config.augment.distortion = 1.0
    config.augment.grey = 0.2
    config.augment.blur = 0.5
    config.model.name = "resnet50"
    config.model.zero_scale = False
    config.model.norm_photos = 512 if variant == "4096" else 0  # SyncBN over 8 GPUs of 64 photos
    config.objective.name = "swav"
    config.swav.temperature = 0.1
    config.swav.epsilon = 0.05
    config.swav.iterations = 3
    config.swav.head = (2048, 128)
    config.optimizer.name = "larc"
    config.optimizer.learning_rate = None  # 4.8 at 4096, 0.6 at 256
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 10.0 if variant == "4096" else 0.0
    config.optimizer.warmup_start = 0.3
    config.optimizer.final = 1e-3
    config.optimizer.weight_decay = 1e-6
    return config
