"""The memory of `prepare` for dumps that contain their photos, as base64 in `image_bytes`.

`PYTHONPATH=tests/support:tests/bench:. python tests/bench/prepare_memory.py --megabytes=100,2000`.
Half of the posts are private. The memory should not grow with the dump. Nothing is timed.
"""

import argparse
import base64
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

import figures

SIDE = 320  # pixels; a JPEG of noise of this size takes about 100 kB


def write(path: pathlib.Path, megabytes: int) -> int:
    """Writes a dump of about the given size; returns its number of posts."""
    rng = np.random.default_rng(0)
    posts = 0
    with path.open("w") as file:
        while file.tell() < megabytes * 1e6:
            noise = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
            photo = io.BytesIO()
            noise.save(photo, "JPEG", quality=90)
            post = {
                "id": f"p{posts}",
                "image_bytes": base64.b64encode(photo.getvalue()).decode(),
                "text": "#dog" if posts % 4 else "#tree",
                "visibility": "public" if posts % 2 else "private",
            }
            file.write(json.dumps(post) + "\n")
            posts += 1
    return posts


def peak(posts: pathlib.Path, output: pathlib.Path) -> float:
    """Peak resident megabytes of a process that prepares the posts."""
    command = [sys.executable, "-m", "hashvision", "prepare", f"--posts={posts}"]
    running = subprocess.Popen([*command, f"--output={output}"], cwd=figures.ROOT)
    _, status, usage = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        raise SystemExit("prepare has failed")
    return usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", default="100,200")
    arguments = parser.parse_args()
    print("| dump, MB | posts | resident at most, MB |\n|---|---|---|", flush=True)
    for megabytes in map(int, arguments.megabytes.split(",")):
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            posts = write(folder / "posts.jsonl", megabytes)
            found = peak(folder / "posts.jsonl", folder / "dataset")
            print(f"| {megabytes} | {posts:,} | {found:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
