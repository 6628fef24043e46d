"""WSL (Mahajan et al. 2018, arXiv 1805.00932): ResNeXt-101 on hashtags. Variants 32x8d to 32x48d.

python -m hashvision train --config=configs/wsl_resnext101.py:32x16d --config.dataset=DATASET \
    --workdir=WORKDIR
"""

from typing import Any, Literal

import base


def get_config(variant: Literal["32x8d", "32x16d", "32x32d", "32x48d"] = "32x16d") -> Any:
    """Batch 8064 (336 GPUs of 24), SGD, LR 0.1 per 256 photos, halvings.

    Widths and depths are those of the released models. Batch and sampling come from accounts of the
    paper; learning rate, weight decay and the number of halvings (10 to 20) are reported second
    hand, and no code was released to check them against.
    """
    config = base.get_config()
    config.batch_size = 8064
    config.epochs = 2.0  # the paper counts images seen; its 3.5B photos pass about once or twice
    config.data.lanes = 384  # divides the batch, and up to 128 hosts divide it
    config.data.sampling = "square_root"
    config.model.name = f"resnext101_{variant}"
    config.objective.loss = "softmax"
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = "halving"
    config.optimizer.halvings = 10
    config.optimizer.warmup_epochs = 0.05
    config.optimizer.weight_decay = 1e-4
    return config
