"""SWAG (Singh et al. 2022, arXiv 2201.08371): RegNetY on hashtags.

Variants: 16gf (the default), 32gf, 128gf.

python -m hashvision train --config=swag_regnety:128gf --config.dataset=DATASET \
    --workdir=WORKDIR --config.mesh.fsdp=8
"""

from typing import Any, Literal

import base


def get_config(variant: Literal["16gf", "32gf", "128gf"] = "16gf") -> Any:
    """224 px, batch 8192, SGD with Nesterov momentum and a half-cosine schedule, weight decay 1e-5.

    Models and resolution are those of the release. Batch, schedule and weight decay are from
    secondary sources. For the learning rate there is no source: it is the usual 0.1 per 256 photos.
    """
    config = base.get_config()
    config.batch_size = 8192
    config.epochs = 1.0  # about 5B samples, counting repeats of rare tags
    config.data.lanes = 1024
    config.data.sampling = "square_root"
    config.model.name = f"regnety_{variant}"
    config.model.zero_scale = False
    config.objective.loss = "softmax"
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 0.05
    config.optimizer.weight_decay = 1e-5
    return config
