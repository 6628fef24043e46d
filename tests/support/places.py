"""Where the tests find the parts of the repository, and its recipes made into configs."""

import pathlib
from typing import Any

from hashvision.config import recipes

REPO = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = REPO / "configs"
GOLDEN = REPO / "tests" / "golden"


def recipe_file(recipe: str) -> str:
    """Path of the recipe NAME, or NAME:VARIANT, of configs/."""
    name, _, variant = recipe.partition(":")
    return f"{CONFIGS / name}.py" + (f":{variant}" if variant else "")


def load(recipe: str, *overrides: str) -> Any:
    """The config of the recipe NAME, or NAME:VARIANT, with --config.KEY=VALUE overrides."""
    return recipes.load(recipe_file(recipe), overrides)
