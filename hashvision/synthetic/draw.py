"""Writes drawn posts (the `draw` command), so that everything runs without a download.

They imitate what `prepare` meets in a real dump: tags in synonyms and spellings, spam, missing and
wrong tags, long tails of kinds and owners, private posts, reposts and broken files. Randomness is
keyed by (seed, stream, number). So post 7 is the same whether 20 or 3,000 posts are written, except
for the three posts whose files are broken.
"""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hashvision import storage
from hashvision.errors import UserError
from hashvision.prepare import staging
from hashvision.synthetic import captions, objects, scenes

# All paths that `write` writes, relative to the output.
_PATHS = re.compile(
    r"posts\.jsonl|(multilabel/)?images/([pm]\d+\.jpg)?|multilabel/(labels\.jsonl)?"
    r"|transfer/((train|test)/(\w+/(\d+\.jpg)?)?)?"
)

FEWEST_POSTS = 20
SMALLEST_SIZE = 32
MANY = 500  # with at least so many posts, they are drawn on all cores
POSTS_PER_CLEAN_SCENE = 15  # 3,000 posts give 200 multi-label scenes
OWNERS = 400

# Rates that the tests check.
PRIVATE = 0.04  # share of the posts
REPOSTED = 0.03  # share of the posts
OBJECT_COUNTS = (0.5, 0.35, 0.15)  # shares of scenes with one, two and three objects

# Streams of random numbers; see _rng.
_PLAN, _SCENE, _TEXT, _FILE, _TRANSFER, _MULTILABEL, _BROKEN, _SHEET = range(8)


KINDS = objects.KINDS  # the most frequent first

# The kinds of a post are drawn without replacement, which flattens the tail. So the weights fall by
# a factor of 9 for the objects to fall by about 8.
_FREQUENCY = 9.0 ** -np.linspace(0, 1, len(KINDS))
_FREQUENCY /= _FREQUENCY.sum()


def write(
    output: str | Path,
    posts: int = 3000,
    test_per_class: int = 20,
    size: int = 96,
    seed: int = 0,
) -> None:
    """Writes the drawn posts and two clean evaluation sets; the same arguments give the same bytes.

    OUTPUT/posts.jsonl and OUTPUT/images hold the posts; one more line of posts.jsonl is broken.
    OUTPUT/transfer/{train,test}/KIND hold pictures of one object, the same number for each kind.
    OUTPUT/multilabel/labels.jsonl names all of the one to three objects in each of its images.
    The output appears only when it is complete.

    Args:
        output: a local folder that does not exist or is empty.
        posts: number of posts, at least FEWEST_POSTS.
        test_per_class: pictures of each kind in transfer/train and in transfer/test, at least 1.
        size: width and height of all pictures, in pixels, at least SMALLEST_SIZE.
        seed: of all randomness, at least 0.

    Raises:
        UserError: the output holds files or is in use, or a number is too small.
        OSError: the output cannot be written.
    """
    for name, number, least in (
        ("posts", posts, FEWEST_POSTS),
        ("test_per_class", test_per_class, 1),
        ("size", size, SMALLEST_SIZE),
        ("seed", seed, 0),
    ):
        if number < least:
            raise UserError(f"--{name}={number} must be at least {least}.")
    output = staging.resolve_output(os.fspath(output))
    if storage.is_remote(output):
        raise UserError(f"--output={output} is not on this machine; give a local folder.")
    with staging.staging_folder(output, is_own=_is_own, check=_check_empty) as made:
        folder = Path(made)
        clean_scenes = max(1, posts // POSTS_PER_CLEAN_SCENE)
        _write_posts(folder, posts=posts, size=size, seed=seed)
        _write_transfer(folder / "transfer", per_class=test_per_class, size=size, seed=seed)
        _write_multilabel(folder / "multilabel", count=clean_scenes, size=size, seed=seed)
        storage.move(made, output)  # fails unless the output is an empty folder or does not exist


def _is_own(path: str) -> bool:
    return _PATHS.fullmatch(path) is not None


def _check_empty(output: str) -> None:
    """Raises a UserError unless the output is an empty folder or does not exist."""
    if os.path.exists(output) and not (os.path.isdir(output) and not os.listdir(output)):
        raise UserError(
            f"The output {output} already exists; delete it, or choose another --output."
        )


def _write_posts(folder: Path, posts: int, size: int, seed: int) -> None:
    planned = [plan_post(seed, number) for number in range(posts)]
    # Break one public file in each of three ways; `prepare` never opens that of a private post.
    rng = _rng(seed, _BROKEN, 0)
    public = [post.number for post in planned if not post.private]
    missing, empty, cut = rng.choice(public, 3, replace=False)
    (folder / "images").mkdir()
    for post, photo in zip(planned, _draw_posts(seed, planned, size), strict=True):
        if post.number == missing:
            continue
        if post.number == empty:
            photo = b""
        elif post.number == cut:
            photo = photo[: len(photo) // 2]
        (folder / "images" / f"{post.id}.jpg").write_bytes(photo)
    lines = [post.json() for post in planned]
    lines.insert(int(rng.integers(1, posts)), '{"id": "broken", "image": ')
    (folder / "posts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_transfer(folder: Path, per_class: int, size: int, seed: int) -> None:
    for split, name in enumerate(("train", "test")):
        for index, kind in enumerate(KINDS):
            place = folder / name / kind
            place.mkdir(parents=True)
            for number in range(per_class):
                rng = _rng(seed, _TRANSFER, split, index, number)
                picture = scenes.draw_scene(rng, [kind], size, smallest=0.5)
                (place / f"{number:03d}.jpg").write_bytes(_jpeg(picture, _quality(rng)))


def _write_multilabel(folder: Path, count: int, size: int, seed: int) -> None:
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(count):
        rng = _rng(seed, _MULTILABEL, number)
        chosen = rng.choice(len(KINDS), 1 + int(rng.integers(3)), replace=False)
        kinds = sorted(KINDS[index] for index in chosen)
        image = f"images/m{number:04d}.jpg"
        picture = scenes.draw_scene(rng, kinds, size)
        (folder / image).write_bytes(_jpeg(picture, _quality(rng)))
        lines.append(json.dumps({"image": image, "labels": kinds}))
    (folder / "labels.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _draw_posts(seed: int, posts: Sequence[DrawnPost], size: int) -> Iterator[bytes]:
    draw = functools.partial(draw_post, seed, size=size)
    if len(posts) < MANY:
        yield from map(draw, posts)
        return
    # Spawned rather than forked, because the caller may have threads.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(draw, posts, chunksize=50)


class DrawnPost(NamedTuple):
    """A post whose picture is not drawn yet.

    Attributes:
        number: of the post in the dump, from 0.
        source: the number of the post whose scene it shows: its own, or that of the reposted one.
        kinds: what the scene really holds, unlike its tags.
        caption: a sentence that names the kinds.
        tags: the hashtags, as one string.
        owner: the owner's id.
        private: whether the post is private.
        created_at: ISO 8601, UTC.
    """

    number: int
    source: int
    kinds: tuple[str, ...]
    caption: str
    tags: str
    owner: str
    private: bool
    created_at: str

    @property
    def id(self) -> str:
        """The post's id."""
        return f"p{self.number:06d}"

    def json(self) -> str:
        """Returns the post as a line of posts.jsonl, without the line break."""
        fields = {
            "id": self.id,
            "image": f"images/{self.id}.jpg",
            "text": f"{self.caption} {self.tags}".strip(),
            "owner": self.owner,
            "visibility": "private" if self.private else "public",
            "created_at": self.created_at,
            "lang": "en",
        }
        return json.dumps(fields, ensure_ascii=False)


def plan_post(seed: int, number: int) -> DrawnPost:
    """Draws everything of a post except its picture.

    Args:
        seed: of the whole dump, at least 0.
        number: of the post, from 0.
    """
    owner, source = _owner_and_source(seed, number)
    kinds = _kinds_of(seed, source)
    rng = _rng(seed, _TEXT, number)
    caption, tags = captions.write_caption(rng, kinds), captions.write_tags(rng, kinds)
    created = datetime(2016, 1, 1) + timedelta(minutes=int(rng.integers(3 * 365 * 24 * 60)))
    return DrawnPost(
        number=number,
        source=source,
        kinds=kinds,
        caption=caption,
        tags=tags,
        owner=f"u{owner:04d}",
        private=bool(rng.random() < PRIVATE),
        created_at=f"{created.isoformat()}Z",
    )


def _owner_and_source(seed: int, number: int) -> tuple[int, int]:
    """Draws a post's owner, and the number of the post whose scene it shows."""
    rng = _rng(seed, _PLAN, number)
    owner = int(OWNERS * rng.random() ** 2.5)  # few owners have many posts
    if number == 0 or rng.random() >= REPOSTED:
        return owner, number
    other, source = _owner_and_source(seed, int(rng.integers(number)))
    first, _ = _owner_and_source(seed, source)
    while owner in (other, first):
        owner = (owner + 1) % OWNERS
    return owner, source


def _kinds_of(seed: int, number: int) -> tuple[str, ...]:
    """Draws the kinds in the scene that the post of this number shows first."""
    rng = _rng(seed, _SCENE, number, 0)
    count = 1 + int(rng.choice(3, p=OBJECT_COUNTS))
    chosen = rng.choice(len(KINDS), count, replace=False, p=_FREQUENCY)
    return tuple(KINDS[index] for index in chosen)


def draw_post(seed: int, post: DrawnPost, size: int) -> bytes:
    """Draws a post's picture.

    A repost has the same bytes as its source or, as often, its source's picture encoded again.

    Args:
        seed: the one given to `plan_post`.
        post: from `plan_post`.
        size: width and height, in pixels.

    Returns:
        The bytes of a JPEG file.
    """
    rng = _rng(seed, _SCENE, post.source, 1)
    photo = _jpeg(scenes.draw_scene(rng, post.kinds, size), _quality(rng))
    rng = _rng(seed, _FILE, post.number)
    if post.source != post.number and rng.random() < 0.5:
        return _jpeg(Image.open(io.BytesIO(photo), formats=("JPEG",)), int(rng.integers(45, 60)))
    return photo


def _jpeg(picture: np.ndarray | Image.Image, quality: int) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _quality(rng: np.random.Generator) -> int:
    return int(rng.integers(60, 95))


def _rng(seed: int, stream: int, *number: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream, *number])


def draw_contact_sheet(path: str | Path, columns: int = 6, size: int = 96, seed: int = 0) -> None:
    """Writes a PNG file: a row of samples of each kind, then a row of posts with several objects.

    Args:
        path: of the PNG file.
        columns: samples per row.
        size: width and height of a sample, in pixels.
        seed: as in `write`; the posts in the last row are from that dump.
    """
    margin, gap, words = 76, 4, 92
    font = ImageFont.load_default(10)
    cell = size + gap
    rows = len(KINDS)
    sheet = Image.new("RGB", (margin + columns * cell, rows * cell + cell + words), "white")
    draw = ImageDraw.Draw(sheet)
    for row, kind in enumerate(KINDS):
        draw.text((gap, row * cell + size // 2), kind, "black", font)
        for column in range(columns):
            picture = scenes.draw_scene(_rng(seed, _SHEET, row, column), [kind], size)
            sheet.paste(Image.fromarray(picture), (margin + column * cell, row * cell))
    draw.text((gap, rows * cell + size // 2), "posts", "black", font)
    several, number = [], 0
    while len(several) < columns:
        post = plan_post(seed, number)
        number += 1
        if len(post.kinds) > 1:
            several.append(post)
    for column, post in enumerate(several):
        corner = (margin + column * cell, rows * cell)
        sheet.paste(Image.open(io.BytesIO(draw_post(seed, post, size)), formats=("JPEG",)), corner)
        text = f"{post.caption} {post.tags}".encode("ascii", "ignore").decode()
        lines = textwrap.wrap(text, max(8, size // 6))[:7]
        draw.multiline_text(
            (corner[0], corner[1] + size), "\n".join(lines), "black", font, spacing=1
        )
    sheet.save(Path(path), "PNG")
