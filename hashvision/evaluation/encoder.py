"""A workdir's network as evaluation takes it: restored, or freshly initialised to compare with."""

import jax

from hashvision.evaluation.features import Encoder
from hashvision.training import mesh as meshes
from hashvision.training import program as programs
from hashvision.training import workdir as workdirs
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
    meshes.find_devices()
    config, vocabulary = workdirs.read(workdir)
    config.model.unroll = 1  # a loop compiles faster
    workdirs.keep_compiled()
    network = programs.network(config, len(vocabulary["classes"]))
    if untrained:
        step, taken = 0, programs.initial_state(network, config.seed)
    else:
        checkpoints = Checkpoints(workdir, read_only=True)
        step, taken = checkpoints.restore_network(network.abstract)
        checkpoints.close()
    params = taken.pop("params")
    return Encoder(
        programs.predictor(network, params, taken),
        programs.crops_of(config)[0].size,
        step,
        vocabulary,
        batch_size(),
        leads=jax.process_index() == 0,
    )


def batch_size() -> int:
    """Photos of a batch: as many for each device."""
    devices = jax.device_count()
    return -(-_PHOTOS // devices) * devices
