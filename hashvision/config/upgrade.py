"""Upgrades configs of earlier versions to the present schema."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hashvision.config import schema
from hashvision.errors import UserError


class Renamed(NamedTuple):
    """A key of an earlier version, and the key that replaced it."""

    old: str
    new: str
    value: Callable[[Mapping[str, Any]], Any]  # the new value, from all old ones by dotted key


def _norm_photos(old: Mapping[str, Any]) -> int:
    """Photos of a BatchNorm group; `model.norm_groups` was the number of groups in a part."""
    part, groups = old["batch_size"] // old["accumulate"], old["model.norm_groups"]
    return 0 if groups == old["accumulate"] == 1 else part // groups


RENAMED = (
    Renamed("model.norm_groups", "model.norm_photos", _norm_photos),
    Renamed("knn.dataset", "evaluate_on", lambda old: old["knn.dataset"]),
    Renamed("knn.every", "evaluate_every", lambda old: old["knn.every"]),
)
# config.json has these keys in every version; a file without them is incomplete.
_ALWAYS = ("seed", "batch_size", "data.lanes", "data.sampling", "model.name", "objective.name")


def upgrade(values: Any, where: str = "config.json") -> dict[str, Any]:
    """Upgrades a config of any version to the present schema.

    A missing key gets its default, which leaves a run as it was before the key existed. A renamed
    key gets its new name and value.

    Args:
      values: nested dicts, as in config.json.
      where: the file they come from, for messages.

    Returns:
      Nested dicts with all keys of the schema; lists stay lists.

    Raises:
      UserError: a key is missing or unknown, or a value does not fit its key.
    """
    old = schema.flat(values) if isinstance(values, Mapping) else {}
    for key in _ALWAYS:
        if key not in old:
            raise UserError(f"{where} lacks {key}; copy it again from where `train` wrote it.")
    return schema.nested(upgraded(old, where))


def upgraded(values: dict[str, Any], where: str) -> dict[str, Any]:
    """As `upgrade`, from and to values by dotted key; in the order of the schema."""
    old = {**_DEFAULTS, **values}
    for name, new, value in RENAMED:
        if name in values:
            try:
                old[new] = value(old)
            except (ArithmeticError, TypeError, ValueError):
                raise UserError(
                    f"{where} sets {name}={values[name]!r}, which cannot be converted to {new}, the"
                    f" key's new name; set {new} instead."
                ) from None
            del old[name]
    for key in old:
        if key not in schema.KEYS:
            raise UserError(
                f"{where} sets {key}, which this version of hashvision does not have;"
                f" {nearest(key)}."
            )
    schema.check(old, where)
    return {key: old[key] for key in schema.KEYS}


def nearest(key: str) -> str:
    """Names the key that the user may mean by an unknown one, as part of a sentence."""
    renamed = [each.new for each in RENAMED if each.old == key]
    if renamed:
        return f"it is called {renamed[0]} now"
    same = [name for name in schema.KEYS if name.split(".")[-1] == key.split(".")[-1]]
    near = difflib.get_close_matches(key, schema.KEYS, 1) or same
    return f"the nearest is {near[0]}" if near else "`hashvision config` lists all keys"


_DEFAULTS = {key: each.default for key, each in schema.KEYS.items()}
