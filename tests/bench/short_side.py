"""Bytes and CPU time of decoding per photo, for values of `prepare --short_side`.

Photos are 1600 x 1200 pixels of noise, whose amplitudes fall with the frequency to the power of
1.35. At 128 pixels a JPEG of it takes 0.53 bytes per pixel; photos of Flickr8k take 0.46.
"""

import argparse
import io
import time

import numpy as np
from PIL import Image

from hashvision.data.decode import decode_photo
from hashvision.sources import pictures

SLOPE = 1.35
PHOTOS, ROUNDS = 8, 12


def picture(seed: int, height: int = 1200, width: int = 1600) -> bytes:
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.arange(width // 2 + 1))
    frequency[0, 0] = 1

    def noise() -> np.ndarray:
        waves = random.standard_normal((2, *frequency.shape)) / frequency**SLOPE
        plane = np.fft.irfft2(waves[0] + 1j * waves[1], s=(height, width))
        return plane / plane.std()

    grey = noise()
    levels = np.stack([grey + 0.35 * noise() for _ in range(3)], axis=2)
    levels = np.clip(120 + 55 * levels / levels.std(), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=95)
    return file.getvalue()


def main() -> None:
    import tensorflow as tf

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short_sides", default="128,256,384")
    parser.add_argument("--photo_size", type=int, default=512)
    arguments = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    decode = tf.function(lambda image: decode_photo(image, arguments.photo_size))
    originals = [picture(seed) for seed in range(PHOTOS)]
    print("| short side | bytes a photo | CPU to make it | CPU to decode it |\n|---|---|---|---|")
    for side in map(int, arguments.short_sides.split(",")):
        start = time.process_time()
        made = [pictures.normalize_photo(original, side) for original in originals]
        making = (time.process_time() - start) / PHOTOS
        decode(tf.constant(made[0]))
        start = time.process_time()
        for _ in range(ROUNDS):
            for each in made:
                decode(tf.constant(each))
        decoding = (time.process_time() - start) / (PHOTOS * ROUNDS)
        size = sum(map(len, made)) / PHOTOS
        print(f"| {side} | {size:,.0f} | {making * 1e3:.1f} ms | {decoding * 1e3:.2f} ms |")


if __name__ == "__main__":
    main()
