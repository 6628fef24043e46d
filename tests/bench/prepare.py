"""The speed of `prepare` on drawn posts, for several numbers of posts and workers.

There is no peer: the comparison is with the fewest posts and one worker.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import figures


def timed(*arguments: str) -> float:
    """Seconds that `python -m hashvision ARGUMENTS` takes, including start-up."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "hashvision", *arguments]
    subprocess.run(command, check=True, cwd=figures.ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--posts", default="1000,4000,16000")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.posts.split(",")]
    workers = [int(count) for count in arguments.workers.split(",")]
    runs = [(size, count) for size in sizes for count in workers]
    seconds: dict[tuple[int, int], list[float]] = {run: [] for run in runs}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for size in sizes:
            timed("draw", f"--output={folder / str(size)}", f"--posts={size}")
        for _ in range(arguments.rounds):
            for size, count in runs:
                options = [f"--posts={folder / str(size) / 'posts.jsonl'}"]
                options += [f"--output={folder / 'dataset'}", f"--direct_num_workers={count}"]
                options += ["--direct_running_mode=multi_processing"] if count > 1 else []
                seconds[size, count].append(timed("prepare", *options))
    speed = {run: run[0] / statistics.median(times) for run, times in seconds.items()}
    peer = f"{sizes[0]} posts, {workers[0]} worker"
    base = speed[runs[0]]
    found = [
        figures.Figure(f"prepare/{size}posts/{count}workers", "posts/s", rate, base, peer)
        for (size, count), rate in speed.items()
    ]
    figures.write(found, figures.run())


if __name__ == "__main__":
    main()
