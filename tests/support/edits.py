"""Edits that people make to photos before they post them again, drawn from a generator."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

Random = np.random.Generator
LANCZOS = Image.Resampling.LANCZOS


def decode(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def encode(image: Image.Image, quality: int = 85) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def scaled(image: Image.Image, factor: float) -> Image.Image:
    width, height = (max(16, round(side * factor)) for side in image.size)
    return image.resize((width, height), LANCZOS)


def squeezed(image: Image.Image, rng: Random) -> Image.Image:
    return image.resize((round(image.width * rng.uniform(0.85, 1.18)), image.height), LANCZOS)


def cropped(image: Image.Image, rng: Random, shares: np.ndarray | None = None) -> Image.Image:
    left, top, right, bottom = rng.uniform(0, 0.1, 4) if shares is None else shares
    width, height = image.size
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    left, top, right, bottom = (round(edge) for edge in box)
    return image.crop((left, top, right, bottom))


def framed(image: Image.Image, rng: Random) -> Image.Image:
    colours = [(0, 0, 0), (255, 255, 255), tuple(int(level) for level in rng.integers(0, 256, 3))]
    width = max(1, round(rng.uniform(0.03, 0.1) * image.width))
    return ImageOps.expand(image, width, colours[rng.integers(3)])


def strength(rng: Random) -> float:
    return float(rng.uniform(0.7, 0.85) if rng.random() < 0.5 else rng.uniform(1.15, 1.3))


def brightened(image: Image.Image, rng: Random) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(strength(rng))


def gamma(image: Image.Image, rng: Random) -> Image.Image:
    power = strength(rng)
    return image.point([round(255 * (level / 255) ** power) for level in range(256)] * 3)


EDITS: dict[str, Callable[[Image.Image, Random], bytes]] = {
    "compressed": lambda image, rng: encode(image, int(rng.integers(20, 50))),
    "scaled": lambda image, rng: encode(scaled(image, rng.uniform(0.4, 2))),
    "squeezed": lambda image, rng: encode(squeezed(image, rng)),
    "mirrored": lambda image, rng: encode(ImageOps.mirror(image)),
    "cropped": lambda image, rng: encode(cropped(image, rng)),
    "cropped by a tenth": lambda image, rng: encode(cropped(image, rng, np.full(4, 0.1))),
    "framed": lambda image, rng: encode(framed(image, rng)),
    "brightened": lambda image, rng: encode(brightened(image, rng)),
    "contrast": lambda image, rng: encode(ImageEnhance.Contrast(image).enhance(strength(rng))),
    "gamma": lambda image, rng: encode(gamma(image, rng)),
    "grey": lambda image, rng: encode(image.convert("L")),
    "mirrored, cropped, compressed": lambda image, rng: encode(
        ImageOps.mirror(cropped(image, rng)), int(rng.integers(25, 60))
    ),
    "framed, compressed": lambda image, rng: encode(framed(image, rng), int(rng.integers(25, 60))),
    "cropped, brightened, framed": lambda image, rng: encode(
        framed(brightened(cropped(image, rng), rng), rng), 70
    ),
    "cropped, scaled, compressed": lambda image, rng: encode(
        scaled(cropped(image, rng), rng.uniform(0.4, 1)), 50
    ),
    "mirrored, gamma": lambda image, rng: encode(gamma(ImageOps.mirror(image), rng)),
}


def with_words(image: Image.Image, rng: Random) -> bytes:
    """Makes a meme of a picture: three random words at the top and at the bottom."""
    words = "CAT DOG WHEN NEVER ALWAYS WORK MONDAY LOVE SLEEP BOSS FRIEND SAYS YES COFFEE".split()
    image = image.copy()
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(max(9, image.height // 9))
    for y in (0.03, 0.85):
        place = (image.width * 0.04, image.height * y)
        text = " ".join(rng.choice(words, 3))
        draw.text(place, text, "white", font, stroke_width=1, stroke_fill="black")
    return encode(image)
