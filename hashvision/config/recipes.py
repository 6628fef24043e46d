"""A recipe and its overrides made into the config of a run, whole by the schema.

A recipe is a Python file whose get_config returns an ml_collections.ConfigDict; it starts from
that of `base.py` beside it, which is the schema's, and may take a variant.
"""

import contextlib
import difflib
import importlib.util
import inspect
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from hashvision.config import Config, schema
from hashvision.errors import UserError

_KEYS, _VALUES = 25, 52  # widths of the columns up to the end of keys, and of values


class Renamed(NamedTuple):
    """A key that an earlier version had, and the one that took its place."""

    old: str
    new: str
    value: Callable[[Mapping[str, Any]], Any]  # of the new key, from all old values by dotted key


def _norm_photos(old: Mapping[str, Any]) -> int:
    """Photos of a BatchNorm group, where `model.norm_groups` said how many groups a part has."""
    part, groups = old["batch_size"] // old["accumulate"], old["model.norm_groups"]
    return 0 if groups == old["accumulate"] == 1 else part // groups


RENAMED = (Renamed("model.norm_groups", "model.norm_photos", _norm_photos),)
# In the config.json of every version: one that lacks any of them is not whole.
_ALWAYS = ("seed", "batch_size", "data.lanes", "data.sampling", "model.name", "objective.name")


class Setting(NamedTuple):
    """A key of a config, resolved."""

    key: str  # dotted
    value: Any
    source: str  # base, recipe or override
    takes: str
    meaning: str

    def row(self) -> str:
        """The setting in columns; what stands behind a long value moves to the next line."""
        start = f"{self.key:<{_KEYS}} {typed(self.value)}"
        start = start.ljust(_VALUES) if len(start) < _VALUES else f"{start}\n{'':{_VALUES}}"
        return f"{start}{self.source:<10}{self.meaning} ({self.takes})"


class Explained(NamedTuple):
    """A resolved config and where it comes from."""

    recipe: str  # FILE.py:VARIANT
    schema: str  # the file with the defaults
    overrides: list[str]
    groups: dict[str, str]  # what all keys of a group have in common
    settings: list[Setting]

    def table(self) -> str:
        """As it is printed: a row a key, by group, values as they are typed behind --config.KEY=.

        Values are quoted for a shell.
        """
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
        """The same for machines; a tuple is a list."""
        settings = {
            setting.key: {name: x for name, x in setting._asdict().items() if name != "key"}
            for setting in self.settings
        }
        return json.dumps({**self._asdict(), "settings": settings}, indent=1, ensure_ascii=False)


class _Recipe(NamedTuple):
    name: str  # FILE.py:VARIANT
    values: dict[str, Any]  # its own, before any override, by dotted key
    config: Config  # locked


def load(file: str, overrides: Sequence[str]) -> Config:
    """The config that a command line asks for.

    Args:
      file: FILE.py or FILE.py:VARIANT; Python code, which is run.
      overrides: each --config.KEY=VALUE; the last of a key counts.

    Returns:
      A locked ml_collections.ConfigDict.

    Raises:
      UserError: there is no such recipe, variant or key, the recipe fails, or a value does not fit.
    """
    recipe = _read(file)
    for override in overrides:
        _apply(recipe, override)
    return recipe.config


def explain(file: str, overrides: Sequence[str]) -> Explained:
    """The config that `load` returns, with each key's source and meaning, in the schema's order.

    A value that a recipe states again, as the schema has it, counts as the schema's.

    Raises:
      UserError: as `load`.
    """
    recipe = _read(file)
    changed = {_apply(recipe, override) for override in overrides}
    values, settings = schema.flat(recipe.config), []
    for key, (default, takes, meaning) in schema.KEYS.items():
        differs = recipe.values[key] != default
        source = "override" if key in changed else "recipe" if differs else "base"
        settings.append(Setting(key, values[key], source, takes.words, meaning))
    base = _shown(schema.__file__)
    return Explained(recipe.name, base, list(overrides), schema.GROUPS, settings)


def upgrade(values: Any, where: str = "config.json") -> dict[str, Any]:
    """The config of an earlier version as today's schema has it.

    A key that is new gets its default, with which a run is what it was before there was the key; a
    key that was renamed gets its new name and value.

    Args:
      values: nested dicts, as config.json holds them.
      where: what holds them, for a sentence.

    Returns:
      Nested dicts of all keys of the schema; lists stay lists.

    Raises:
      UserError: it is not whole, a key is not known, or a value is not what its key takes.
    """
    old = schema.flat(values) if isinstance(values, Mapping) else {}
    for key in _ALWAYS:
        if key not in old:
            raise UserError(f"{where} lacks {key}; copy it again from where `train` wrote it.")
    return schema.nested(_upgraded(old, where))


def _upgraded(values: dict[str, Any], where: str) -> dict[str, Any]:
    """All keys of the schema, in its order, from those of any version, by dotted key."""
    old = {**_DEFAULTS, **values}
    for name, new, value in RENAMED:
        if name in values:
            try:
                old[new] = value(old)
            except (ArithmeticError, TypeError, ValueError):
                raise UserError(
                    f"{where} sets {name}={values[name]!r}, from which no {new} follows, as that"
                    " key is called now."
                ) from None
            del old[name]
    for key in old:
        if key not in schema.KEYS:
            raise UserError(
                f"{where} sets {key}, which this version of hashvision does not have;"
                f" {_nearest(key)}."
            )
    schema.check(old, where)
    return {key: old[key] for key in schema.KEYS}


def typed(value: Any) -> str:
    """A value as it is typed behind --config.KEY= in a shell."""
    return shlex.quote(str(value))


def _read(file: str) -> _Recipe:
    path, _, variant = file.partition(":")
    if not os.path.exists(path):
        raise UserError(f"The config {path} does not exist; configs/ holds those of this project.")
    spec = importlib.util.spec_from_file_location("hashvision_config", path)
    if spec is None or spec.loader is None or os.path.isdir(path):
        raise UserError(f"The config {path} is not a Python file; configs/demo.py shows the form.")
    module = importlib.util.module_from_spec(spec)
    with _imports_beside(path), _failures_named(path):
        spec.loader.exec_module(module)
        variant = _variant(path, module.get_config, variant)
        values = schema.flat(module.get_config(variant) if variant else module.get_config())
    config = schema.get_config(_upgraded(values, path))
    config.lock()
    return _Recipe(f"{path}:{variant}" if variant else path, schema.flat(config), config)


def _shown(path: str) -> str:
    near = os.path.relpath(path)
    return path if near.startswith(os.pardir) else near


@contextlib.contextmanager
def _imports_beside(path: str) -> Iterator[None]:
    """Lets a recipe import its neighbours (`import base`), as a script would.

    They are forgotten afterwards, so that a recipe of another folder finds its own.
    """
    folder, before = os.path.dirname(os.path.abspath(path)), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if os.path.dirname(getattr(sys.modules[name], "__file__", None) or "") == folder:
                del sys.modules[name]


@contextlib.contextmanager
def _failures_named(path: str) -> Iterator[None]:
    """Says in one sentence at which line a recipe, or a neighbour of it, fails, and how."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        folder = os.path.dirname(os.path.abspath(path))
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if os.path.dirname(frame.filename) == folder]
        at = f" at line {own[-1].lineno} of {_shown(own[-1].filename)}" if own else ""
        what = " ".join(str(error).split())
        raise UserError(f"The config {path} fails{at} ({type(error).__name__}: {what}).") from error


def _variant(path: str, get_config: Callable[..., Any], variant: str) -> str:
    """The variant, or the default one; a recipe lists its variants in a Literal annotation."""
    parameters = [*inspect.signature(get_config, eval_str=True).parameters.values()]
    if not parameters:
        if variant:
            raise UserError(f"The config {path} has no variants; leave :{variant} out.")
        return ""
    kind, default = parameters[0].annotation, parameters[0].default
    known = get_args(kind) if get_origin(kind) is Literal else ()
    if variant and known and variant not in known:
        raise UserError(f"The config {path} has no variant {variant}; it has {', '.join(known)}.")
    return variant or (default if isinstance(default, str) else "")


def _apply(recipe: _Recipe, override: str) -> str:
    """Applies --config.KEY=VALUE to the recipe's config; returns the key."""
    key, equals, text = override.removeprefix("--config.").partition("=")
    if not (override.startswith("--config.") and equals):
        raise UserError(f"There is no option {override}; settings are --config.KEY=VALUE.")
    if key not in schema.KEYS:
        raise UserError(f"There is no key {key} of a config; {_nearest(key)}.")
    try:
        value = schema.KEYS[key].takes.read(text)
    except ValueError:
        raise UserError(f"--config.{key}={text} does not fit: {schema.wanted(key)}.") from None
    *groups, name = key.split(".")
    holder: Any = recipe.config
    for group in groups:
        holder = holder[group]
    holder[name] = value
    return key


def _nearest(key: str) -> str:
    """Says which key an unknown one may stand for."""
    renamed = [each.new for each in RENAMED if each.old == key]
    if renamed:
        return f"it is {renamed[0]} now"
    same = [name for name in schema.KEYS if name.split(".")[-1] == key.split(".")[-1]]
    near = difflib.get_close_matches(key, schema.KEYS, 1) or same
    return f"the nearest is {near[0]}" if near else "`python -m hashvision config` lists them all"


_DEFAULTS = {key: each.default for key, each in schema.KEYS.items()}
