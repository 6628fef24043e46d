"""Maps the parameters of PyTorch networks, in three naming schemes, to those of our networks."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Naming(NamedTuple):
    """How one library names the modules of one family."""

    stem: dict[str, str]  # module -> ours
    block: str  # regex before a block's modules; its groups are the stage (from 1) and the block
    first: int  # the number of a stage's first block
    modules: dict[str, str]  # module within a block -> ours


TIMM_REGNET = Naming(
    stem={"stem.conv": "stem_conv", "stem.bn": "stem_norm"},
    block=r"s(\d+)\.b(\d+)\.",
    first=1,
    modules={
        "conv1.conv": "conv1",
        "conv1.bn": "norm1",
        "conv2.conv": "conv2",
        "conv2.bn": "norm2",
        "se.fc1": "squeeze_excite.reduce",
        "se.fc2": "squeeze_excite.expand",
        "conv3.conv": "conv3",
        "conv3.bn": "norm3",
        "downsample.conv": "shortcut_conv",
        "downsample.bn": "shortcut_norm",
    },
)
TORCHVISION_REGNET = Naming(
    stem={"stem.0": "stem_conv", "stem.1": "stem_norm"},
    block=r"trunk_output\.block(\d+)\.block\d+-(\d+)\.",
    first=0,
    modules={
        "f.a.0": "conv1",
        "f.a.1": "norm1",
        "f.b.0": "conv2",
        "f.b.1": "norm2",
        "f.se.fc1": "squeeze_excite.reduce",
        "f.se.fc2": "squeeze_excite.expand",
        "f.c.0": "conv3",
        "f.c.1": "norm3",
        "proj.0": "shortcut_conv",
        "proj.1": "shortcut_norm",
    },
)
TORCHVISION_RESNEXT = Naming(
    stem={"conv1": "stem_conv", "bn1": "stem_norm"},
    block=r"layer(\d+)\.(\d+)\.",
    first=0,
    modules={
        "conv1": "conv1",
        "bn1": "norm1",
        "conv2": "conv2",
        "bn2": "norm2",
        "conv3": "conv3",
        "bn3": "norm3",
        "downsample.0": "shortcut_conv",
        "downsample.1": "shortcut_norm",
    },
)


class Place(NamedTuple):
    """A leaf of our variables, and the index of its block if the leaf stacks a scanned stage."""

    path: tuple[str, ...]
    block: int | None


def place(naming: Naming, name: str) -> Place:
    """The place in our variables of the tensor that PyTorch calls `name`.

    A stage's first block is `first`; the others are stacked on axis 0 of `rest`.

    Raises:
      KeyError: the naming has no such tensor.
    """
    module, leaf = name.rsplit(".", 1)
    block = re.match(naming.block, module + ".")
    index = None
    if block is None:
        path = (naming.stem[module],)
    else:
        number = int(block[2]) - naming.first
        index = number - 1 if number else None
        ours = naming.modules[module[block.end() :]].split(".")
        path = (f"stage{block[1]}", "rest" if number else "first", *ours)
    if leaf.startswith("running_"):
        return Place(("batch_stats", *path, leaf.removeprefix("running_")), index)
    if leaf == "weight":
        leaf = "scale" if "norm" in path[-1] else "kernel"
    return Place(("params", *path, leaf), index)


def layout(path: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
    """A PyTorch tensor in the layout of our leaf at `path`.

    Convolutions go from (D, C, h, w) to (h, w, C, D). The 1x1 convolutions of
    squeeze-and-excitation become the (C, D) kernels of dense layers. Vectors stay unchanged.
    """
    if tensor.ndim < 4:
        return tensor
    kernel = tensor.transpose(2, 3, 1, 0)
    return kernel[0, 0] if "squeeze_excite" in path else kernel


def variables(naming: Naming, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our variables {"params": ..., "batch_stats": ...} from PyTorch's tensors by name.

    Raises:
      KeyError: the naming lacks one of the tensors, or a scanned stage lacks a block.
    """
    leaves: dict[tuple[str, ...], Any] = {}
    stacks: dict[tuple[str, ...], dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        path, index = place(naming, name)
        if index is None:
            leaves[path] = layout(path, tensor)
        else:
            stacks.setdefault(path, {})[index] = layout(path, tensor)
    for path, blocks in stacks.items():
        leaves[path] = np.stack([blocks[index] for index in range(len(blocks))])
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def find(naming: Naming, tree: Mapping[str, Any], name: str) -> np.ndarray:
    """The part of our variables (or of their gradients) that PyTorch calls `name`."""
    path, index = place(naming, name)
    leaf: Any = tree
    for key in path:
        leaf = leaf[key]
    return np.asarray(leaf if index is None else leaf[index])
