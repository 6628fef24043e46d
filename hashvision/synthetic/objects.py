"""Draws the twelve kinds of object, part by part, for `scenes`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

BODY, SECOND, DARK, LIGHT = 1, 2, 3, 4  # parts of an object; BODY and SECOND may get a texture

_CIRCLE = np.stack(
    [np.cos(np.linspace(0, 2 * np.pi, 28, False)), np.sin(np.linspace(0, 2 * np.pi, 28, False))], 1
)

Points = Sequence[tuple[float, float]] | np.ndarray


class Pen:
    """Draws parts in an object's own frame, x right and y down, both within about [-1, 1].

    Attributes:
        parts: a PIL image of mode "L" whose pixels are part numbers, 0 for none.
    """

    def __init__(self, side: int, centre: tuple[float, float], matrix: np.ndarray):
        """Makes an empty canvas of side x side pixels.

        Args:
            side: of the canvas, in pixels.
            centre: of the object's origin, in pixels.
            matrix: 2x2, from the object's frame to pixels.
        """
        self.parts = Image.new("L", (side, side))
        self._draw = ImageDraw.Draw(self.parts)
        self._centre = np.asarray(centre, float)
        self._matrix = matrix.T
        self._scale = math.sqrt(abs(np.linalg.det(matrix)))

    def _pixels(self, points: Points) -> list[float]:
        return (np.asarray(points, float) @ self._matrix + self._centre).ravel().tolist()

    def polygon(self, points: Points, part: int) -> None:
        """Fills a polygon."""
        self._draw.polygon(self._pixels(points), fill=part)

    def oval(
        self, x: float, y: float, across: float, down: float, part: int, turn: float = 0
    ) -> None:
        """Fills an ellipse with half-axes (across, down), turned clockwise by `turn` radians."""
        cos, sin = math.cos(turn), math.sin(turn)
        axes = np.array([[across * cos, across * sin], [-down * sin, down * cos]])
        self.polygon(_CIRCLE @ axes + (x, y), part)

    def stroke(self, points: Points, width: float, part: int) -> None:
        """Draws a line of the given width with round ends."""
        flat = self._pixels(points)
        pixels = max(2, round(width * self._scale))
        self._draw.line(flat, fill=part, width=pixels, joint="curve")
        if pixels > 3:
            radius = (pixels - 1) / 2
            for x, y in (flat[:2], flat[-2:]):
                box = (x - radius, y - radius, x + radius, y + radius)
                self._draw.ellipse(box, fill=part)

    def ring(self, x: float, y: float, radius: float, width: float, part: int) -> None:
        """Draws the outline of a circle."""
        loop = np.concatenate([_CIRCLE, _CIRCLE[:2]]) * radius + (x, y)
        self.stroke(loop, width, part)


def _dog(pen: Pen, rng: np.random.Generator) -> None:
    length, leg = rng.uniform(0.38, 0.55), rng.uniform(0.35, 0.6)
    stride, lift = rng.uniform(-0.14, 0.14), rng.uniform(-0.1, 0.12)
    floor = 0.2 + leg
    for x, sway, part in (
        (-length + 0.2, -stride, SECOND),
        (length - 0.02, -stride, SECOND),
        (-length + 0.04, stride, BODY),
        (length - 0.16, stride, BODY),
    ):
        pen.stroke([(x, 0.1), (x + sway, floor), (x + sway + 0.06, floor)], 0.13, part)
    perk = rng.uniform(-0.1, 0.5)
    tail = [(-length, 0), (-length - 0.2, -0.15 - perk / 3), (-length - 0.26, -0.1 - perk)]
    pen.stroke(tail, 0.1, BODY)
    pen.oval(0, 0.05, length + 0.08, rng.uniform(0.19, 0.26), BODY)
    x, y = length + 0.1, -0.48 + lift
    pen.stroke([(length - 0.12, 0), (x, y + 0.1)], 0.27, BODY)
    pen.stroke([(length - 0.07, -0.2 + lift / 2), (length + 0.15, -0.12 + lift / 2)], 0.07, LIGHT)
    pen.oval(x, y, 0.21, 0.19, BODY)
    snout = rng.uniform(0.16, 0.26)
    pen.oval(x + 0.1 + snout * 0.6, y + 0.07, snout, 0.11, BODY)
    pen.oval(x + 0.1 + snout * 1.5, y + 0.02, 0.065, 0.055, DARK)
    pen.oval(x + 0.07, y - 0.06, 0.045, 0.045, DARK)
    if rng.random() < 0.6:
        pen.oval(x - 0.13, y + 0.06, 0.09, 0.23, SECOND, 0.25)
    else:
        pen.polygon([(x - 0.2, y - 0.06), (x - 0.14, y - 0.38), (x + 0.04, y - 0.14)], SECOND)


def _giraffe(pen: Pen, rng: np.random.Generator) -> None:
    lean, reach = rng.uniform(0.3, 0.55), rng.uniform(-0.85, -0.65)
    stride, back = rng.uniform(-0.1, 0.1), rng.uniform(0.32, 0.42)
    for x, sway, part in (
        (-0.38, -stride, SECOND),
        (0.12, -stride, SECOND),
        (-0.48, stride, BODY),
        (0.02, stride, BODY),
    ):
        pen.stroke([(x, 0.2), (x + sway / 2, 0.55), (x + sway, 0.95)], 0.1, part)
    pen.stroke([(-0.2 - back, 0.12), (-0.3 - back, 0.45)], 0.05, BODY)
    pen.oval(-0.3 - back, 0.5, 0.05, 0.09, DARK)
    pen.oval(-0.2, 0.2, back, 0.2, BODY, -0.15)
    neck = [(-0.12, 0.12), (0.18, 0.28), (lean + 0.1, reach), (lean - 0.08, reach - 0.03)]
    pen.polygon(neck, BODY)
    pen.stroke([(-0.1, 0.08), (lean - 0.07, reach)], 0.06, SECOND)
    for horn in (-0.04, 0.07):
        top = (lean + horn - 0.03, reach - 0.2)
        pen.stroke([(lean + horn, reach), top], 0.045, SECOND)
        pen.oval(*top, 0.045, 0.045, DARK)
    pen.oval(lean - 0.13, reach - 0.03, 0.1, 0.045, SECOND, 0.4)
    pen.oval(lean + 0.14, reach + 0.05, 0.24, 0.1, BODY, rng.uniform(0.1, 0.5))
    pen.oval(lean + 0.07, reach - 0.01, 0.04, 0.04, DARK)


def _owl(pen: Pen, rng: np.random.Generator) -> None:
    wide, eye = rng.uniform(0.8, 1.15), rng.uniform(0.17, 0.23)
    if rng.random() < 0.6:
        pen.stroke([(-0.8, 0.86), (0.8, 0.86 + rng.uniform(-0.1, 0.1))], 0.12, SECOND)
    pen.oval(0, 0.22, 0.5 * wide, 0.64, BODY)
    pen.oval(0, -0.38, 0.53 * wide, 0.4, BODY)
    tuft = rng.uniform(0.85, 1.0)
    for side in (-1, 1):
        x = side * wide
        pen.polygon([(x * 0.5, -0.45), (x * 0.5, -tuft), (x * 0.1, -0.7)], BODY)
        pen.oval(x * 0.45, 0.28, 0.15 * wide, 0.5, SECOND, side * -0.15)
        pen.oval(side * 0.22, -0.4, eye + 0.05, eye + 0.05, SECOND)
        pen.oval(side * 0.22, -0.4, eye, eye, LIGHT)
        pen.oval(side * 0.21, -0.39, eye * 0.55, eye * 0.55, DARK)
        pen.stroke([(side * 0.18, 0.8), (side * 0.18, 0.9)], 0.13, DARK)
    pen.polygon([(-0.09, -0.28), (0.09, -0.28), (0, -0.06)], DARK)
    for row in range(3):
        y = 0.15 + 0.18 * row
        for x in (-0.15, 0.03) if row % 2 else (-0.24, -0.06, 0.12):
            pen.stroke([(x, y), (x + 0.06, y + 0.07), (x + 0.12, y)], 0.04, SECOND)


def _snake(pen: Pen, rng: np.random.Generator) -> None:
    thick = rng.uniform(0.085, 0.13)
    t = np.linspace(0, 1, 44)
    if rng.random() < 0.65:
        waves = rng.uniform(1.1, 1.9)
        swing = rng.uniform(0.24, 0.42)
        phase = rng.uniform(0, 2 * np.pi)
        x, y = -0.9 + 1.55 * t, swing * np.sin(2 * np.pi * waves * t + phase)
    else:  # coiled, with the head at the outer end
        turn = rng.uniform(0, 0.6) + 2 * np.pi * rng.uniform(1.4, 1.8) * t
        radius = 0.12 + 0.6 * t
        x, y = radius * np.cos(turn), 0.8 * radius * np.sin(turn)
    for step, (a, b) in enumerate(zip(x, y, strict=True)):
        radius = thick * min(1.0, 0.2 + 2.5 * t[step])
        pen.oval(a, b, radius, radius, BODY)
    turn = math.atan2(y[-1] - y[-4], x[-1] - x[-4])

    def at(ahead: float, beside: float) -> tuple[float, float]:  # in the frame of the head
        cos, sin = math.cos(turn), math.sin(turn)
        return x[-1] + cos * ahead - sin * beside, y[-1] + sin * ahead + cos * beside

    pen.stroke([at(0.15, 0), at(0.4, 0)], 0.04, SECOND)
    for side in (-1, 1):
        pen.stroke([at(0.4, 0), at(0.5, side * 0.08)], 0.035, SECOND)
    pen.oval(*at(0.08, 0), thick * 1.9, thick * 1.4, BODY, turn)
    for side in (-1, 1):
        eye = at(0.1, side * thick * 0.75)
        pen.oval(*eye, 0.055, 0.055, LIGHT)
        pen.oval(*eye, 0.03, 0.03, DARK)


def _butterfly(pen: Pen, rng: np.random.Generator) -> None:
    spread, tall, low = rng.uniform(0.42, 0.54), rng.uniform(0.26, 0.36), rng.uniform(0.22, 0.34)
    tilt, spots = rng.uniform(0.4, 0.8), rng.random() < 0.7
    lower = BODY if rng.random() < 0.5 else SECOND
    for side in (-1, 1):
        pen.oval(side * spread * 0.72, 0.38, spread * 0.72, low, lower, side * 0.7)
        pen.oval(side * spread, -0.3, spread * 1.08, tall, BODY, -side * tilt)
        if spots:
            pen.oval(side * spread * 1.3, -0.45, 0.12, 0.1, LIGHT)
            pen.oval(side * spread * 0.85, 0.45, 0.1, 0.1, LIGHT)
            pen.oval(side * spread * 1.3, -0.45, 0.05, 0.05, DARK)
        feeler = [(0, -0.4), (side * 0.12, -0.7), (side * 0.28, -0.88)]
        pen.stroke(feeler, 0.045, DARK)
        pen.oval(side * 0.28, -0.88, 0.05, 0.05, DARK)
    pen.oval(0, 0.05, 0.075, 0.5, DARK)
    pen.oval(0, -0.43, 0.095, 0.095, DARK)


def _fish(pen: Pen, rng: np.random.Generator) -> None:
    deep, tail = rng.uniform(0.28, 0.52), rng.uniform(0.28, 0.48)
    fin = rng.uniform(0.15, 0.35)
    pen.polygon([(-0.4, 0), (-0.95, -tail), (-0.78, 0), (-0.95, tail)], SECOND)
    crest = [(-0.25, -deep * 0.7), (-0.15, -deep - fin), (0.35, -deep - fin * 0.5)]
    pen.polygon([*crest, (0.4, -deep * 0.7)], SECOND)
    pen.polygon([(-0.1, deep * 0.7), (-0.2, deep + fin * 0.8), (0.2, deep * 0.8)], SECOND)
    x = np.linspace(-0.6, 0.92, 18)
    profile = deep * np.sin(np.pi * (x + 0.6) / 1.52) ** 0.7
    pen.polygon(np.concatenate([np.stack([x, -profile], 1), np.stack([x, profile], 1)[::-1]]), BODY)
    pen.stroke([(0.4, -deep * 0.6), (0.3, 0), (0.4, deep * 0.6)], 0.045, DARK)
    pen.polygon([(0.2, 0.02), (-0.14, -0.02), (-0.1, 0.2)], SECOND)
    pen.oval(0.6, -deep * 0.28, 0.1, 0.1, LIGHT)
    pen.oval(0.62, -deep * 0.28, 0.055, 0.055, DARK)
    pen.stroke([(0.9, 0.06), (0.72, 0.12)], 0.04, DARK)


def _tree(pen: Pen, rng: np.random.Generator) -> None:
    thick, top = rng.uniform(0.08, 0.15), rng.uniform(0.1, 0.4)
    trunk = [(-thick, top - 0.3), (thick, top - 0.3), (thick * 1.5, 0.95), (-thick * 1.5, 0.95)]
    if rng.random() < 0.3:  # a conifer: tiers that widen downwards
        pen.polygon(trunk, SECOND)
        wide = rng.uniform(0.45, 0.7)
        for tier in (2, 1, 0):
            half, peak = wide * (0.5 + 0.25 * tier), -0.95 + 0.38 * tier
            pen.polygon([(0, peak), (half, peak + 0.7), (-half, peak + 0.7)], BODY)
        return
    pen.polygon(trunk, SECOND)
    pen.stroke([(0, top + 0.25), (-0.35, top - 0.15)], thick, SECOND)
    pen.stroke([(0, top + 0.2), (0.35, top - 0.2)], thick, SECOND)
    middle, wide = top - 0.55, rng.uniform(0.38, 0.55)
    pen.oval(0, middle, wide, 0.42, BODY)
    for angle in np.linspace(0, 2 * np.pi, 8, False) + rng.uniform(0, 0.8):
        radius = rng.uniform(0.2, 0.3)
        pen.oval(wide * math.cos(angle), middle + 0.34 * math.sin(angle), radius, radius, BODY)
    if rng.random() < 0.4:
        for _ in range(6):
            x, y = rng.uniform(-wide, wide), middle + rng.uniform(-0.4, 0.4)
            pen.oval(x, y, 0.07, 0.07, LIGHT)


def _car(pen: Pen, rng: np.random.Generator) -> None:
    roof, nose, boot = rng.uniform(-0.55, -0.38), rng.uniform(0.2, 0.45), rng.uniform(0.2, 0.9)
    wheel = rng.uniform(0.17, 0.23)
    back, front = -0.15 - boot * 0.85, nose + 0.25
    cabin = [(back, -0.02), (back + 0.16, roof), (nose - 0.05, roof), (front, -0.02)]
    pen.polygon(cabin, BODY)
    waist = rng.uniform(-0.12, -0.02)
    hull = [(-0.97, 0.3), (-0.97, 0.02), (-0.88, waist), (0.7, waist), (0.95, 0.05), (0.97, 0.3)]
    pen.polygon(hull, BODY)
    pillar = (back + front) / 2 + 0.02
    glass = roof + 0.08
    pen.polygon(
        [
            (back + 0.14, waist),
            (back + 0.22, glass),
            (pillar - 0.04, glass),
            (pillar - 0.04, waist),
        ],
        LIGHT,
    )
    pen.polygon(
        [
            (pillar + 0.04, waist),
            (pillar + 0.04, glass),
            (nose - 0.08, glass),
            (front - 0.1, waist),
        ],
        LIGHT,
    )
    pen.stroke([(-0.95, 0.28), (0.95, 0.28)], 0.08, SECOND)
    pen.stroke([(pillar, waist + 0.02), (pillar, 0.22)], 0.025, DARK)
    pen.stroke([(pillar - 0.2, 0.07), (pillar - 0.1, 0.07)], 0.04, DARK)
    pen.oval(0.9, 0.1, 0.06, 0.06, LIGHT)
    for x in (-0.56, 0.56):
        pen.oval(x, 0.33, wheel, wheel, DARK)
        pen.oval(x, 0.33, wheel * 0.5, wheel * 0.5, LIGHT)


def _airplane(pen: Pen, rng: np.random.Generator) -> None:
    slim, sweep = rng.uniform(0.1, 0.15), rng.uniform(0.15, 0.45)
    if rng.random() < 0.5:  # from above
        chord, span = rng.uniform(0.24, 0.34), rng.uniform(0.75, 0.95)
        for side in (-1, 1):
            tip = -sweep
            wing = [(0.2, 0), (tip + 0.08, side * span), (tip - 0.06, side * span)]
            pen.polygon([*wing, (0.2 - chord - 0.1, 0)], BODY)
            pen.oval((0.2 + tip) / 2 + 0.06, side * span * 0.45, 0.13, 0.05, DARK)
            pen.polygon([(-0.6, 0), (-0.85, side * 0.34), (-0.95, side * 0.34), (-0.85, 0)], SECOND)
        pen.oval(0, 0, 0.95, slim, BODY)
        pen.stroke([(-0.92, 0), (-0.65, 0)], 0.06, SECOND)
    else:  # from the side and a little above
        pen.polygon([(0.15, -0.05), (-sweep, -0.5), (-sweep - 0.16, -0.5), (-0.2, -0.05)], SECOND)
        pen.polygon([(-0.5, -0.05), (-0.8, -0.55), (-0.98, -0.55), (-0.9, 0)], SECOND)
        pen.oval(0, 0, 0.95, slim + 0.05, BODY)
        pen.polygon([(-0.6, 0), (-0.9, 0.22), (-1.0, 0.22), (-0.85, -0.02)], SECOND)
        for x in np.linspace(-0.5, 0.5, 7):
            pen.oval(x, -0.05, 0.04, 0.045, LIGHT)
        wing = [(0.25, 0.06), (-sweep, 0.7), (-sweep - 0.2, 0.7), (-0.25, 0.06)]
        pen.polygon(wing, SECOND)
        pen.oval(0.12, 0.26, 0.13, 0.06, DARK)
    pen.oval(0.78, -0.03, 0.09, slim * 0.55, LIGHT)


def _bicycle(pen: Pen, rng: np.random.Generator) -> None:
    wheel, tube = rng.uniform(0.34, 0.42), rng.uniform(0.06, 0.085)
    rear, front = (-0.55, 0.36), (0.57, 0.36)
    crank, saddle, stem = (-0.06, 0.38), (-0.24, -0.24), (0.38, rng.uniform(-0.28, -0.16))
    for x, y in (rear, front):
        pen.ring(x, y, wheel, 0.08, SECOND)
        for angle in np.linspace(0, np.pi, 4, False) + rng.uniform(0, 0.7):
            dx, dy = wheel * math.cos(angle), wheel * math.sin(angle)
            pen.stroke([(x - dx, y - dy), (x + dx, y + dy)], 0.012, SECOND)
    low = rng.random() < 0.3  # a step-through frame
    beam = (-0.14, 0.1) if low else (-0.21, -0.12)
    for path in ([rear, crank, stem, front], [rear, beam, crank], [beam, stem], [saddle, crank]):
        pen.stroke(path, tube, BODY)
    pen.stroke([(-0.38, -0.3), (-0.12, -0.28)], 0.1, DARK)
    pen.stroke([saddle, (-0.25, -0.3)], tube, BODY)
    bar = (stem[0] - 0.03, stem[1] - 0.2)
    pen.stroke([stem, bar], tube, BODY)
    if rng.random() < 0.5:
        pen.stroke([bar, (bar[0] + 0.22, bar[1]), (bar[0] + 0.2, bar[1] + 0.17)], 0.06, DARK)
    else:
        pen.stroke([(bar[0] - 0.18, bar[1] - 0.06), bar, (bar[0] + 0.1, bar[1])], 0.06, DARK)
    pen.ring(*crank, 0.1, 0.05, DARK)
    pen.stroke([(-0.16, 0.54), crank, (0.04, 0.22)], 0.045, DARK)


def _sailboat(pen: Pen, rng: np.random.Generator) -> None:
    mast, deck = rng.uniform(-0.12, 0.15), rng.uniform(0.42, 0.52)
    bow, boom = rng.uniform(0.75, 0.95), deck - 0.1
    pen.stroke([(mast, deck), (mast, -0.97)], 0.055, DARK)
    pen.polygon([(mast + 0.05, -0.9), (mast + 0.05, boom), (mast + 0.7, boom)], BODY)
    if rng.random() < 0.75:
        foot = mast - rng.uniform(0.45, 0.65)
        pen.polygon([(mast - 0.05, -0.75), (mast - 0.05, boom), (foot, boom)], BODY)
    hull = [(-0.9, deck), (bow, deck), (bow - 0.3, 0.82), (-0.6, 0.82)]
    pen.polygon(hull, SECOND)
    pen.stroke([(-0.78, deck + 0.12), (bow - 0.14, deck + 0.12)], 0.06, LIGHT)
    if rng.random() < 0.6:
        pen.polygon([(mast, -0.97), (mast - 0.25, -0.9), (mast, -0.82)], SECOND)
    swell = np.linspace(-1, 1, 24)
    wave = 0.85 + 0.04 * np.sin(swell * rng.uniform(12, 20) + rng.uniform(0, 6))
    pen.stroke(np.stack([swell, wave], 1), 0.07, LIGHT)


def _eyeglasses(pen: Pen, rng: np.random.Generator) -> None:
    wide, tall = rng.uniform(0.33, 0.42), rng.uniform(0.24, 0.38)
    rim, square = rng.uniform(0.08, 0.13), rng.choice([1.0, 0.6, 0.35])
    flare = rng.choice([0.0, 0.18])  # lifts the outer corners: cat-eye frames
    lens = LIGHT if rng.random() < 0.6 else SECOND
    gap = wide + 0.08
    outer = gap + wide
    shape = np.sign(_CIRCLE) * np.abs(_CIRCLE) ** square * (wide, tall)
    hinge = -tall * 0.45 - flare * 0.8
    bend = rng.uniform(0.2, 0.5)
    for side in (-1, 1):
        loop = shape + (0, 0.15)
        loop[:, 1] -= flare * np.clip(loop[:, 0] / wide, 0, 1)
        loop[:, 0] = side * (loop[:, 0] + gap)
        arm = [(side * outer * 0.98, 0.15 + hinge), (side * (outer + 0.08), hinge)]
        arm += [(side * (outer - 0.1), hinge - bend), (side * (outer - 0.25), hinge - bend + 0.05)]
        pen.stroke(arm, rim * 0.8, BODY)
        pen.polygon(loop, lens)
        pen.stroke([(side * gap - 0.12, 0.22), (side * gap + 0.08, 0.02)], 0.05, DARK)
        pen.stroke(np.concatenate([loop, loop[:2]]), rim, BODY)
    pen.stroke([(-0.14, 0.12), (0, 0.02), (0.14, 0.12)], rim, BODY)


DRAWERS: dict[str, Callable[[Pen, np.random.Generator], None]] = {
    "dog": _dog,
    "car": _car,
    "tree": _tree,
    "fish": _fish,
    "bicycle": _bicycle,
    "butterfly": _butterfly,
    "airplane": _airplane,
    "owl": _owl,
    "sailboat": _sailboat,
    "snake": _snake,
    "eyeglasses": _eyeglasses,
    "giraffe": _giraffe,
}
KINDS = tuple(DRAWERS)
# Largest turns, in degrees; objects that stand on the ground turn less.
TURNS = {"airplane": 50, "butterfly": 60, "snake": 70, "fish": 30, "eyeglasses": 25}
