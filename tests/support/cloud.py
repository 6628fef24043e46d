"""A simulated Google Cloud in a folder, for tests of launch/: a `gcloud` that records its calls.

A worker is a home folder with its own metadata server. Commands sent by `ssh` are executed there,
unchanged, in the login shell. A running pod is preempted at its second `status`, once per line of
the file `preemptions`. After the last line, training ends instead, with the next exit code in the
file `codes`.
"""

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

from places import REPO

BASH = shutil.which("bash")

GCLOUD = r"""
import fcntl, json, os, pathlib, shutil, signal, subprocess, sys

cloud, argv = pathlib.Path(os.environ["CLOUD"]), sys.argv[1:]
played = json.loads((cloud / "cloud.json").read_text())
with open(cloud / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(argv) + "\n")


def take(name):  # removes and returns the first line of a file
    lines = (cloud / name).read_text().splitlines() if (cloud / name).exists() else []
    (cloud / name).write_text("".join(line + "\n" for line in lines[1:]))
    return lines[0] if lines else None


def homes():
    return [cloud / f"worker {number}" for number in range(len(played["metadata"]))]


def end():
    for home in homes():
        if (home / "hashvision/pid").exists():
            try:
                os.killpg(os.getsid(int((home / "hashvision/pid").read_text())), signal.SIGKILL)
            except ProcessLookupError:
                pass


def wait():
    for home in homes():
        with open(home / "hashvision/lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)


def set_state(name, state):
    (cloud / name).write_text(state) if state else (cloud / name).unlink(missing_ok=True)


if argv[0] == "storage":
    if argv[1] == "ls":
        print(json.loads((cloud / "listing").read_text()))
    sys.exit()
kind, verb, name = argv[2:5]
mine = "request" if kind == "queued-resources" else "node"
flags = dict(flag.partition("=")[::2] for flag in argv[5:])
if verb == "describe":
    if said := take("failures"):
        sys.exit(said)
    if not (cloud / mine).exists():
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/nodes/n' was not found.")
    print(state := (cloud / mine).read_text())
    order = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    if state in order[:2]:
        set_state(mine, order[order.index(state) + 1])
        set_state("node", "READY" if state == order[1] else None)
elif verb == "create":
    if (cloud / mine).exists():
        sys.exit("ERROR: (gcloud) ALREADY_EXISTS")
    if said := take("failures"):
        sys.exit(said)
    set_state(mine, "WAITING_FOR_RESOURCES" if mine == "request" else "READY")
    for home in homes():
        shutil.copytree(cloud / "image", home)
elif verb == "delete":
    end()
    set_state("request", None)
    set_state("node", None)
    for home in homes():
        shutil.rmtree(home)
elif verb == "scp":
    for home in homes():
        shutil.copy(argv[4], home / argv[5].partition(":")[2])
elif verb == "ssh":
    chosen = homes() if flags["--worker"] == "all" else [homes()[int(flags["--worker"])]]
    for number, home in enumerate(homes()):
        if home in chosen and str(number) != (cloud / "deaf").read_text():
            environment = {
                **{each: os.environ[each] for each in ("PATH", "CLOUD", *played["environment"])},
                "HOME": str(home),
                "GCE_METADATA_HOST": played["metadata"][number],
            }
            command = ["bash", "-c", flags["--command"]]
            subprocess.run(command, cwd=home, env=environment, stdin=subprocess.DEVNULL)
    if "worker.sh status" in flags["--command"]:
        looks = int((cloud / "looks").read_text()) + 1
        (cloud / "looks").write_text(str(looks % 2))
        if looks == 2 and take("preemptions"):
            end()
            if (cloud / "request").exists():
                set_state("request", "SUSPENDED")
                set_state("node", None)
            else:
                set_state("node", "PREEMPTED")
        elif looks == 2:
            (cloud / "finish").touch()
            wait()
            (cloud / "finish").unlink()
            take("codes")
"""

# Stands in for training: records its arguments, saves, and ends at the file `finish` or on SIGTERM.
TRAINING = r"""#!/usr/bin/env bash
printf '%s\0' "$@" >"$HOME/arguments"
env | grep ^JAX_ >"$HOME/environment"
touch "$HOME/ready"
for argument; do
    case $argument in --workdir=*) checkpoints=${argument#*=}/checkpoints ;; esac
done
if [ -e "$CLOUD/saves" ] && [ "${JAX_PROCESS_ID:-0}" = 0 ]; then
    mkdir -p "$checkpoints"
    count=$(find "$checkpoints" -mindepth 1 | wc -l)
    mkdir -p "$checkpoints/$((10 * (count + 1)))"
fi
trap 'echo "Stopped at step 7, saved."; exit 75' TERM
until [ -e "$CLOUD/finish" ]; do sleep 0.02; done
code=$(head -n 1 "$CLOUD/codes")
[ -z "$code" ] || [ "$code" = 0 ] || echo "hashvision: the dataset is broken; fix it." >&2
exit "${code:-0}"
"""


class Cloud:
    """The simulated cloud, a repository to launch from, and its settings; all paths have spaces."""

    def __init__(self, folder, workers=2, training=TRAINING, files=()):
        self.folder = folder / "the cloud"
        self.repository = folder / "a repository"
        self.bucket = folder / "it's a bucket"
        self._running = None
        self._servers = [_Metadata(number, workers) for number in range(workers)]
        self._make_repository(files)
        names = ("requirements.txt", "requirements-tpu.txt")
        pins = b"".join((self.repository / name).read_bytes() for name in names)
        venv = f"hashvision/venv-{hashlib.sha256(pins).hexdigest()[:12]}"
        (self.folder / "image" / venv / "bin").mkdir(parents=True)
        (self.folder / "image" / venv / "complete").touch()
        self._executable(self.folder / "image" / venv / "bin/python", training)
        self._executable(self.folder / "bin/gcloud", f"#!{sys.executable} -S{GCLOUD}")
        self.settings = {
            "PROJECT": "a-project",
            "ZONE": "us-central2-b",
            "NAME": "pod",
            "TYPE": "v4-16",
            "VERSION": "tpu-ubuntu2204-base",
            "BUCKET": str(self.bucket),
            "SPOT": "yes",
            "POLL": "0.01",
            "TRIES": "3",
        }
        self.let_through()
        for name, content in (("looks", "0"), ("deaf", ""), ("codes", ""), ("saves", "")):
            (self.folder / name).write_text(content)

    def let_through(self, *names):
        """Sets which environment variables reach the workers."""
        played = {"metadata": [server.address for server in self._servers], "environment": names}
        (self.folder / "cloud.json").write_text(json.dumps(played))

    def then(self, name, *lines):
        """Writes a file of planned events: failures of gcloud, preemptions or exit codes."""
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def _executable(self, path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)

    def _make_repository(self, files):
        shutil.copytree(REPO / "launch", self.repository / "launch")
        (self.repository / "configs").mkdir()
        (self.repository / "configs" / "demo.py").write_text("# a config\n")
        for path in REPO.glob("requirements*.txt"):
            shutil.copy(path, self.repository)
        for source, name in files:
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, self.repository / name)
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("commit", "--quiet", "--message=all")
        self.commit = self.git("rev-parse", "HEAD").strip()

    def git(self, *arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", *who, *arguments], cwd=self.repository, check=True, stdout=-1, text=True
        ).stdout

    def environment(self):
        return {
            **os.environ,
            "CLOUD": str(self.folder),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "POD_ENV": str(self.folder / "pod.env"),
        }

    def start(self, *arguments, script="tpu_vm.sh", **environment):
        """Starts a script of launch/, whose output goes to the files `out` and `err`."""
        lines = (f"{name}={_quoted(value)}\n" for name, value in self.settings.items())
        (self.folder / "pod.env").write_text("".join(lines))
        with open(self.folder / "out", "w") as out, open(self.folder / "err", "w") as err:
            self._running = subprocess.Popen(
                [str(BASH), self.repository / "launch" / script, *arguments],
                env={**self.environment(), **environment},
                cwd=self.folder,
                stdout=out,
                stderr=err,
            )
        return self._running

    def launch(self, *arguments, **options):
        """Runs a script of launch/ to its end; returns (exit code, stdout, stderr)."""
        code = self.start(*arguments, **options).wait(240)
        return code, (self.folder / "out").read_text(), (self.folder / "err").read_text()

    def calls(self):
        """The arguments of each call of gcloud since the last call of this method."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def homes(self):
        return sorted(self.folder.glob("worker *"))

    def port(self):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            return free.getsockname()[1]

    def close(self):
        if self._running:
            self._running.kill()
            self._running.wait()
        for pid in self.folder.glob("worker */hashvision/pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(os.getsid(int(pid.read_text())), signal.SIGKILL)
        for server in self._servers:
            server.close()


def _quoted(value):
    return "'" + value.replace("'", "'\\''") + "'"


class _Metadata:
    """The metadata server of one worker, with the older format of the endpoints."""

    def __init__(self, number, workers):
        attributes = {
            "agent-worker-number": str(number),
            "worker-network-endpoints": ",".join(f"n{n}:{n}:127.0.0.1" for n in range(workers)),
        }

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                value = attributes.get(self.path.rpartition("attributes/")[2])
                has_header = self.headers["Metadata-Flavor"] == "Google"
                self.send_response(200 if value and has_header else 404)
                self.end_headers()
                self.wfile.write((value or "").encode())

            def log_message(self, format, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
