"""Loads a workdir's network for evaluation: restored, or freshly initialised for comparison."""

import jax

from hashvision.evaluation.features import Encoder
from hashvision.pixels import crops
from hashvision.training import compilation, program, run, sharding
from hashvision.training.checkpoint import Checkpoints

_PHOTOS = 64  # smallest batch


def load(workdir: str, *, untrained: bool = False) -> Encoder:
    """The network of the newest checkpoint in `workdir`: its moving average if there is one.

    It reads only the network, and each device of each host holds a part of it.

    Args:
      workdir: of a run.
      untrained: return the same network as it was before its first step.

    Raises:
      UserError: `workdir` holds no run, or no checkpoint that fits its config.
    """
    sharding.find_devices()
    config, vocabulary = run.read(workdir)
    config.model.unroll = 1  # a loop compiles faster
    compilation.use_cache()
    built = program.build_evaluation(config, len(vocabulary["classes"]))
    if untrained:
        step, network = 0, program.initial_state(built, config.seed)
    else:
        checkpoints = Checkpoints(workdir, read_only=True)
        step, network = checkpoints.restore_network(built.abstract)
        checkpoints.close()
    params = network.pop("params")
    return Encoder(
        encode=program.predictor(built, params, network),
        resolution=crops.from_config(config)[0].size,
        step=step,
        vocabulary=vocabulary,
        batch_size=batch_size(),
        leads=jax.process_index() == 0,
    )


def batch_size() -> int:
    """Photos per batch: at least 64, and the same number for each device."""
    devices = jax.device_count()
    return -(-_PHOTOS // devices) * devices
