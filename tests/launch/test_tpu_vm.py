"""launch/tpu_vm.sh with a simulated Google Cloud, whose workers run the real launch/worker.sh."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

from cloud import BASH, REPO, Cloud
from runs import TINY, curve, make

PLACE = ["--project=a-project", "--zone=us-central2-b", "--quiet"]


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    yield made
    made.close()


def tpus(kind, command, *flags, name="pod"):
    return ["compute", "tpus", kind, command, name, *PLACE, *flags]


DESCRIBE = tpus("tpu-vm", "describe", "--format=value(state)")
QUEUE = tpus("queued-resources", "describe", "--format=value(state.state)")
SPOT = ("--accelerator-type=v4-16", "--version=tpu-ubuntu2204-base", "--spot")
CREATE, DELETE = tpus("tpu-vm", "create", *SPOT), tpus("tpu-vm", "delete")
SETUP, TRAIN, STATUS = "setup", "train", "status"


def short(cloud, calls):
    """The calls to gcloud; an ssh call is only its command, and an scp call belongs to `setup`."""
    found = []
    for call in calls:
        if call[3] == "scp":
            assert call[5:] == [f"pod:hashvision-{cloud.commit}.tar.gz", *PLACE, "--worker=all"]
        elif call[3] == "ssh":
            assert call[:5] + call[5:9] == tpus("tpu-vm", "ssh", "--worker=all")
            found.append(call[9].partition("worker.sh ")[2].split()[-1 if SETUP in call[9] else 0])
            found[-1] = SETUP if found[-1] == cloud.commit else found[-1]
        else:
            found.append(call)
    return found


@pytest.mark.slow
def test_babysit_resumes_after_two_preemptions_call_by_call(cloud):
    cloud.then("preemptions", 1, 2)
    code, out, err = cloud.launch("babysit", "configs/demo.py", "--config.steps=30")
    assert (code, err) == (0, ""), out
    look = [DESCRIBE, STATUS]
    life = [DESCRIBE, SETUP, TRAIN, *look, *look]
    again = [DESCRIBE, DESCRIBE, DELETE, CREATE]  # one look by babysit, one by create
    first = [DESCRIBE, DESCRIBE, CREATE]
    assert short(cloud, cloud.calls()) == [*first, *life, *again, *life, *again, *life, *look]
    assert out.count("pod is PREEMPTED.") == 2
    seen = [int(line[20:-1]) for line in out.splitlines() if line[9:].startswith("Checkpoint")]
    assert seen == sorted(set(seen)) and seen[-1] == 30
    assert f"The run in {cloud.bucket / 'pod'} is done; pod still exists" in out
    assert len(list((cloud.bucket / "pod" / "logs").iterdir())) == 2
    assert cloud.launch("delete")[0] == 0
    assert cloud.calls() == [DESCRIBE, DELETE]
    assert not cloud.homes()


@pytest.mark.slow
def test_babysit_waits_in_the_queue_and_queues_again_after_a_preemption(cloud):
    cloud.settings["QUEUED"] = "yes"
    cloud.then("preemptions", 1)
    code, out, err = cloud.launch("babysit", "configs/demo.py")
    assert (code, err) == (0, ""), out
    delete = tpus("queued-resources", "delete", "--force")
    flags = ("--accelerator-type=v4-16", "--runtime-version=tpu-ubuntu2204-base", "--spot")
    create = [*tpus("queued-resources", "create"), *flags, "--async"]
    create.insert(5, "--node-id=pod")
    calls = short(cloud, cloud.calls())
    assert [call for call in calls if call not in (QUEUE, DESCRIBE, STATUS)] == [
        *(create, SETUP, TRAIN),
        *(delete, create, SETUP, TRAIN),
    ]
    for state in ("ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "READY", "SUSPENDED"):
        assert f"pod is {state}." in out


@pytest.mark.slow
def test_every_command_may_be_repeated(cloud):
    cloud.then("saves")
    assert cloud.launch("delete")[:2] == (0, "pod does not exist.\n")
    assert cloud.launch("status")[:2] == (0, "pod is ABSENT.\n")
    for answer in ("", "pod is READY already.\n"):
        assert cloud.launch("create")[:2] == (0, answer)
    both = "worker 0 of 2: {}\nworker 1 of 2: {}\n"
    for _ in range(2):
        ready = f"ready with {cloud.commit}"
        assert cloud.launch("setup")[:2] == (0, both.format(ready, ready))
    assert cloud.launch("status")[1].endswith("idle, no checkpoint\nworker 1 of 2: idle\n")
    for answer in ("started", "already running"):
        assert cloud.launch("train", "configs/demo.py")[:2] == (0, both.format(answer, answer))
    (cloud.folder / "looks").write_text("0")
    assert "worker 1 of 2: running\n" in cloud.launch("status")[1]
    for answer in ("stopped", "nothing is running"):
        assert cloud.launch("stop")[:2] == (0, both.format(answer, answer))
    (cloud.folder / "looks").write_text("0")
    assert "worker 1 of 2: stopped\n" in cloud.launch("status")[1]
    assert "Stopped at step 7, saved." in cloud.launch("logs")[1]
    assert cloud.launch("logs", "all", "-n", "1")[1] == "Stopped at step 7, saved.\n" * 2
    assert cloud.launch("train", "configs/demo.py")[1] == both.format("started", "started")
    cloud.calls()
    for answer in ("", "pod does not exist.\n"):
        assert cloud.launch("delete")[:2] == (0, answer)
    assert cloud.calls() == [DESCRIBE, DELETE, DESCRIBE]


@pytest.mark.slow
def test_another_run_is_not_disturbed(cloud):
    for command in ("create", "setup"):
        cloud.launch(command)
    cloud.launch("train", "configs/demo.py")
    code, out, _ = cloud.launch("train", "configs/demo.py", "--config.steps=7")
    assert code == 2 and "refused: another run is active; `stop` stops it" in out
    code, out, _ = cloud.launch("babysit", "configs/demo.py", "--config.steps=7")
    assert code == 2 and "another run is active" in out


@pytest.mark.slow
def test_overrides_arrive_unchanged(cloud):
    cloud.settings["WORKDIR"] = str(cloud.bucket / 'run "one" $HOME; `id`')
    overrides = [
        """--config.optimizer.name="it's; rm -rf $HOME\"""",
        "--config.data.crops=((2, 24, 0.3, 1.0), (2, 12, 0.1, 0.3))",
        "--config.a=$(touch harm) `touch harm` ${HOME} ~ * ? [a] {a,b} !! \\ \\\\ | & > harm #",
        "--config.b=two\nlines\tand  two  spaces ",
        "--config.c=ä€\u2028",
        "--config.d=",
        "",
        "-",
    ]
    for command in ("create", "setup"):
        cloud.launch(command)
    code, out, err = cloud.launch("train", "configs/demo.py:a b", *overrides)
    assert code == 0, (out, err)
    cloud.then("finish")
    for home in cloud.homes():
        until((home / "hashvision" / "code").exists)
        found = (home / "arguments").read_bytes().decode().split("\0")
        workdir = f"--workdir={cloud.settings['WORKDIR']}"
        expected = ["-m", "hashvision", "train", "--config=configs/demo.py:a b", workdir]
        assert found == [*expected, *overrides, ""]
    assert not list(cloud.folder.parent.rglob("harm"))


def until(done):
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_each_worker_knows_its_number_and_the_coordinator(cloud):
    for command in ("create", "setup"):
        cloud.launch(command)
    cloud.settings["PORT"] = "1234"
    cloud.launch("train", "configs/demo.py")
    for number, home in enumerate(cloud.homes()):
        until((home / "ready").exists)
        assert sorted((home / "environment").read_text().splitlines()) == [
            "JAX_COORDINATOR_ADDRESS=127.0.0.1:1234",
            "JAX_NUM_PROCESSES=2",
            f"JAX_PROCESS_ID={number}",
        ]


@pytest.mark.slow
def test_a_single_host_needs_no_coordinator(tmp_path):
    cloud = Cloud(tmp_path, workers=1)
    code, out, _ = cloud.launch("babysit", "configs/demo.py")
    assert code == 0 and "worker 0 of 1: ended 0, checkpoint 10" in out
    assert (cloud.homes()[0] / "environment").read_text() == ""
    cloud.close()


@pytest.mark.slow
def test_babysit_restarts_at_75_while_checkpoints_advance(cloud):
    cloud.then("codes", 75, 75, 75, 75)
    code, out, err = cloud.launch("babysit", "configs/demo.py")
    assert (code, err) == (0, ""), out
    assert "Checkpoint 50." in out
    assert short(cloud, cloud.calls()).count(TRAIN) == 5  # more than TRIES

    (cloud.folder / "saves").unlink()
    cloud.then("codes", *[75] * 9)
    code, out, err = cloud.launch("babysit", "configs/demo.py")
    assert code == 2
    assert err.startswith("Gave up on pod after 3 tries without a new checkpoint in ")
    assert "worker 0 of 2: ended 75, checkpoint 50: hashvision: the dataset is broken" in err
    assert short(cloud, cloud.calls()).count(TRAIN) == 3


@pytest.mark.slow
def test_babysit_prints_why_training_failed(cloud):
    cloud.then("codes", 2)
    code, _, err = cloud.launch("babysit", "configs/demo.py")
    assert (code, err) == (2, "the dataset is broken; fix it.\n")
    assert short(cloud, cloud.calls())[-2:] == [DESCRIBE, STATUS]
    cloud.then("codes")
    assert (
        cloud.launch("babysit", "configs/demo.py")[0] == 0
    )  # the exit code of the former run does not count


@pytest.mark.slow
def test_babysit_does_not_restart_a_stopped_run(cloud):
    for command in ("create", "setup"):
        cloud.launch(command)
    cloud.launch("train", "configs/demo.py")
    cloud.settings["POLL"] = "1"
    watched = cloud.start("babysit", "configs/demo.py")
    until(lambda: "already running" in (cloud.folder / "out").read_text())
    cloud.launch("stop")
    assert watched.wait(60) == 75
    assert "pod was stopped; `train` resumes the run." in (cloud.folder / "out").read_text()


@pytest.mark.slow
def test_babysit_retries_when_gcloud_fails_and_gives_up_with_its_error(cloud):
    cloud.then("failures", "ERROR: unreachable", "", "", "ERROR: no capacity in us-central2-b")
    code, out, err = cloud.launch("babysit", "configs/demo.py")
    assert code == 0
    assert err == "ERROR: unreachable\nERROR: no capacity in us-central2-b\n"
    cloud.launch("delete")
    cloud.then("failures", *["", "", "ERROR: no capacity"] * 9)
    code, out, err = cloud.launch("babysit", "configs/demo.py")
    assert code == 2 and err.count("ERROR: no capacity") == 3
    assert err.splitlines()[-1].endswith("the last time it could not be created.")


def test_a_worker_that_does_not_answer_is_noticed(cloud):
    """Older versions of gcloud exit with 0 in this case."""
    cloud.launch("create")
    (cloud.folder / "deaf").write_text("1")
    code, out, err = cloud.launch("setup")
    assert (
        code == 75 and err == "Not all workers of pod answered; see the output of gcloud above.\n"
    )
    assert out == f"worker 0 of 2: ready with {cloud.commit}\n"


def test_dry_run_prints_the_commands_and_needs_no_gcloud(cloud):
    path = _path_without_gcloud(cloud)
    code, out, err = cloud.launch(
        "babysit", "--dry-run", "configs/demo.py", "--config.a=b c", PATH=path
    )
    assert (code, err) == (0, "")
    assert [line.split()[:5] for line in out.splitlines() if line.startswith("gcloud")] == [
        ["gcloud", "compute", "tpus", "tpu-vm", command]
        for command in ("describe", "create", "scp", "ssh", "ssh", "describe", "ssh")
    ]
    workdir = str(cloud.bucket / "pod").replace(" ", r"\ ").replace("'", r"\'")
    sent = f"train {cloud.commit} 8482 {workdir} configs/demo.py --config.a=b\\ c"
    (line,) = [line for line in out.splitlines() if "worker.sh\\ train" in line]
    unquoted = subprocess.run([BASH, "-c", f"printf %s\\\\n {line}"], stdout=-1, text=True).stdout
    assert f"--command=bash hashvision/worker.sh {sent}" in unquoted
    for command in ("create", "setup", "status", "logs", "stop", "delete"):
        code, out, err = cloud.launch(command, "--dry-run", PATH=path)
        assert (code, err) == (0, "") and "gcloud compute tpus" in out
    assert not cloud.calls() and not cloud.homes()


def _path_without_gcloud(cloud):
    folder = cloud.folder / "tools"
    folder.mkdir(exist_ok=True)
    for name in ("bash", "dirname", "git", "gzip", "mktemp", "rm", "grep", "sort", "wc"):
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Give a command: create, setup,"),
        (["fly"], "There is no command fly; give one of create, setup,"),
        (["train"], "Give train a config: `train NAME[:VARIANT]"),
        (["train", "configs/none.py"], "The config configs/none.py is not in commit"),
        (["train", "none:a"], "The config configs/none.py is not in commit"),
        (
            ["babysit", "configs/demo.py", "--workdir=a"],
            "--workdir=a is not an option here; set WORKDIR in ",
        ),
        (["train", "demo:drawn"], "pod is ABSENT; run `create`, and wait"),
        (["train", "configs/demo.py"], "pod is ABSENT; run `create`, and wait"),
        (["setup"], "pod is ABSENT; run `create`, and wait"),
    ],
)
def test_mistakes_get_one_sentence(cloud, arguments, sentence):
    code, out, err = cloud.launch(*arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(sentence)


@pytest.mark.parametrize("name", ["PROJECT", "ZONE", "NAME", "TYPE", "VERSION", "BUCKET"])
def test_a_missing_setting_is_named(cloud, name):
    del cloud.settings[name]
    code, _, err = cloud.launch("create", **{name: "of the shell"})
    assert code == 2
    settings = f"{cloud.folder}/pod.env"
    assert err == f"{settings} does not set {name}; launch/pod.env.example describes it.\n"


def test_missing_settings_gcloud_and_bucket_are_named(cloud):
    code, _, err = cloud.launch("create", POD_ENV="none.env")
    assert code == 2 and err.startswith(
        f"The settings file {cloud.folder}/none.env does not exist; copy "
    )
    code, _, err = cloud.launch("create", PATH=_path_without_gcloud(cloud))
    assert code == 2 and err.startswith("gcloud is not on the PATH; install ")
    cloud.settings["BUCKET"] = "runs"
    code, _, err = cloud.launch("create")
    assert code == 2 and err.startswith("WORKDIR=runs/pod in ")


@pytest.mark.slow
def test_only_committed_code_is_sent(cloud):
    (cloud.repository / "configs" / "demo.py").write_text("# not committed\n")
    for command in ("setup", "train", "babysit"):
        code, _, err = cloud.launch(command, "configs/demo.py")
        assert code == 2 and err.startswith(f"The code differs from commit {cloud.commit[:12]}, ")
    assert cloud.launch("create")[0] == 0
    former = cloud.commit
    cloud.git("commit", "--all", "--quiet", "--message=more")
    cloud.commit = cloud.git("rev-parse", "HEAD").strip()
    assert cloud.commit != former
    code, out, _ = cloud.launch("train", "configs/demo.py")
    assert code == 75  # worker.sh is not installed, so no worker answers
    assert cloud.launch("setup")[0] == 0
    for home in cloud.homes():
        sent = home / "hashvision" / cloud.commit / "configs" / "demo.py"
        assert sent.read_text() == "# not committed\n"
    cloud.git("commit", "--allow-empty", "--quiet", "--message=later")
    code, out, _ = cloud.launch("train", "configs/demo.py")
    assert code == 2 and "is not installed; run `setup`" in out


@pytest.mark.slow
def test_setup_installs_the_pins_of_the_commit_and_of_the_tpu(cloud):
    venv = next(cloud.folder.glob("image/hashvision/venv-*"))
    shutil.rmtree(venv)
    pip = cloud.folder / "bin" / "python3"  # the machine's own Python, which installs uv
    pip.write_text(f'#!/usr/bin/env bash\necho "$*" >>"$HOME/calls"\nmkdir -p {venv.name}\n')
    pip.chmod(0o755)
    cloud.launch("create")
    for _ in range(2):  # the second time does nothing
        assert cloud.launch("setup")[0] == 0
    for home in cloud.homes():
        uv, made, installed = (home / "calls").read_text().splitlines()
        pins = f"--require-hashes -r {cloud.commit}/requirements"
        assert uv == f"-m pip install --user --quiet {pins}-uv.txt"
        assert made == f"-m uv venv --quiet --clear --python >=3.11,<3.14 {venv.name}"
        assert installed.endswith(f"{pins}.txt -r {cloud.commit}/requirements-tpu.txt")


def test_the_example_settings_work(cloud):
    example = str(cloud.repository / "launch" / "pod.env.example")
    code, out, err = cloud.launch("create", "--dry-run", POD_ENV=example)
    assert (code, err) == (0, "")
    assert out.endswith("--accelerator-type=v4-32 --version=tpu-ubuntu2204-base\n")
    code, out, err = cloud.launch("status", "--dry-run", POD_ENV=example)
    assert out.endswith("worker.sh\\ status\\ gs://my-bucket/runs/hashvision\n")


def test_checkpoints_are_listed_in_a_bucket(cloud):
    cloud.settings["BUCKET"] = "gs://a-bucket/runs"
    for command in ("create", "setup"):
        cloud.launch(command)
    listed = "\n".join(f"gs://a-bucket/runs/pod/checkpoints/{name}/" for name in (5, 100, "x"))
    cloud.then("listing", json.dumps(listed))
    cloud.calls()
    assert "worker 0 of 2: idle, checkpoint 100\n" in cloud.launch("status")[1]
    assert cloud.calls()[-1] == ["storage", "ls", "gs://a-bucket/runs/pod/checkpoints/"]


@pytest.mark.slow
def test_two_workers_train(tmp_path):
    """Two worker processes train with the real package, to the end."""
    place = make(tmp_path)
    (place / "tiny.py").write_text(TINY)
    files = [(REPO / "hashvision", "hashvision"), (place / "base.py", "configs/base.py")]
    python = f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n'
    cloud = Cloud(tmp_path, training=python, files=[*files, (place / "tiny.py", "configs/tiny.py")])
    cloud.settings.update(PORT=str(cloud.port()), POLL="1")
    overrides = (f"--config.dataset={place / 'dataset'}", "--config.steps=8")
    environment = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    cloud.let_through("XLA_FLAGS", "JAX_PLATFORMS")
    try:
        code, out, err = cloud.launch("babysit", "configs/tiny.py", *overrides, **environment)
        logs = [home / "hashvision" / "log" for home in cloud.homes()]
        assert code == 0, (out, err, [log.read_text() for log in logs])
        assert "worker 1 of 2: ended 0" in out
        assert "of 2 hosts" in logs[0].read_text()
        assert max(curve(cloud.bucket, "pod")) == 8
    finally:
        cloud.close()


def test_shellcheck_finds_nothing():
    scripts = [*sorted((REPO / "launch").glob("*.sh")), REPO / ".ci" / "run"]
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    assert shellcheck and len(scripts) > 5
    done = subprocess.run(
        [shellcheck, "-x", "-P", "SCRIPTDIR", "-P", REPO, *scripts], stdout=-1, text=True
    )
    assert done.returncode == 0, done.stdout


def test_babysit_knows_how_a_host_refers_to_another_hosts_log():
    script = (REPO / "launch" / "tpu_vm.sh").read_text()
    phrases = re.search(r'grep -vE "(.*?)" <<<"\$reason"', script)[1].split("|")
    pulse = (REPO / "hashvision" / "training" / "pulse.py").read_text()
    assert any(phrase in pulse for phrase in phrases)
