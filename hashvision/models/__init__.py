"""The networks, by name; the only package that imports Flax."""

from typing import Any

import flax.linen as nn

from hashvision.config import Config
from hashvision.errors import UserError
from hashvision.models import convnet, regnet, resnext
from hashvision.models.heads import ProjectionHead
from hashvision.models.network import Network, Variables, from_module
from hashvision.models.norm import Groups
from hashvision.models.regnet import RegNetY
from hashvision.models.resnext import ResNeXt

__all__ = [
    "FAMILIES",
    "Groups",
    "Network",
    "ProjectionHead",
    "RegNetY",
    "ResNeXt",
    "Variables",
    "build",
    "from_module",
    "names",
    "projection_head",
    "trunk",
]

# A family is a module with PARAMETERS (network name -> parameters), build and from_config.
FAMILIES: tuple[Any, ...] = (resnext, regnet)


def names() -> list[str]:
    """The names that config.model.name takes."""
    return [name for family in FAMILIES for name in family.PARAMETERS]


def trunk(config: Config, platform: str) -> Network:
    """The trunk called config.model.name.

    Args:
      config: of the run; the network's family reads its options from it.
      platform: of the devices: "cpu", "tpu" or "gpu".

    Raises:
      UserError: no network has this name, or its options do not fit.
    """
    return from_module(_family(config.model.name).from_config(config, platform))


def projection_head(config: Config) -> Network:
    """The projection head of SwAV and SEER that config.swav describes."""
    head = ProjectionHead(
        widths=config.swav.head,
        norm=config.swav.head_norm,
        norm_groups=convnet.norm_groups(config),
        dtype=convnet.DTYPES[config.model.dtype],
    )
    return from_module(head)


def build(name: str, **options: Any) -> nn.Module:
    """The Flax module called `name`; options are the fields of its family's module.

    Raises:
      UserError: no network has this name.
    """
    return _family(name).build(name, **options)


def _family(name: str) -> Any:
    for family in FAMILIES:
        if name in family.PARAMETERS:
            return family
    raise UserError(
        f"There is no network {name!r}; set --config.model.name to one of {', '.join(names())}."
    )
