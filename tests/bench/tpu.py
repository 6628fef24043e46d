"""TPU cycles of our grouped convolutions and of XLA's, by the compiler's estimate; needs no TPU.

The figures are for one block of the longest stage of every published network, forward and backward
in bfloat16. --depth measures how long a loop over the blocks, and the unrolled blocks, take to
compile. Takes about twenty minutes on two cores, and needs
`pip install --require-hashes -r requirements-tpu.txt`.
"""

import argparse
import functools
import os
import time
from typing import Any

import figures

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from hashvision.models import layers, norm, regnet, resnext
from hashvision.models.convnet import Stage
from hashvision.planning import hlo, plan

NAMES = (
    "resnext50_32x4d",
    *(f"resnext101_32x{width}d" for width in (8, 16, 32, 48)),
    *(f"regnety_{gf}" for gf in ("16gf", "32gf", "64gf", "128gf", "256gf", "10b")),
)
SIDE = 14  # side of the third stage's feature maps, for photos of 224 pixels


def third_stage(name: str, form: str, depth: int, unroll: int) -> tuple[Stage, int]:
    """The equal blocks of the longest stage, and their number of input channels."""
    conv = functools.partial(layers.GroupConv, form=form, dtype=jnp.bfloat16)
    norms = functools.partial(norm.BatchNorm, dtype=jnp.bfloat16)
    parts = {"norm": norms, "last_norm": norms, "conv": conv}
    if name in regnet.PARAMETERS:
        width, _, group = regnet.stage_shapes(regnet.PARAMETERS[name])[2]
        block = functools.partial(
            regnet.YBlock, width=width, group=group, dtype=jnp.bfloat16, **parts
        )
    else:
        found = resnext.PARAMETERS[name]
        width, inner = 1024, found.groups * found.group * 4
        block = functools.partial(
            resnext.Bottleneck, inner=inner, width=width, groups=found.groups, **parts
        )
    return Stage(block, depth, 1, unroll=unroll), width


def compiled(stage: Stage, width: int, photos: int, device: Any) -> tuple[int, float]:
    """The estimated cycles of a forward and backward pass, and the seconds of compilation."""
    sharding = jax.sharding.SingleDeviceSharding(device)

    def shaped(tree: Any) -> Any:
        shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
        return jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype), tree)

    x = shaped(jax.ShapeDtypeStruct((photos, SIDE, SIDE, width), jnp.bfloat16))
    variables = jax.eval_shape(functools.partial(stage.init, train=True), jax.random.key(0), x)

    def loss(params: Any, x: jax.Array, statistics: Any, weights: jax.Array) -> Any:
        each = {"params": params, "batch_stats": statistics}
        y, after = stage.apply(each, x, True, mutable=["batch_stats"])
        return jnp.vdot(y.astype(jnp.float32), weights.astype(jnp.float32)), after

    step = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    arguments = shaped((variables["params"], x, variables["batch_stats"], x))
    start = time.perf_counter()
    text = step.lower(*arguments).compile().as_text()
    return hlo.cycles(text), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(NAMES))
    parser.add_argument("--topologies", default="v5e:2x2")
    parser.add_argument("--photos", type=int, default=32)
    parser.add_argument("--depth", type=int, help="of a stage, scanned and unrolled, instead")
    arguments = parser.parse_args()
    for topology in arguments.topologies.split(","):
        device, kind = plan.devices_of(topology)[0], topology.partition(":")[0]
        for name in arguments.models.split(","):
            title = f"{name}/third_stage/b{arguments.photos}/{kind}"
            measure = functools.partial(compiled, photos=arguments.photos, device=device)
            if arguments.depth:
                depth = arguments.depth
                (loop, short), (whole, long) = (
                    measure(*third_stage(name, "packed", depth, unroll)) for unroll in (1, 0)
                )
                peer = f"the same {depth} blocks unrolled"
                found = [
                    figures.Figure(f"compile/{title}", "s", short, long, peer),
                    figures.Figure(
                        f"cycles/loop/{title}",
                        "Mcycles",
                        loop / 1e6,
                        whole / 1e6,
                        peer,
                    ),
                ]
            else:
                ours, native = (
                    measure(*third_stage(name, form, 1, 1))[0] / 1e6
                    for form in ("packed", "native")
                )
                peer = "XLA's grouped form"
                found = [figures.Figure(f"cycles/{title}", "Mcycles", ours, native, peer)]
            figures.write(found, figures.run())


if __name__ == "__main__":
    main()
