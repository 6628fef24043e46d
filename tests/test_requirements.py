"""Every pin has hashes and the same version in all files, and every install checks the hashes."""

import re
import subprocess
import tomllib

import pytest

from places import REPO

FILES = sorted(REPO.glob("requirements*.txt"))


def pins(path):
    """The pins of a file, {(name, marker): version}, and the number of hashes of each."""
    found, hashes = {}, {}
    key = None
    for line in path.read_text().splitlines():
        if match := re.match(r"([\w.-]+)==([\w.]+)(?: ; (.*?))? \\$", line):
            key = match[1], match[3]
            found[key], hashes[key] = match[2], 0
        elif re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line):
            hashes[key] += 1
        else:
            assert re.match(r" *#", line), f"{path.name} has a line that is not a pin: {line}"
    return found, hashes


def test_there_is_a_requirements_file_for_each_platform():
    names = {path.stem.partition("-")[2] for path in FILES}
    assert names == {"", "test", "tpu", "gcp", "colab", "uv"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_pin_has_hashes_and_no_registry_is_named(path):
    found, hashes = pins(path)
    assert found and all(hashes.values())
    text = path.read_text()
    assert "://" not in text and "index" not in text.replace("ml-", "")
    command = text.splitlines()[1]
    assert "uv pip compile" in command and "--generate-hashes" in command
    assert command.endswith(f"-o {path.name}")


def test_a_package_has_the_same_version_in_all_files():
    first = {}
    for path in FILES:
        for key, version in pins(path)[0].items():
            assert first.setdefault(key, version) == version, f"{key} in {path.name}"


def test_pins_meet_the_minimum_versions_of_pyproject():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    assert "pillow>=12.3" in project["project"]["dependencies"]
    found = {name: version for (name, _), version in pins(REPO / "requirements.txt")[0].items()}
    assert tuple(map(int, found["pillow"].split("."))) >= (12, 3)
    tpu = pins(REPO / "requirements-tpu.txt")[0]
    assert [f"{name}=={version}" for (name, _), version in tpu.items()] == (
        project["dependency-groups"]["tpu"]
    )


def test_every_pip_install_requires_hashes():
    """Every `pip install` in a tracked file outside tests installs files of pins, with hashes."""
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, check=True, capture_output=True)
    installs = []
    for name in tracked.stdout.decode().splitlines():
        path = REPO / name
        if path.suffix in (".sh", ".ipynb", ".md", ".py", ".example") and path.is_file():
            text = path.read_text().replace("\\\n", " ")
            if not name.startswith("tests/"):
                installs += [(name, x) for x in re.findall(r"pip install\b[^`\n]*", text)]
    assert len(installs) >= 9
    for name, command in installs:
        assert "--require-hashes" in command and " -r " in command, f"{name}: {command}"
