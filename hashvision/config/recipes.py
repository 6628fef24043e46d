"""Recipes: Python files that set the keys of a config, found by name or path.

A recipe's function get_config returns a Config. It usually starts from the one in base.py beside
it, which has the schema's defaults, and may take a variant. This project's recipes are in configs/,
in the repository and in an installed wheel.
"""

import contextlib
import difflib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from hashvision.config import Config, schema, upgrade
from hashvision.errors import UserError


class Recipe(NamedTuple):
    """A recipe that has been read."""

    name: str  # FILE.py:VARIANT
    values: dict[str, Any]  # its own, before any override, by dotted key
    config: Config  # locked


def load(file: str, overrides: Sequence[str]) -> Config:
    """The config that a command line asks for.

    Args:
      file: NAME or NAME:VARIANT of configs/, or FILE.py or FILE.py:VARIANT. The file is executed
        as Python code.
      overrides: strings --config.KEY=VALUE; the last one of a key counts.

    Returns:
      A locked Config.

    Raises:
      UserError: there is no such recipe, variant or key, the recipe fails, or a value does not fit.
    """
    recipe = read(file)
    for override in overrides:
        apply(recipe, override)
    return recipe.config


def read(file: str) -> Recipe:
    """Reads a recipe, given as NAME, NAME:VARIANT, FILE.py or FILE.py:VARIANT.

    Raises:
      UserError: there is no such recipe or variant, or it fails.
    """
    path, variant = _find(file)
    with _imports_beside(path), _failures_named(path):
        get_config = _module(path).get_config
        variant = _variant(path, get_config, variant)
        values = schema.flat(get_config(variant) if variant else get_config())
    config = schema.get_config(upgrade.upgraded(values, path))
    config.lock()
    return Recipe(f"{path}:{variant}" if variant else path, schema.flat(config), config)


def _module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("hashvision_config", path)
    if spec is None or spec.loader is None or os.path.isdir(path):
        raise UserError(f"The config {path} is not a Python file; see configs/demo.py for one.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listed() -> list[str]:
    """The recipes of this project, each as NAME or NAME:VARIANT|VARIANT."""
    lines = []
    for name in _names():
        path = os.path.join(folder(), f"{name}.py")
        with _imports_beside(path), _failures_named(path):
            variants = _variants(_module(path).get_config)
        lines.append(f"{name}:{'|'.join(variants)}" if variants else name)
    return lines


def folder() -> str:
    """The folder of this project's recipes: in the package if it is installed, else beside it."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    installed = os.path.join(package, "configs")
    return installed if os.path.isdir(installed) else f"{os.path.dirname(package)}/configs"


def _names() -> list[str]:
    files = os.listdir(folder())
    return sorted(name.removesuffix(".py") for name in files if name.endswith(".py"))


def _find(file: str) -> tuple[str, str]:
    """The path and the variant of a recipe, given by name or by path.

    Raises:
      UserError: there is no such recipe.
    """
    path, _, variant = file.partition(":")
    if path in _names():  # first, since a workdir here may have the same name
        return os.path.join(folder(), f"{path}.py"), variant
    if os.path.exists(path):
        return path, variant
    if path.endswith(".py") or os.path.dirname(path):
        raise UserError(
            f"The config {path} does not exist; `hashvision config --list` lists recipes."
        )
    near = difflib.get_close_matches(path, _names(), 1)
    remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(_names())}."
    raise UserError(f"There is no recipe {path}; {remedy}")


def shown(path: str) -> str:
    """A path for people: relative if the file is below the current folder."""
    near = os.path.relpath(path)
    return path if near.startswith(os.pardir) else near


@contextlib.contextmanager
def _imports_beside(path: str) -> Iterator[None]:
    """Lets a recipe import files beside it (`import base`), as a script can.

    Afterwards these modules are removed again, so that a recipe in another folder imports its own.
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
    """Turns an error in a recipe, or in a file beside it, into a UserError that names the line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        folder = os.path.dirname(os.path.abspath(path))
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if os.path.dirname(frame.filename) == folder]
        at = f" at line {own[-1].lineno} of {shown(own[-1].filename)}" if own else ""
        what = " ".join(str(error).split())
        raise UserError(f"The config {path} fails{at} ({type(error).__name__}: {what}).") from error


def _variants(get_config: Callable[..., Any]) -> tuple[str, ...]:
    """The variants that a recipe lists in a Literal annotation."""
    parameters = [*inspect.signature(get_config, eval_str=True).parameters.values()]
    kind = parameters[0].annotation if parameters else None
    return get_args(kind) if get_origin(kind) is Literal else ()


def _variant(path: str, get_config: Callable[..., Any], variant: str) -> str:
    """The variant asked for, or the recipe's default."""
    parameters = [*inspect.signature(get_config).parameters.values()]
    if not parameters:
        if variant:
            raise UserError(f"The config {path} has no variants; leave :{variant} out.")
        return ""
    known, default = _variants(get_config), parameters[0].default
    if variant and known and variant not in known:
        raise UserError(f"The config {path} has no variant {variant}; it has {', '.join(known)}.")
    return variant or (default if isinstance(default, str) else "")


def apply(recipe: Recipe, override: str) -> str:
    """Applies --config.KEY=VALUE to the recipe's config; returns the key."""
    key, equals, text = override.removeprefix("--config.").partition("=")
    if not (override.startswith("--config.") and equals):
        raise UserError(f"There is no option {override}; settings are --config.KEY=VALUE.")
    if key not in schema.KEYS:
        raise UserError(f"There is no key {key} of a config; {upgrade.nearest(key)}.")
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
