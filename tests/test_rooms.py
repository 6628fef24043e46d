"""The rooms of the house: imports go one way, and heavy packages stay where they belong."""

import ast
import collections
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "hashvision"
ROOMS = (
    "errors",
    "storage",
    "locks",
    "config",
    "tags",
    "sources",
    "data",
    "duplicates",
    "prepare",
    "synthetic",
    "pixels",
    "models",
    "objectives",
    "training",
    "takedowns",
    "evaluation",
    "planning",
    "commands",
)
ONLY_IN = {
    "flax": ("models",),
    "orbax": ("training/checkpoint.py",),
    "optax": ("training",),
    "apache_beam": ("duplicates", "prepare"),
    "jax": (
        "pixels",
        "models",
        "objectives",
        "training",
        "evaluation/encoder.py",
        "planning",
    ),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    place = path.relative_to(PACKAGE)
    room = place.parts[0].removesuffix(".py")
    for name in imports(path):
        first, *rest = name.split(".")
        if first == "hashvision" and rest and rest[0] in ROOMS:
            assert ROOMS.index(rest[0]) <= ROOMS.index(room), f"{place} imports {name}"
        if first in ONLY_IN:
            allowed = ONLY_IN[first]
            assert str(place).startswith(allowed), f"{place} imports {name}"


def test_every_file_lies_in_a_room():
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} == {
        "__init__",
        *ROOMS,
    }


@pytest.mark.parametrize("module", ["hashvision", "hashvision.__main__"])
def test_importing_the_package_imports_neither_tensorflow_nor_jax(module):
    code = f"import sys, {module}; print({{'jax', 'tensorflow', 'flax'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_train_step_imports_without_tensorflow():
    code = """
import sys
sys.modules['tensorflow'] = None  # any import of it now fails
import hashvision.training.program, hashvision.training.state
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_name_is_one_thing():
    """No two public classes share a name, so that a reader never asks which one is meant."""
    found = collections.Counter(
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, times in found.items() if times > 1] == []
