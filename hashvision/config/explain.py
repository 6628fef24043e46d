"""Explains a config key by key: its value, what set it, the values it takes and its meaning."""

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
        """The setting as a row of the table; a long value takes a line of its own."""
        start = f"{self.key:<{_KEYS}} {typed(self.value)}"
        start = start.ljust(_VALUES) if len(start) < _VALUES else f"{start}\n{'':{_VALUES}}"
        return f"{start}{self.source:<10}{self.meaning} ({self.takes})"


class Explained(NamedTuple):
    """A complete config and where its values come from."""

    recipe: str  # FILE.py:VARIANT
    schema: str  # path of the file with the defaults
    overrides: list[str]
    groups: dict[str, str]  # a note for each group of keys
    settings: list[Setting]

    def table(self) -> str:
        """The table to print: a row per key, by group, with values quoted for a shell."""
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
        """The same as JSON; tuples become lists."""
        settings = {
            setting.key: {name: x for name, x in setting._asdict().items() if name != "key"}
            for setting in self.settings
        }
        return json.dumps({**self._asdict(), "settings": settings}, indent=1, ensure_ascii=False)


def explain(file: str, overrides: Sequence[str]) -> Explained:
    """Explains the config that recipes.load returns for the same arguments, in schema order.

    The source of a value is "base" if the recipe sets it to the schema's default.

    Raises:
      UserError: as recipes.load.
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
    """Formats a value as a user types it after --config.KEY= in a shell."""
    return shlex.quote(str(value))
