"""The whole schema: every key a recipe may set, with its default and what it means.

What a key means stands behind it, or right above; `python -m hashvision config` prints it.
"""

from typing import Any

import ml_collections
from ml_collections import config_dict


def _group() -> Any:
    return ml_collections.ConfigDict()


def get_config() -> Any:
    """The defaults; recipes start from these."""
    config = _group()
    config.seed = 0  # of the first parameters, the order of photos, their crops and colours

    config.dataset = ""  # a folder made by `python -m hashvision prepare`
    config.batch_size = 256  # photos a step, over all devices
    config.accumulate = 1  # parts of a batch that gradients are summed over, one after the other
    config.epochs = 30.0  # of epoch_length photos each
    # photos, repeats counted; those of the dataset that the run begins with if unset
    config.epoch_length = config_dict.placeholder(float)
    config.steps = config_dict.placeholder(int)  # of the run; as many as epochs take if unset

    # The photos; evaluation sees them at the first size of crops.
    config.data = data = _group()
    data.lanes = 8  # at least as many as hosts; divides the batch. Changing it changes the order
    data.sampling = "square_root"  # natural, square_root or uniform (WSL, section 2.2)
    data.sampling_threshold = config_dict.placeholder(float)  # t; the mean class frequency if unset
    data.max_labels = 16  # tags kept of a photo
    data.photo_size = 512  # pixels: photos with a longer side are shrunk to it before crops are cut
    # a row for each size: how many of a photo, pixels a side, least and largest share of its area
    data.crops = ((1, 224, 0.08, 1.0),)
    data.broken = 0.001  # share of a host's records that may be unreadable before the run stops
    data.threads = config_dict.placeholder(int)  # of the input pipeline; one a core if unset

    # Done on the device to each crop by itself; 0 leaves it out. Flips are always drawn.
    config.augment = augment = _group()
    augment.distortion = 0.0  # strength of the colour distortion; SwAV's is 1
    augment.grey = 0.0  # probability
    augment.blur = 0.0  # probability

    config.init_from = ""  # a workdir whose trunk this run starts from
    config.model = model = _group()
    model.name = "resnext101_32x16d"  # the trunk: a ResNet, ResNeXt or RegNetY of hashvision/models
    model.dtype = "bfloat16"  # of compute; parameters, statistics and logits are float32
    model.norm_photos = 0  # photos that share BatchNorm's statistics; 0: all of a step
    model.zero_scale = True  # each block's last BatchNorm starts at 0 (WSL), or at 1 (RegNet)
    model.remat = (False, False, False, False)  # whether to compute activations again, by stage
    model.unroll = 1  # equal blocks per loop iteration; 0 unrolls: slow to compile, fast on CPU
    model.group_conv = "auto"  # blocks, packed or native; auto goes by the backend

    config.objective = objective = _group()
    objective.name = "hashtag"  # hashtag or swav
    objective.loss = "softmax"  # softmax or sigmoid (hashtag)
    objective.label_smoothing = 0.0  # how much of a target is spread evenly, in [0, 1) (hashtag)

    # What is unset follows from the batch and the dataset; `train` prints how.
    config.swav = swav = _group()
    swav.prototypes = config_dict.placeholder(int)  # clusters that photos are assigned to
    swav.temperature = 0.1  # of the softmax over prototypes
    swav.epsilon = 0.05  # of Sinkhorn's entropy: the smaller, the sharper the codes
    swav.iterations = 3  # of Sinkhorn
    swav.assigned = 2  # the first so many crops of the first size give codes
    swav.head = (2048, 128)  # widths of the projection
    swav.head_norm = True  # whether the projection has BatchNorm
    swav.frozen_steps = config_dict.placeholder(int)  # in which prototypes stay as they began
    swav.queue = config_dict.placeholder(int)  # photos remembered, a multiple of the batch; 0: none
    swav.queue_start = config_dict.placeholder(int)  # step from which the queue is used
    swav.patience = config_dict.placeholder(int)  # steps without learning that stop the run

    config.optimizer = optimizer = _group()
    optimizer.name = "sgd"  # sgd, larc or adamw
    optimizer.learning_rate = 0.1  # per 256 photos; scaled by batch_size / 256
    optimizer.schedule = "cosine"  # cosine, halving, constant or plateau
    optimizer.plateau_steps = 1000  # the loss's mean over these; three without a fall halve the LR
    optimizer.warmup_epochs = 1.0  # in which the learning rate rises to its peak
    optimizer.final = 0.0  # last learning rate as a share of the peak (cosine)
    optimizer.halvings = 10  # of the learning rate, at even distances (halving)
    optimizer.momentum = 0.9  # of sgd (Nesterov's) and larc; adamw's beta 1
    optimizer.weight_decay = 1e-4  # of kernels; of all parameters (larc)
    optimizer.clip = 0.0  # largest global norm of the gradients; 0: none
    optimizer.average = 0.0  # decay of the moving average of parameters; 0: none

    config.mesh = mesh = _group()
    mesh.fsdp = 1  # devices the state is sharded over; the batch is sharded over all

    config.hosts = hosts = _group()
    hosts.join = 300.0  # seconds for all hosts to appear
    hosts.lost = 30.0  # seconds of silence after which a host counts as lost, and the others end

    config.knn = _group()
    config.knn.dataset = ""  # labelled photos to sort by nearest neighbours while training
    config.knn.every = 1000  # steps from one sorting to the next

    config.log_every = 50  # steps from one line of metrics to the next
    config.profile = ()  # (first step, how many) to trace into WORKDIR/tensorboard
    config.checkpoint = checkpoint = _group()
    checkpoint.every = 1000  # steps from one to the next
    checkpoint.keep = 3  # of the newest; the one with the lowest loss is kept besides
    return config
