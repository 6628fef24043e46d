"""The notebooks of launch/colab have no outputs, and run from start to end with a small network."""

import base64
import json
import os
import re

import nbclient
import nbformat
import pytest

from places import REPO

FOLDER = REPO / "launch" / "colab"
NAMES = ("01_hashtags", "02_swav", "03_fine_tune", "04_plan")

# sitecustomize.py of every process that a notebook starts. It replaces the network of the demo by
# one of two blocks, which compiles in seconds.
SMALL = """
import importlib.machinery
import sys


class Small(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        if name == "hashvision.models.regnet":
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                module.PARAMETERS["regnety_200mf"] = module.RegNetParameters(2, 8, 8.0, 2.0, 8)

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Small)
"""


def notebook(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def checked(source):
    """Makes a cell fail when one of its commands fails; Jupyter itself would continue."""
    lines = source.splitlines()
    for number in reversed(range(len(lines))):
        if found := re.match(r"( *)!", lines[number]):
            end = number
            while lines[end].endswith("\\"):
                end += 1
            lines.insert(end + 1, f"{found[1]}assert not _exit_code, _exit_code")
    return "\n".join(lines)


def executed(name, folder, **parameters):
    """Runs a whole notebook with other parameters; returns its printed text and its pictures."""
    (folder / "sitecustomize.py").write_text(SMALL)
    book = notebook(name)
    for cell in book.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            unknown = [each for each in parameters if f"{each} = " not in cell.source]
            assert not unknown
            cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
        elif cell.cell_type == "code":
            cell.source = checked(cell.source)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(folder), str(REPO)]),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    # Jupyter starts a notebook in its own folder.
    place = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(book, timeout=300, resources=place).execute(env=environment)
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    data = [output.data for output in outputs if output.output_type == "display_data"]
    pictures = [base64.b64decode(each["image/png"]) for each in data if "image/png" in each]
    assert all(len(picture) > 2000 for picture in pictures)
    return text, pictures


def percents(text, name):
    """The percentages in the table row that begins with `name`."""
    [line] = re.findall(rf"^{name} .*%.*$", text, re.MULTILINE)
    return [float(number) for number in re.findall(r"([\d.]+)%", line)]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_no_outputs_and_short_cells(name):
    path = FOLDER / f"{name}.ipynb"
    book = notebook(name)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    first, setup = book.cells[0].source, code[1].source
    repository = re.search(r'REPOSITORY = "https://(github.com/\w+/\w+)"', setup)[1]
    opened = repository.replace(".com", "")
    badge = f"https://colab.research.google.com/{opened}/blob/main/launch/colab/{name}.ipynb"
    assert f"({badge})" in first
    assert code[0].metadata.tags == ["parameters"]
    assert setup == notebook(NAMES[0]).cells[3].source, "all notebooks have the same set-up"
    assert not re.search(r"/(work|root|home|tmp|Users)/", path.read_text())
    assert all(len(cell.source.splitlines()) <= 40 for cell in code)
    assert f"{name}.ipynb" in (REPO / "README.md").read_text()


def test_checked_adds_an_assertion_after_each_command():
    source = "x = 1\n!a b \\\n    c\nif x:\n    !d\nprint(x)"
    assert checked(source).splitlines() == [
        "x = 1",
        "!a b \\",
        "    c",
        "assert not _exit_code, _exit_code",
        "if x:",
        "    !d",
        "    assert not _exit_code, _exit_code",
        "print(x)",
    ]


@pytest.mark.slow
def test_hashtags_then_fine_tuning(tmp_path):
    folder = str(tmp_path / "hashtags")
    text, pictures = executed("01_hashtags", tmp_path, POSTS=300, EPOCHS=1.0, FOLDER=folder)
    assert len(pictures) == 3
    assert re.search(r"^dog +\d+ +#dog \d+, #dogs \d+$", text, re.MULTILINE)
    for protocol in ("knn", "linear"):
        for network in ("untrained network", r"step \d+"):
            assert re.search(rf"^{protocol} on transfer, {network}", text, re.MULTILINE)

    text, pictures = executed(
        "03_fine_tune",
        tmp_path,
        PHOTOS=f"{folder}/posts/transfer",
        PRETRAINED=f"{folder}/run",
        EPOCHS=1.0,
        FOLDER=str(tmp_path / "tuned"),
    )
    assert len(pictures) == 3
    for name in ("linear probe", "from scratch", "fine-tuned"):
        value, low, high = percents(text, name)
        assert 0 <= low <= value <= high <= 100


@pytest.mark.slow
def test_swav(tmp_path):
    folder = str(tmp_path / "swav")
    text, pictures = executed("02_swav", tmp_path, POSTS=200, EPOCHS=1.0, FOLDER=folder)
    assert len(pictures) == 3
    assert percents(text, "any photos") == [8.3]
    assert 0 < percents(text, "untrained")[0] < 100
    assert 0 < percents(text, "trained")[0] < 100


@pytest.mark.slow
def test_plan(tmp_path):
    text, pictures = executed(
        "04_plan",
        tmp_path,
        CONFIG="demo:drawn",
        TOPOLOGIES=["cpu:2", "cpu:4"],
        FOLDER=str(tmp_path / "plan"),
    )
    assert len(pictures) == 1
    assert "no step time and no price" in text
    held = [json.loads((tmp_path / f"plan/{number}.json").read_text())["held"] for number in (0, 1)]
    assert held[0]["batch"] == 2 * held[1]["batch"]
