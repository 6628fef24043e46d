"""Weights drawn from their PyTorch names, for JAX and PyTorch, so that goldens need not store them.

The random bits come from Philox (a published algorithm), and the rest is exact arithmetic, because
NumPy does not promise that the streams of `Generator` methods stay the same across versions.
"""

import hashlib
import math

import numpy as np


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The parameter or statistic called `name`, float32, in PyTorch's layout.

    The values differ from those of initializers, so that every parameter matters. Convolutions are
    uniform with variance 2 / fan-in, which keeps the scale through a ReLU. BatchNorm scales are in
    [0.8, 1.2), biases and running means in [-0.2, 0.2), and running variances in [0.8, 2.8): below
    1 on average, the activations' variance would double with each residual block.
    """
    unit = uniform(name, math.prod(shape)).reshape(shape)
    if name.endswith("running_var"):
        return (1.8 + unit).astype(np.float32)
    if len(shape) > 1:
        return (unit * math.sqrt(3 * 2 / math.prod(shape[1:]))).astype(np.float32)
    if name.endswith("weight"):
        return (1 + 0.2 * unit).astype(np.float32)
    return (0.2 * unit).astype(np.float32)


def uniform(name: str, count: int) -> np.ndarray:
    """`count` numbers in [-1, 1), multiples of 2^-31, float64, keyed by `name`."""
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
    words = np.random.Philox(key=key).random_raw(-(-count // 2)).astype("<u8")
    return words.view("<u4")[:count] / 2.0**31 - 1


def images(name: str, shape: tuple[int, int, int, int]) -> np.ndarray:
    """Images (B, H, W, 3), float32, with roughly the scale of normalised photos."""
    return (1.7 * uniform(name, math.prod(shape)).reshape(shape)).astype(np.float32)
