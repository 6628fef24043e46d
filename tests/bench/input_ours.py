"""A worker of input.py: our stream over a dataset folder, without augmentation (the device's).

python tests/bench/input_ours.py DATASET BATCH BATCHES CROPS
"""

import ast
import sys

from serve import serve

from hashvision.data import dataset, stream
from hashvision.data.crops import Crops

AHEAD = 4  # batches that may be ready before they are asked for


def main(folder: str, batch: str, batches: str, crops: str) -> None:
    photos = stream.Stream(
        dataset.load(folder), batch_size=int(batch), lanes=8, seed=0, method="natural"
    )
    source = photos.batches([Crops(*each) for each in ast.literal_eval(crops)], 16)

    def take(count: int) -> None:
        for _ in range(count):
            next(source)

    serve(lambda: take(int(batches)), before=lambda: take(AHEAD))


if __name__ == "__main__":
    main(*sys.argv[1:])
