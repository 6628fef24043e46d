"""A workdir's network as evaluation takes it: restored, or freshly initialised to compare with."""

import jax

from hashvision.evaluation.features import Encoder
from hashvision.pixels import crops
from hashvision.training import compilation, program, run, sharding
from hashvision.training.checkpoint import Checkpoints

_PHOTOS = 64  # of a batch, at least


def load(workdir: str, untrained: bool = False) -> Encoder:
    """The network of the newest checkpoint in `workdir`; its moving average where it has one.

    Nothing but the network is read, and each device of each host holds a part of it.

    Args:
      workdir: of a run.
      untrained: take the same network as it was before its first step.

    Raises:
      UserError: `workdir` holds no run, or no checkpoint that fits its config.
    """
    sharding.find_devices()
    config, vocabulary = run.read(workdir)
    config.model.unroll = 1  # a loop compiles faster
    compilation.use_cache()
    built = program.build_evaluation(config, len(vocabulary["classes"]))
    if untrained:
        step, taken = 0, program.initial_state(built, config.seed)
    else:
        checkpoints = Checkpoints(workdir, read_only=True)
        step, taken = checkpoints.restore_network(built.abstract)
        checkpoints.close()
    params = taken.pop("params")
    return Encoder(
        program.predictor(built, params, taken),
        crops.from_config(config)[0].size,
        step,
        vocabulary,
        batch_size(),
        leads=jax.process_index() == 0,
    )


def batch_size() -> int:
    """Photos of a batch: as many for each device."""
    devices = jax.device_count()
    return -(-_PHOTOS // devices) * devices
