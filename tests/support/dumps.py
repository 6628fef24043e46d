"""Pictures for dumps of posts in tests, and `prepare` with the records that it writes."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from hashvision.data import records
from hashvision.prepare import folder as folders
from hashvision.prepare import pipeline

SIZE = 96


def scene(seed: int) -> Image.Image:
    """A picture with as much detail as a photo: blurred noise of several scales."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((SIZE, SIZE, 3))
    for cells in (4, 8, 16, 32):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        pixels += np.asarray(noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC), float)
    return Image.fromarray((pixels / 4).astype(np.uint8))


def encoded(image: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def prepare(
    posts: pathlib.Path, output: pathlib.Path, **options
) -> tuple[dict, dict[str, records.Record]]:
    """Runs prepare; returns its manifest, and by id each Record that it wrote."""
    written, whole = {}, folders.write_shard

    def keep(folder, rows, **options):
        rows = list(rows)
        written.update((row.id, row) for row in rows)
        return whole(folder, rows=rows, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "write_shard", keep)
        return pipeline.prepare(str(posts), str(output), **options), written


def dropped(manifest: dict) -> dict[str, int]:
    """The number of dropped posts for each reason."""
    found = manifest["posts"]["dropped"].items()
    return {reason: entry["count"] for reason, entry in found if entry["count"]}
