"""Tests of launch/prepare_dataflow.sh: the command that it runs, and that this makes a dataset."""

import json
import shutil
import sys
import zipfile

import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from cloud import REPO, Cloud
from datasets import jpeg

INPUTS = ("--posts=gs://b/posts.jsonl", "--output=gs://b/data set", "--minimum_count=2")
RECORDING = """#!{} -S
import json, os, pathlib, shutil, sys
with open(os.environ["CLOUD"] + "/python.jsonl", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
for argument in sys.argv:
    if argument.startswith("--extra_package=") and os.path.exists(argument.partition("=")[2]):
        shutil.copy(argument.partition("=")[2], os.environ["CLOUD"])
if "wheel" in sys.argv:
    os.execv({!r}, [{!r}, *sys.argv[1:]])
"""


@pytest.fixture
def cloud(tmp_path):
    names = ("hashvision", "pyproject.toml", "README.md", "LICENSE")
    made = Cloud(tmp_path, workers=1, files=[(REPO / name, name) for name in names])
    made.settings["BUCKET"] = "gs://a-bucket/runs"
    _python(made, RECORDING.format(*[sys.executable] * 3))
    yield made
    made.close()


def _python(cloud, program):
    """Gives the repository a .venv with this program in place of Python."""
    path = cloud.repository / ".venv" / "bin" / "python"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(program)
    path.chmod(0o755)
    shutil.copy(cloud.repository / "requirements.txt", cloud.repository / ".venv")


def launch(cloud, *arguments, **environment):
    code, out, err = cloud.launch(*arguments, script="prepare_dataflow.sh", **environment)
    path = cloud.folder / "python.jsonl"
    calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return code, out, err, calls


@pytest.mark.slow
def test_prepare_is_given_the_runner_and_the_commit_as_a_wheel(cloud):
    code, _, err, calls = launch(cloud, *INPUTS, "--wordnet=gs://b/it's; wordnet.xml")
    assert (code, err) == (0, "")
    check, wheel, prepare = calls
    assert check[0] == "-c" and wheel[:3] == ["-m", "pip", "wheel"]
    made = prepare[9]
    assert prepare == [
        *("-m", "hashvision", "prepare", "--runner=DataflowRunner", "--project=a-project"),
        *("--region=us-central2", "--temp_location=gs://a-bucket/runs/dataflow"),
        *("--max_num_workers=100", "--worker_machine_type=n2-standard-8", made),
        *("--requirements_file=requirements.txt", "--requirements_cache=skip"),
        *(*INPUTS, "--wordnet=gs://b/it's; wordnet.xml"),
    ]
    options = PipelineOptions(prepare[3:-4])  # all except those of prepare itself
    assert options.get_all_options() == options.get_all_options(retain_unknown_options=True)
    name = made.rpartition("/")[2]
    with zipfile.ZipFile(cloud.folder / name) as inside:
        source = inside.read("hashvision/prepare/graph.py")
    assert source == (REPO / "hashvision" / "prepare" / "graph.py").read_bytes()


@pytest.mark.slow
def test_a_container_image_replaces_requirements(cloud):
    cloud.settings.update(IMAGE="docker.pkg.dev/p/image:1", REGION="europe-west4", WORKERS="7")
    code, _, _, calls = launch(cloud, *INPUTS)
    assert code == 0
    flags = ("--sdk_container_image=docker.pkg.dev/p/image:1", "--region=europe-west4")
    assert {*flags, "--max_num_workers=7"} < set(calls[-1])
    assert not any("requirements" in argument for argument in calls[-1])


def test_dry_run_only_prints(cloud):
    code, out, err, calls = launch(cloud, "--dry-run", *INPUTS)
    assert (code, err) == (0, "")
    assert [call[0] for call in calls] == ["-c"]  # it checked that Beam supports Google's cloud
    assert out.splitlines()[-1].startswith(".venv/bin/python -m hashvision prepare --runner=Data")
    assert r"--output=gs://b/data\ set" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "settings", "sentence"),
    [
        (
            [INPUTS[0]],
            {},
            "--output is not in a bucket, which all workers can reach; give --output=gs://BUCKET/PATH.",
        ),
        (
            ["--posts=p", INPUTS[1]],
            {},
            "--posts is not in a bucket, which all workers can reach; give --posts=gs://BUCKET/PATH.",
        ),
        (INPUTS, {"BUCKET": "/mnt"}, "BUCKET=/mnt in "),
        (INPUTS, {"PROJECT": ""}, "{}/pod.env does not set PROJECT; "),
    ],
)
def test_mistakes_get_one_sentence(cloud, arguments, settings, sentence):
    cloud.settings.update(settings)
    code, out, err, calls = launch(cloud, *arguments, PROJECT="of the shell")
    assert (code, out, len(err.splitlines()), calls) == (2, "", 1, [])
    assert err.startswith(sentence.format(cloud.folder))


def test_uncommitted_changes_are_refused(cloud):
    (cloud.repository / "hashvision" / "storage.py").write_text("")
    code, _, err, calls = launch(cloud, *INPUTS)
    assert code == 2 and calls == []
    assert err.startswith(f"The code differs from commit {cloud.commit[:12]}, ")


@pytest.mark.slow
def test_with_a_local_runner_it_makes_a_dataset(cloud, tmp_path):
    _python(cloud, f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    lines = []
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
        post = {"id": f"p{number}", "image": f"{number}.jpg", "visibility": "public"}
        lines.append(json.dumps({**post, "text": "#dog" if number % 2 else "#tree"}))
    (tmp_path / "posts.jsonl").write_text("\n".join(lines))
    paths = (f"--posts={tmp_path / 'posts.jsonl'}", f"--output={tmp_path / 'dataset'}")
    code, out, err, _ = launch(cloud, *paths, "--minimum_count=2", "--runner=DirectRunner")
    assert code == 0, (out, err)
    assert "8 of 8 posts kept" in out and (tmp_path / "dataset" / "manifest.json").exists()
