"""A config explained key by key: its value, what set it, what it takes and what it means."""

import json
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from hashvision.config import recipes, schema

_KEYS, _VALUES = 25, 52  # widths of the columns up to the end of keys, and of values


class Setting(NamedTuple):
    """A key of a config with its value and what set it."""

    key: str  # dotted
    value: Any
    source: str  # base, recipe or override
    takes: str
    meaning: str

    def row(self) -> str:
        """The setting as a row of the table; after a long value it continues on the next line."""
        start = f"{self.key:<{_KEYS}} {typed(self.value)}"
        start = start.ljust(_VALUES) if len(start) < _VALUES else f"{start}\n{'':{_VALUES}}"
        return f"{start}{self.source:<10}{self.meaning} ({self.takes})"


class Explained(NamedTuple):
    """A complete config and where its values come from."""

    recipe: str  # FILE.py:VARIANT
    schema: str  # the file with the defaults
    overrides: list[str]
    groups: dict[str, str]  # what all keys of a group have in common
    settings: list[Setting]

    def table(self) -> str:
        """The table that is printed: a row per key, by group, with values quoted for a shell."""
        given = shlex.join(self.overrides) or "none"
        lines = [f"base      {self.schema}", f"recipe    {self.recipe}", f"override  {given}"]
        groups: dict[str, list[str]] = {"": []}
        for setting in self.settings:
            groups.setdefault(setting.key.rpartition(".")[0], []).append(setting.row())
        for group, rows in groups.items():
            meaning = self.groups.get(group)
            lines += ["", *([f"{group}: {meaning}"] if meaning else []), *rows]
        return "\n".join(lines)

    def as_json(self) -> str:
        """The same for programs; tuples become lists."""
        settings = {
            setting.key: {name: x for name, x in setting._asdict().items() if name != "key"}
            for setting in self.settings
        }
        return json.dumps({**self._asdict(), "settings": settings}, indent=1, ensure_ascii=False)


def explain(file: str, overrides: Sequence[str]) -> Explained:
    """The config that `load` returns, with the source and meaning of each key, in schema order.

    A recipe's value that equals the schema's default counts as the schema's.

    Raises:
      UserError: as `load`.
    """
    recipe = recipes.read(file)
    changed = {recipes.apply(recipe, override) for override in overrides}
    values, settings = schema.flat(recipe.config), []
    for key, (default, takes, meaning) in schema.KEYS.items():
        differs = recipe.values[key] != default
        source = "override" if key in changed else "recipe" if differs else "base"
        settings.append(Setting(key, values[key], source, takes.words, meaning))
    base = recipes.shown(schema.__file__)
    return Explained(recipe.name, base, list(overrides), schema.GROUPS, settings)


def typed(value: Any) -> str:
    """A value as one would type it after --config.KEY= in a shell."""
    return shlex.quote(str(value))
