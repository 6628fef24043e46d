"""The host's input pipeline against torchvision's; also whether a host is fast enough for a plan.

Ours only decodes; crops (hashvision/pixels/crops.py), colour and blur are the device's work.
torchvision does all of it on the host. The test photos are smaller than those of a platform, so
twelve of them, four by three, make up a JPEG of about 500 by 375.
"""

import argparse
import io
import json
import os
import pathlib
import sys
import tempfile

from PIL import Image

import datasets
import figures

CROPS = {
    "crop_224": "((1, 224, 0.08, 1.0),)",
    "multicrop_2x224+6x96": "((2, 224, 0.14, 1.0), (6, 96, 0.05, 0.14))",
}
COLUMNS, ROWS, SIDE = 4, 3, 125


def mosaics(photos: list[pathlib.Path], folder: pathlib.Path) -> None:
    """Writes JPEGs of COLUMNS by ROWS photos, with SIDE pixels per photo."""
    each = COLUMNS * ROWS
    for number in range(len(photos) // each):
        mosaic = Image.new("RGB", (COLUMNS * SIDE, ROWS * SIDE))
        for place, path in enumerate(photos[number * each : (number + 1) * each]):
            photo = Image.open(path).convert("RGB").resize((SIDE, SIDE))
            mosaic.paste(photo, (place % COLUMNS * SIDE, place // COLUMNS * SIDE))
        mosaic.save(folder / f"{number:05d}.jpg", quality=95)


def readable(path: pathlib.Path) -> bool:
    try:
        Image.open(io.BytesIO(path.read_bytes())).load()
    except OSError:
        return False
    return True


def need(plan: str, rate: float) -> str:
    """A sentence on what each host of a plan must deliver, and whether this speed is enough."""
    found = json.loads(pathlib.Path(plan).read_text())
    if not found["chip"]:
        return f"{plan} is of no TPU: nothing says how fast its steps are."
    wanted = found["photos_per_second"] / found["hosts"]
    have, a_core = found["host_cores"], rate / (os.cpu_count() or 1)
    needed = wanted / a_core
    verdict = "enough" if needed <= have else "too few"
    return (
        f"{found['model']} on {found['topology']}: {wanted:,.0f} photos a second from each of"
        f" {found['hosts']} hosts; at {a_core:,.0f} a core that takes {needed:,.1f} of"
        f" its {have} cores: {verdict}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer_python", required=True, help="one that has torch and torchvision")
    parser.add_argument("--photos", default="../shared/data/posts/images", help="folder of JPEGs")
    parser.add_argument("--photo_size", type=int, default=512, help="as config.data.photo_size")
    parser.add_argument("--crops", default=",".join(CROPS))
    parser.add_argument("--batches", type=int, default=20, help="of 64 photos, a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plan", action="append", default=[], help="a plan's --json")
    arguments = parser.parse_args()
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    photos = [path for path in sorted(pathlib.Path(arguments.photos).rglob("*.jpg"))[:6000]]
    photos = [path for path in photos if readable(path)]
    with tempfile.TemporaryDirectory() as temporary:
        jpegs, folder = pathlib.Path(temporary, "jpegs"), pathlib.Path(temporary, "dataset")
        jpegs.mkdir()
        mosaics(photos, jpegs)
        paths = sorted(jpegs.iterdir())
        size = sum(path.stat().st_size for path in paths) / len(paths) / 1000
        print(f"{len(paths):,} JPEGs of {COLUMNS * SIDE}x{ROWS * SIDE}, {size:.0f} KB each")
        datasets.write(folder, len(paths), photo=lambda number: paths[number].read_bytes())
        rates = []
        for crops in arguments.crops.split(","):
            amount = ["64", str(arguments.batches), CROPS[crops]]
            ours = [sys.executable, str(figures.HERE / "input_ours.py"), str(folder), *amount[:2]]
            ours.append(str(arguments.photo_size))
            peer = [arguments.peer_python, str(figures.HERE / "input_peer.py"), str(jpegs), *amount]
            workers = {"ours": ours, "torchvision": [*peer, "1" if "multi" in crops else "0"]}
            if "multi" in crops:
                workers["torchvision, without colour and blur"] = [*peer, "0"]
            found = figures.compare(
                f"input/{crops}/{os.cpu_count()}cores",
                "photos/s",
                workers,
                64 * arguments.batches,
                arguments.rounds,
            )
            figures.write(found, figures.run())
            rates.append(found[0].ours)
    for plan in arguments.plan:
        print(need(plan, min(rates)))


if __name__ == "__main__":
    main()
