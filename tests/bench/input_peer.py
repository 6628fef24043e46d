"""A worker of input.py: torchvision's pipeline over the same JPEGs.

python tests/bench/input_peer.py FOLDER BATCH BATCHES CROPS COLOUR

A DataLoader with one worker per core. With COLOUR 1 it has all transforms of SwAV's authors
(main_swav.py and multicropdataset.py): PyTorch needs colour and blur on the host. With COLOUR 0 it
has only crops and flips.
"""

import ast
import contextlib
import os
import pathlib
import random
import sys

with contextlib.suppress(ImportError):
    import torchvision_cpu  # noqa: F401 - a stand-in where torchvision has no CPU build
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as T

from serve import serve

AHEAD = 6  # batches that may be ready in advance: two per worker, and some more


def blurred(photo: Image.Image) -> Image.Image:
    return photo.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class Photos(torch.utils.data.Dataset):
    def __init__(self, folder: str, crops: str, colour: bool) -> None:
        self.paths = sorted(pathlib.Path(folder).glob("*.jpg"))
        jitter = T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8)
        drawn = [jitter, T.RandomGrayscale(0.2), T.RandomApply([T.Lambda(blurred)], 0.5)]
        self.transforms = []
        for count, size, *scale in ast.literal_eval(crops):
            crop = T.RandomResizedCrop(size, scale=scale)
            normalize = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
            steps = [crop, T.RandomHorizontalFlip(), *(drawn if colour else [])]
            self.transforms += [T.Compose([*steps, T.ToTensor(), normalize])] * count

    def __len__(self) -> int:
        return 1 << 40  # endless passes over the dataset

    def __getitem__(self, number: int) -> list[torch.Tensor]:
        with open(self.paths[number % len(self.paths)], "rb") as file:
            photo = Image.open(file).convert("RGB")
        return [transform(photo) for transform in self.transforms]


def main(folder: str, batch: str, batches: str, crops: str, colour: str) -> None:
    photos = Photos(folder, crops, colour == "1")
    workers = os.cpu_count() or 1
    order = range(len(photos))
    loader = torch.utils.data.DataLoader(photos, int(batch), sampler=order, num_workers=workers)
    source = iter(loader)

    def take(count: int) -> None:
        for _ in range(count):
            next(source)

    serve(lambda: take(int(batches)), before=lambda: take(AHEAD))


if __name__ == "__main__":
    main(*sys.argv[1:])
