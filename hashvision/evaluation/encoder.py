"""A workdir's network as evaluation takes it: restored, or freshly initialised to compare with."""

import jax
import numpy as np

from hashvision.evaluation.features import Encoder
from hashvision.training import program as programs
from hashvision.training import state as states
from hashvision.training import workdir as workdirs
from hashvision.training.checkpoint import Checkpoints

BATCH_SIZE = 64


def load(workdir: str, untrained: bool = False) -> Encoder:
    """The network of the newest checkpoint in `workdir`; its moving average where it has one.

    Args:
      workdir: of a run.
      untrained: take the same network as it was before its first step.

    Raises:
      UserError: `workdir` holds no run, or no checkpoint that fits its config.
    """
    config, vocabulary = workdirs.read(workdir)
    # One device is enough, and leaves the checkpoint's mesh out of it. A loop compiles faster.
    config.mesh.fsdp = config.model.unroll = 1
    workdirs.keep_compiled()
    classes = len(vocabulary["classes"])
    program = programs.build(config, classes, 1.0, devices=jax.local_devices()[:1])
    if untrained:
        state = programs.initial_state(program, config.seed)
    else:
        checkpoints = Checkpoints(workdir, read_only=True)
        state = checkpoints.restore(program.abstract)
        checkpoints.close()
    params, extra = states.evaluated(state)
    predict = jax.jit(program.objective.predict)

    def encode(images: np.ndarray) -> tuple[jax.Array, jax.Array | None]:
        return predict(params, extra, images)

    resolution = programs.crops_of(config)[0].size
    return Encoder(encode, resolution, int(state.step), vocabulary, BATCH_SIZE)
