"""WSL (Mahajan et al. 2018, arXiv 1805.00932): ResNeXt-101 on hashtags.

Variants: 32x8d, 32x16d (the default), 32x32d and 32x48d.

python -m hashvision train --config=wsl_resnext101:32x16d --config.dataset=DATASET \
    --workdir=WORKDIR
"""

from typing import Any, Literal

import base


def get_config(variant: Literal["32x8d", "32x16d", "32x32d", "32x48d"] = "32x16d") -> Any:
    """Batch 8064 (336 GPUs of 24 photos), SGD, learning rate 0.1 per 256 photos, halved ten times.

    Widths and depths are those of the released models. Batch and sampling are from accounts of the
    paper. Learning rate, weight decay and the number of halvings (10 to 20) are from secondary
    sources; there is no released code to check them.
    """
    config = base.get_config()
    config.batch_size = 8064
    config.epochs = 2.0  # the paper counts images seen: its 3.5B photos pass about once or twice
    config.data.lanes = 384  # divides the batch, and is divided by up to 128 hosts
    config.data.sampling = "square_root"
    config.model.name = f"resnext101_{variant}"
    config.objective.loss = "softmax"
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = "halving"
    config.optimizer.halvings = 10
    config.optimizer.warmup_epochs = 0.05
    config.optimizer.weight_decay = 1e-4
    return config
