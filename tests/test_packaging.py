"""What is installed: every room, and the recipes where --config=NAME finds them."""

import tomllib

import pytest

from hashvision.config import recipes
from hashvision.errors import UserError
from places import CONFIGS, REPO, recipe_file


def test_every_room_is_installed_and_so_are_the_recipes():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    setuptools = project["tool"]["setuptools"]
    folders = {path.parent for path in (REPO / "hashvision").rglob("*.py")}
    rooms = {".".join(folder.relative_to(REPO).parts) for folder in folders}
    assert set(setuptools["packages"]) == rooms | {"hashvision.configs"}
    assert setuptools["package-dir"] == {"hashvision.configs": "configs"}


def test_recipes_are_found_beside_the_package_and_inside_an_installed_one(tmp_path, monkeypatch):
    assert recipes.folder() == str(CONFIGS)
    (tmp_path / "hashvision" / "config").mkdir(parents=True)
    (tmp_path / "hashvision" / "configs").mkdir()
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "hashvision/config/recipes.py"))
    assert recipes.folder() == str(tmp_path / "hashvision" / "configs")


@pytest.mark.parametrize("recipe", ["demo", "demo:drawn", "seer_regnety:256gf"])
def test_a_recipe_is_found_by_its_name_from_anywhere(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipes.read(recipe).values == recipes.read(recipe_file(recipe)).values


def test_a_folder_of_the_same_name_does_not_hide_a_recipe(tmp_path, monkeypatch):
    """A workdir may well be called demo."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert recipes.read("demo").values == recipes.read(recipe_file("demo")).values


def test_an_unknown_recipe_is_refused_with_the_nearest_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="There is no recipe dmo; did you mean demo?"):
        recipes.read("dmo")
    with pytest.raises(UserError, match="There is no recipe x; choose from base, demo, demo_swav,"):
        recipes.read("x:variant")
