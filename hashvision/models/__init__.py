"""The networks, by name; the only room that imports Flax."""

from typing import Any

from hashvision.errors import UserError
from hashvision.models.heads import ProjectionHead
from hashvision.models.norm import Groups
from hashvision.models.regnet import PARAMETERS as _REGNETS
from hashvision.models.regnet import RegNetY
from hashvision.models.resnext import PARAMETERS as _RESNEXTS
from hashvision.models.resnext import ResNeXt

__all__ = ["NAMES", "Groups", "ProjectionHead", "RegNetY", "ResNeXt", "build"]

NAMES = (*_RESNEXTS, *_REGNETS)


def build(name: str, **options: Any) -> ResNeXt | RegNetY:
    """The network called `name`; options are the fields of RegNetY and ResNeXt.

    Raises:
      UserError: `name` is none of NAMES.
    """
    if name in _REGNETS:
        return RegNetY(_REGNETS[name], **options)
    if name in _RESNEXTS:
        return ResNeXt(_RESNEXTS[name], **options)
    raise UserError(f"model.name={name!r} is none of {', '.join(NAMES)}")
