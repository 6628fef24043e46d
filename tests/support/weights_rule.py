"""Weights drawn from their PyTorch names, so that goldens need not hold them; for both sides.

The bits are Philox's own (a published algorithm) and the rest is exact arithmetic, because NumPy
promises the stream of no `Generator` method across versions.
"""

import hashlib
import math

import numpy as np


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The parameter or statistic called `name`, float32, in PyTorch's layout.

    No value is one that an initializer would give, so that every parameter matters: convolutions
    uniform with variance 2 / fan-in (the input's scale survives a ReLU), BatchNorm scales in
    [0.8, 1.2), biases and running means in [-0.2, 0.2), running variances in [0.8, 2.8) (above 1,
    or the activations' variance would double with each residual block).
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
    """Images (B, H, W, 3), float32, with about the scale of normalised photos."""
    return (1.7 * uniform(name, math.prod(shape)).reshape(shape)).astype(np.float32)
