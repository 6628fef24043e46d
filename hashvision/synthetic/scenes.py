"""Draws photo-like scenes of twelve kinds of object, for runs without a download.

Colour says nothing about the kinds in a scene, because it is drawn independently of them. Only
shape does, so a network has something to learn and the mean colour is of no use. Objects are vivid
and backgrounds muted, so that two minutes of training suffice.
"""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from hashvision.synthetic.objects import BODY, DARK, DRAWERS, LIGHT, TURNS, Pen

SUPERSAMPLING = 2  # objects are drawn at twice the size and averaged, for soft edges
_TEXTURED = 2  # parts up to this number get a texture
MUTED, VIVID = (0.0, 0.3), (0.5, 1.0)  # saturation of backgrounds and of objects
_ALTERNATE = 4  # the second colour of part p in a texture is at p + _ALTERNATE

Colour = tuple[float, float, float]


def draw_scene(
    rng: np.random.Generator, kinds: Sequence[str], size: int, smallest: float = 0.4
) -> np.ndarray:
    """Draws a scene with one object of each of the given kinds.

    Args:
        rng: decides everything but the kinds; the same state gives the same pixels.
        kinds: one to three of KINDS.
        size: width and height, in pixels.
        smallest: share of the frame that a single object spans at least.

    Returns:
        uint8 (size, size, 3).
    """
    picture, ground = _background(rng, size)
    angle = rng.uniform(-0.9, 0.9)
    light = (math.sin(angle), -math.cos(angle))
    count = int(rng.choice([0, 0, 1, 2, 3]))
    _clutter(rng, picture, count=count, largest=0.3, light=light)
    places = _places(rng, len(kinds), smallest)
    for kind, (x, y, span) in zip(rng.permutation(np.array(kinds)), places, strict=True):
        body = _colour_apart(rng, ground, 0.5)
        second = _colour_apart(rng, [*ground, body], 0.4)
        colours = np.array([body, second, _colour(rng, VIVID), _colour(rng, VIVID)])
        colours[DARK - 1] *= 0.25
        colours[LIGHT - 1] = 0.6 + 0.4 * colours[LIGHT - 1]
        half = SUPERSAMPLING * size * span / 2
        turn = math.radians(rng.uniform(-1, 1) * TURNS.get(kind, 10))
        shape = np.diag(rng.uniform(0.88, 1.08, 2)) * half
        shape[0] *= rng.choice([-1, 1])
        spin = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        centre = (x * SUPERSAMPLING * size, y * SUPERSAMPLING * size)
        pen = Pen(SUPERSAMPLING * size, centre, spin @ shape)
        DRAWERS[kind](pen, rng)
        _paint(picture, pen.parts, colours=colours, rng=rng, light=light)
    if rng.random() < 0.3:
        _clutter(rng, picture, count=1, largest=0.22, light=light)
    return _photograph(rng, picture, light)


def _background(rng: np.random.Generator, side: int) -> tuple[np.ndarray, list[Colour]]:
    """Draws a background: float32 (side, side, 3) in [0, 1], and its two colours."""
    one, far = _colour(rng, MUTED), _colour(rng, MUTED)
    # Mix in 45% of the first colour, because objects must stand out from both.
    red, green, blue = (0.45 * a + 0.55 * b for a, b in zip(one, far, strict=True))
    two = (red, green, blue)
    x, y = _grid(side)
    style = rng.integers(6)
    if style == 0:  # plain
        mix = np.zeros((side, side), np.float32)
    elif style == 1:  # a gradient
        angle = rng.uniform(0, 2 * math.pi)
        mix = np.clip(0.5 + 0.5 * (np.cos(angle) * x + np.sin(angle) * y), 0, 1)
    elif style == 2:  # a horizon, the ground grainy
        level = rng.uniform(-0.1, 0.6) + 0.08 * np.sin(3 * x + rng.uniform(0, 6))
        ground = 0.75 + 0.25 * _smooth_noise(rng, (side, side), 6)
        mix = np.where(y > level, ground, 0.2 * (y + 1))
    elif style == 3:  # stripes
        angle, repeats = rng.uniform(0, math.pi), rng.uniform(1.5, 5)
        mix = 0.5 + 0.5 * np.sin(math.pi * repeats * (np.cos(angle) * x + np.sin(angle) * y))
    elif style == 4:  # blobs
        mix = np.clip(1.6 * _smooth_noise(rng, (side, side), side / rng.integers(3, 9)) - 0.3, 0, 1)
    else:  # bricks
        rows = rng.uniform(2.5, 5)
        row = np.floor((y + 1) * rows)
        course = (x + 1) * rows / 2 + 0.5 * (row % 2)
        joint = ((y + 1) * rows % 1 < 0.14) | (course % 1 < 0.07)
        shade = 0.35 * np.sin(7.3 * np.floor(course) + 12.9 * row) ** 2
        mix = np.where(joint, 1.0, shade)
    mix = mix.astype(np.float32)[..., None]
    ends = np.array([one, two], np.float32)
    return ends[0] + (ends[1] - ends[0]) * mix, [one, two]


@functools.cache
def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixel coordinates x and y, float32 (side, side), each from -1 to 1."""
    line = np.linspace(-1, 1, side, dtype=np.float32)
    x, y = np.meshgrid(line, line)
    return x, y


def _colour(rng: np.random.Generator, saturation: tuple[float, float]) -> Colour:
    """Draws a colour of any hue, with its saturation in the range: RGB in [0, 1]."""
    hue, value = rng.random(2).tolist()
    return colorsys.hsv_to_rgb(hue, rng.uniform(*saturation), 0.35 + 0.65 * value)


def _colour_apart(rng: np.random.Generator, others: Sequence[Colour], least: float) -> Colour:
    """Draws an object's colour at an RGB distance of at least `least` from all others.

    If 12 draws give none, it is the farthest of these.
    """
    best, reach = _colour(rng, VIVID), -1.0
    for _ in range(12):
        candidate = _colour(rng, VIVID)
        distance = min(math.dist(candidate, other) for other in others)
        if distance > reach:
            best, reach = candidate, distance
        if reach >= least:
            break
    return best


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> np.ndarray:
    """Draws noise with bumps of `cell` pixels: float32 of the given shape, about in [0, 1]."""
    rows, columns = (max(3, round(pixels / cell)) for pixels in shape)
    coarse = Image.fromarray(rng.random((rows, columns), dtype=np.float32))
    return np.asarray(coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def _clutter(
    rng: np.random.Generator, picture: np.ndarray, count: int, largest: float, light
) -> None:
    """Paints `count` random shapes, each at most `largest` wide, as a share of the frame."""
    side = picture.shape[0]
    for _ in range(count):
        half = SUPERSAMPLING * side * rng.uniform(0.4, 1) * largest / 2
        turn, stretch = rng.uniform(0, 2 * math.pi), rng.uniform(0.3, 1)
        matrix = (
            half
            * np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
            * (1, stretch)
        )
        centre = rng.uniform(0.02, 0.98, 2) * SUPERSAMPLING * side
        pen = Pen(SUPERSAMPLING * side, (centre[0], centre[1]), matrix)
        corners = int(rng.integers(2, 7))
        if corners == 2:
            pen.oval(0, 0, 1, 1, BODY)
        else:
            angles = np.linspace(0, 2 * np.pi, corners, False)
            pen.polygon(np.stack([np.cos(angles), np.sin(angles)], 1), BODY)
        colours = np.array([_colour(rng, MUTED) for _ in range(4)])
        _paint(picture, pen.parts, colours=colours, rng=rng, light=light)


def _places(
    rng: np.random.Generator, count: int, smallest: float
) -> list[tuple[float, float, float]]:
    """Draws where objects are: (x, y, size) in shares of the frame, the lowest and nearest last."""
    if count == 1:
        size = 0.9 - (0.9 - smallest) * rng.random() ** 1.5  # large sizes are more likely
        room = 0.5 * (1 - size) + 0.04  # up to 4% of the frame may be cut off
        return [(0.5 + rng.uniform(-room, room), 0.5 + rng.uniform(-room, room), size)]
    places = []
    high = int(rng.integers(2))
    for slot in range(count):
        if count == 2:
            size = rng.uniform(0.42, 0.54)
            room = 0.5 * (1 - size) + 0.02
            x, y = 0.27 + 0.46 * slot, 0.5 + rng.uniform(-room, room)
        else:  # a triangle rather than a row, for room
            size = rng.uniform(0.38, 0.46)
            x, y = 0.22 + 0.28 * slot, 0.26 if slot % 2 == high else 0.74
        places.append((x + rng.uniform(-0.03, 0.03), y, size))
    return sorted(places, key=lambda place: place[1])


def _paint(
    picture: np.ndarray,
    parts: Image.Image,
    colours: np.ndarray,
    rng: np.random.Generator,
    light: tuple[float, float],
) -> None:
    """Paints parts over a picture, in place, with a shadow, a rim and shading.

    Args:
        picture: float32 (side, side, 3).
        parts: part numbers at SUPERSAMPLING times the side.
        colours: (4, 3) in [0, 1], of BODY, SECOND, DARK and LIGHT.
        rng: decides the textures and how strong shadow, rim and rounding are.
        light: the unit vector towards the light.
    """
    box = parts.getbbox()
    if box is None:
        return
    side = picture.shape[0]
    step = side // 12
    # Work only on the window of the parts and their shadow.
    left, top = (max(0, edge // SUPERSAMPLING - 2 * step) for edge in box[:2])
    right, bottom = (min(side, edge // SUPERSAMPLING + 2 * step) for edge in box[2:])
    picture = picture[top:bottom, left:right]
    window = parts.crop(
        (SUPERSAMPLING * left, SUPERSAMPLING * top, SUPERSAMPLING * right, SUPERSAMPLING * bottom)
    )
    codes = np.array(window)

    alternate = np.clip(colours + rng.uniform(-0.4, 0.4, (4, 1)) * rng.uniform(0.5, 1, 3), 0, 1)
    table = np.zeros((2 * _ALTERNATE + 1, 4), np.uint8)
    table[1:, :3] = np.round(np.concatenate([colours, alternate]) * 255)
    table[1:, 3] = 255
    texture = _texture(rng, codes.shape, SUPERSAMPLING * side * rng.uniform(0.05, 0.12))
    if texture is not None:
        inside = (codes > 0) & (codes <= _TEXTURED) & texture
        codes += inside.view(np.uint8) * np.uint8(_ALTERNATE)
    # Four raw channels, black without a part, so that averaging weights colours by coverage. For
    # speed each pixel is looked up as one 32-bit number.
    pixels = np.take(table.view(np.uint32)[:, 0], codes)
    shape = (codes.shape[1], codes.shape[0])
    reduced = Image.frombytes("RGBX", shape, pixels.tobytes()).reduce(SUPERSAMPLING)
    small = np.asarray(reduced, np.float32) / 255
    cover = small[..., 3:]

    mask = reduced.getchannel("X")
    soft = mask.filter(ImageFilter.GaussianBlur(side / 24))
    away = (-step * light[0], -step * light[1])
    shadow, lit = _moved(soft, away), _moved(soft, (-away[0], -away[1]))
    picture *= 1 - np.float32(rng.uniform(0.1, 0.5)) * shadow
    if rng.random() < 0.75:
        rim = np.clip(2 * _moved(mask.filter(ImageFilter.BoxBlur(side / 96)), (0, 0)), 0, 1)
        edge = colours[DARK - 1] if picture.mean() > 0.4 else colours[LIGHT - 1]
        rim *= np.float32(rng.uniform(0.3, 0.9))
        picture += rim * (edge.astype(np.float32) - picture)
    picture *= 1 - cover
    picture += small[..., :3] * (1 - np.float32(rng.uniform(0.2, 0.6)) * (lit - shadow))


def _texture(rng: np.random.Generator, shape: tuple[int, int], period: float) -> np.ndarray | None:
    """Draws where the second colour of a texture shows: bool of the given shape, or None if plain.

    Args:
        rng: chooses plain (twice as often as the others), noise, stripes, dots or checks.
        shape: rows and columns.
        period: of the repeats, in pixels.
    """
    style = rng.integers(6)
    if style <= 1:
        return None
    if style == 2:
        return _smooth_noise(rng, shape, period) > rng.uniform(0.45, 0.6)
    angle, phase = rng.uniform(0, math.pi), rng.random()
    cos, sin = np.float32(math.cos(angle) / period), np.float32(math.sin(angle) / period)
    x = np.arange(shape[1], dtype=np.float32)
    y = np.arange(shape[0], dtype=np.float32)[:, None]
    across = cos * x + sin * y + np.float32(phase)
    across -= np.floor(across)
    if style == 3:
        return across < rng.uniform(0.3, 0.6)
    along = cos * y - sin * x
    along -= np.floor(along)
    if style == 4:
        return np.square(across - 0.5) + np.square(along - 0.5) < rng.uniform(0.05, 0.12)
    return (across < 0.5) ^ (along < 0.5)


def _moved(mask: Image.Image, by: tuple[float, float]) -> np.ndarray:
    """Moves a grey image by whole pixels (right, down): float32 (rows, columns, 1) in [0, 1]."""
    x, y = round(by[0]), round(by[1])
    moved = mask.crop((-x, -y, mask.width - x, mask.height - y))
    return np.asarray(moved, np.float32)[..., None] / 255


def _photograph(
    rng: np.random.Generator, picture: np.ndarray, light: tuple[float, float]
) -> np.ndarray:
    """Lights a float32 picture and adds the flaws of a cheap camera: uint8 (size, size, 3)."""
    size = picture.shape[0]
    x, y = _grid(size)
    falling = 1 + rng.uniform(0, 0.3) * (light[0] * x + light[1] * y)
    vignette = 1 - rng.uniform(0, 0.2) * (x * x + y * y)
    tint = rng.uniform(0.75, 1.25) * rng.uniform(0.9, 1.1, 3)
    picture = picture * (falling * vignette)[..., None] * tint.astype(np.float32)
    picture += rng.standard_normal(picture.shape, np.float32) * rng.uniform(0.005, 0.05)
    photo = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    if rng.random() < 0.2:
        photo = photo.filter(ImageFilter.GaussianBlur(size / 96 * rng.uniform(0.4, 0.9)))
    return np.asarray(photo)
