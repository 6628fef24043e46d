"""A recipe and its overrides made into the config of a run, and what each of its keys means.

A recipe is a Python file whose get_config returns an ml_collections.ConfigDict; it starts from the
schema, `base.py` beside it, and may take a variant.
"""

import ast
import contextlib
import difflib
import importlib.util
import inspect
import io
import json
import os
import shlex
import sys
import tokenize
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from hashvision.errors import UserError

_WANTED = {bool: "true or false", int: "an integer", float: "a number", tuple: "a tuple"}
_KEYS, _VALUES = 25, 52  # widths of the columns up to the end of keys, and of values


class Setting(NamedTuple):
    """A key of a config, resolved."""

    key: str  # dotted
    value: Any
    source: str  # base, recipe or override
    meaning: str

    def row(self) -> str:
        """The setting in columns; what stands behind a long value moves to the next line."""
        start = f"{self.key:<{_KEYS}} {typed(self.value)}"
        start = start.ljust(_VALUES) if len(start) < _VALUES else f"{start}\n{'':{_VALUES}}"
        return f"{start}{self.source:<10}{self.meaning}".rstrip()


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
            key: {"value": value, "source": source, "meaning": meaning}
            for key, value, source, meaning in self.settings
        }
        return json.dumps({**self._asdict(), "settings": settings}, indent=1, ensure_ascii=False)


class _Recipe(NamedTuple):
    name: str  # FILE.py:VARIANT
    config: Any  # locked
    values: dict[str, Any]  # its own, before any override, by dotted key
    schema: str  # path
    defaults: dict[str, Any]  # the schema's


def load(file: str, overrides: Sequence[str]) -> Any:
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
    values, comments = _flat(recipe.config), meanings(recipe.schema)
    order = [key for key in comments if key in values]
    settings = []
    for key in order + [key for key in values if key not in comments]:
        differs = recipe.values[key] != recipe.defaults[key]
        source = "override" if key in changed else "recipe" if differs else "base"
        settings.append(Setting(key, values[key], source, comments.get(key, "")))
    groups = {key: comment for key, comment in comments.items() if comment and key not in values}
    return Explained(recipe.name, recipe.schema, list(overrides), groups, settings)


def typed(value: Any) -> str:
    """A value as it is typed behind --config.KEY= in a shell."""
    return shlex.quote(str(value))


def meanings(schema: str) -> dict[str, str]:
    """What the comments of a schema say of its keys and groups.

    The comment of a key stands behind it, or, where nothing does, in the lines right above.

    Args:
      schema: a Python file whose get_config assigns keys one a line, and names groups as in
        `config.data = data = ...`.

    Returns:
      Comments by dotted key, in the order of the file; "" where there is none.
    """
    with tokenize.open(schema) as file:
        source = file.read()
    behind, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments = behind if token.line[: token.start[1]].strip() else alone
            comments[token.start[0]] = token.string.strip("# ")
    found: dict[str, str] = {}
    groups: dict[str, str] = {}  # dotted names by the variables that stand for them
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign):
            continue
        targets = [ast.unparse(target).partition(".") for target in node.targets]
        named = [(groups.get(holder), name) for holder, _, name in targets if name]
        key = ".".join(filter(None, named[0])) if named else ""
        groups.update({variable: key for variable, _, name in targets if not name})
        first = node.lineno
        while first - 1 in alone:
            first -= 1
        above = " ".join(alone[line] for line in range(first, node.lineno))
        if key:
            found.setdefault(key, behind.get(node.end_lineno, above))
    return found


def _read(file: str) -> _Recipe:
    path, _, variant = file.partition(":")
    if not os.path.exists(path):
        raise UserError(f"The config {path} does not exist; configs/ holds those of this project.")
    spec = importlib.util.spec_from_file_location("hashvision_config", path)
    if spec is None or spec.loader is None or os.path.isdir(path):
        raise UserError(f"The config {path} is no Python file; configs/base.py shows the form.")
    module = importlib.util.module_from_spec(spec)
    with _imports_beside(path), _failures_named(path):
        spec.loader.exec_module(module)
        variant = _variant(path, module.get_config, variant)
        config = module.get_config(variant) if variant else module.get_config()
        config.lock()
        base = sys.modules.get("base", module)
        defaults, schema = _flat(base.get_config()), _shown(base.__file__ or path)
    values = _flat(config)
    for key in values:
        if key not in defaults:
            near = _nearest(key, defaults)
            raise UserError(f"{path} sets {key}, which {schema} does not have; {near}.")
    name = f"{path}:{variant}" if variant else path
    return _Recipe(name, config, values, schema, defaults)


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
    if key not in recipe.values:
        near = _nearest(key, recipe.values)
        raise UserError(f"The config {recipe.name} has no key {key}; {near}.")
    *groups, name = key.split(".")
    holder = recipe.config
    for group in groups:
        holder = holder[group]
    kind: type = holder.get_type(name)
    optional = None in (recipe.values[key], recipe.defaults[key])
    try:
        holder[name] = None if optional and text == "None" else _value(text, kind)
    except (KeyError, SyntaxError, TypeError, ValueError):
        wanted = _WANTED.get(kind, kind.__name__) + " or None" * optional
        meaning = meanings(recipe.schema).get(key)
        raise UserError(
            f"--config.{key}={text} does not fit: {key} wants {wanted}"
            + (f" ({meaning})." if meaning else ".")
        ) from None
    return key


def _value(text: str, kind: type) -> Any:
    """What is typed for a key of this type; raises where it does not fit."""
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind in (str, int, float):
        return kind(text)
    value = ast.literal_eval(text)
    value = tuple(value) if isinstance(value, list) else value
    if not isinstance(value, kind):
        raise TypeError
    return value


def _nearest(key: str, keys: Iterable[str]) -> str:
    keys = list(keys)
    same = [name for name in keys if name.split(".")[-1] == key.split(".")[-1]]
    near = difflib.get_close_matches(key, keys, 1) or same
    return f"the nearest is {near[0]}" if near else "`python -m hashvision config` lists them all"


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config's values by dotted key."""
    flat = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if hasattr(value, "items") else {name: value})
    return flat
