"""One of two hosts with four CPU devices each, in a mesh that alternates between the hosts.

It feeds a batch whose entries are the photos' numbers in the stream, and prints as JSON which of
them are on its own devices. The environment names the coordinator and the host's number.
"""

import json
import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from hashvision.training import sharding, state

BATCH = 32


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    address, host = os.environ["JAX_COORDINATOR_ADDRESS"], int(os.environ["JAX_PROCESS_ID"])
    jax.distributed.initialize(address, num_processes=2, process_id=host)
    devices = jax.devices()
    mesh = sharding.make_mesh(2, [devices[place % 2 * 4 + place // 2] for place in range(8)])
    assert [device.process_index for device in mesh.devices.flat] == [0, 1] * 4
    abstract = {"key": state.abstract_batch(BATCH, side=8, max_labels=1, mesh=mesh)["key"]}
    half = BATCH // 2
    own = np.arange(host * half, (host + 1) * half, dtype=np.uint32)
    batches = [(None, {"key": np.stack([own, own], 1)})] * 2
    batch = next(sharding.on_devices((batch for _, batch in batches), abstract))["key"]
    here = [int(x) for shard in batch.addressable_shards for x in np.asarray(shard.data)[:, 0]]
    whole = np.asarray(multihost_utils.process_allgather(batch, tiled=True))[:, 0]
    print(json.dumps({"own": own.tolist(), "here": here, "whole": whole.tolist()}), flush=True)


main()
