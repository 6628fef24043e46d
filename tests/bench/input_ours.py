"""A worker of input.py: our stream over a dataset folder, without crops and colour.

python tests/bench/input_ours.py DATASET BATCH BATCHES SIDE
"""

import sys

from hashvision.data import dataset, reader, stream
from serve import serve

AHEAD = 4  # batches that may be ready in advance


def main(folder: str, batch: str, batches: str, side: str) -> None:
    photos = stream.Stream(
        dataset.load(folder), batch_size=int(batch), lanes=8, seed=0, method="natural"
    )
    source = reader.BatchReader(photos, int(side), 16).batches()

    def take(count: int) -> None:
        for _ in range(count):
            next(source)

    serve(lambda: take(int(batches)), before=lambda: take(AHEAD))


if __name__ == "__main__":
    main(*sys.argv[1:])
