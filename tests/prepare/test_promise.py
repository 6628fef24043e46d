"""Tests of what `prepare` promises, on random dumps of random copies, owners, dates and removals.

The dataset holds no photo of a removed post and no copy of one that the same method finds. Audit
finds nothing of the list in it, and finds all removed photos in the dataset made before the list.

HASHVISION_PROMISES=N draws N dumps; the default is 4.
"""

import collections
import hashlib
import json
import os
import pathlib
import random
import typing

import numpy as np
import pytest

import dumps
import edits
from hashvision.commands import main as program
from hashvision.duplicates.alignment import DUPLICATE, similarity
from hashvision.duplicates.fingerprints import Fingerprint, fingerprint
from hashvision.sources import dates
from hashvision.sources.pictures import normalize_photo

SEEDS = range(int(os.environ.get("HASHVISION_PROMISES", "4")))
SHORT_SIDE = 80  # photos are made smaller, as most are
DATES = ("2020-01-01", "2019-06-01T12:00:00+02:00", 1577836800, "1546300800000", "", "soon", None)


class Post(typing.NamedTuple):
    """A line of a dump."""

    id: str
    owner: str
    public: bool
    created_at: str
    line: int
    photo: bytes
    print: Fingerprint

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.photo).hexdigest()


class World(typing.NamedTuple):
    """A dump, and the options of prepare."""

    folder: pathlib.Path
    posts: list[Post]
    listed: set[tuple[str, str]]  # (kind, value) of the removal list
    evaluation: list[Fingerprint]
    keep_duplicates: bool
    keep_copies: bool  # of removed owners


def draw(folder: pathlib.Path, seed: int) -> World:
    generator, rng = random.Random(seed), np.random.default_rng(seed)
    names = [f"post-{generator.getrandbits(40):010x}" for _ in range(60)]
    owners = [f"owner-{generator.getrandbits(40):010x}" for _ in range(8)]
    photos, posts, lines = [], [], []
    for number, name in enumerate(names):
        if photos and generator.random() < 0.6:  # copies, and copies of copies
            photo = generator.choice(photos[-20:])
            if generator.random() < 0.7:
                edit = edits.EDITS[generator.choice(list(edits.EDITS))]
                photo = edit(edits.decode(photo), rng)
        else:
            photo = dumps.encoded(dumps.scene(1000 * seed + number))
        photos.append(photo)
        for _ in range(generator.choice((1, 1, 1, 1, 1, 2))):  # states of the post
            owner, public = generator.choice(owners), generator.random() < 0.85
            created_at, line = generator.choice(DATES), len(lines)
            (folder / f"{line}.jpg").write_bytes(photo)
            fields = {"id": name, "owner": owner, "image": f"{line}.jpg", "created_at": created_at}
            visibility = "public" if public else "friends"
            lines.append(json.dumps({**fields, "visibility": visibility, "text": "#dog"}))
            print_ = fingerprint(normalize_photo(photo, SHORT_SIDE))
            date = "" if created_at is None else str(created_at)
            posts.append(Post(name, owner, public, date, line, photo, print_))
            photo = generator.choice(photos)
    (folder / "posts.jsonl").write_text("\n".join(lines))
    listed = {("owner", owner) for owner in generator.sample(owners, generator.randrange(2))}
    listed |= {("id", generator.choice(names)) for _ in range(generator.randrange(5))}
    listed |= {("sha256", generator.choice(posts).sha256) for _ in range(generator.randrange(4))}
    listed |= {("id", "gone"), ("sha256", hashlib.sha256(b"gone").hexdigest())}
    rows = "".join(f"{kind},{value},,\n" for kind, value in sorted(listed))
    (folder / "removals.csv").write_text("kind,value,reason,received_at\n" + rows)
    evaluation = []
    if generator.random() < 0.5:
        (folder / "test").mkdir()
        for number in range(3):
            photo = edits.EDITS["cropped"](edits.decode(generator.choice(photos)), rng)
            (folder / "test" / f"{number}.jpg").write_bytes(photo)
            evaluation.append(fingerprint(normalize_photo(photo, SHORT_SIDE)))
    keep_duplicates, keep_copies = seed % 4 == 1, seed % 4 == 2
    return World(folder, posts, listed, evaluation, keep_duplicates, keep_copies)


def on_list(world: World, post: Post) -> set[str]:
    """The kinds by which the list names a post."""
    names = {("id", post.id), ("owner", post.owner), ("sha256", post.sha256)}
    return {kind for kind, _ in names & world.listed}


def followed(world: World, post: Post, public: bool) -> bool:
    """Whether copies of the post's photo must be dropped; a private post's file is not known."""
    kinds = {"id"} | ({"sha256"} if public else set()) | (set() if world.keep_copies else {"owner"})
    return bool(on_list(world, post) & kinds)


def shows(one: Fingerprint, other: Fingerprint) -> bool:
    return similarity(one, other) >= DUPLICATE


class Outcome(typing.NamedTuple):
    """The expected result of a dump."""

    kept: dict[str, Post]
    reasons: collections.Counter[str]
    posts: list[Post]  # those that are compared: public, intact, not on the list


def expected(world: World, removals: bool) -> Outcome:
    """The result of prepare, computed one post after the other."""
    reasons: collections.Counter[str] = collections.Counter()
    states = collections.defaultdict(list)
    for post in world.posts:
        states[post.id].append(post)
    removed, posts = [], []
    for same in states.values():
        public = all(post.public for post in same)
        latest = max(same, key=lambda post: (dates.sortable(post.created_at), post.line))
        for post in same:
            if removals and followed(world, post, public):
                removed.append(post.print)
            if not public:
                reasons["private"] += 1
            elif removals and on_list(world, post):
                reasons["removed"] += 1
            elif post != latest:
                reasons["duplicate_id"] += 1
            else:
                posts.append(post)
    kept: dict[str, Post] = {}
    fates: dict[str, str] = {}  # by id of the posts so far: the reason to drop them, or ""
    before: list[Post] = []
    posts.sort(key=lambda post: (dates.sortable(post.created_at), key(post)))
    for post in posts:
        copied = next((each for each in before if shows(post.print, each.print)), None)
        if any(shows(post.print, print_) for print_ in removed):
            fates[post.id] = "removed_copy"
        elif any(shows(post.print, print_) for print_ in world.evaluation):
            fates[post.id] = "evaluation_photo"
        elif copied and fates[copied.id] == "removed_copy":
            fates[post.id] = "removed_copy"
        elif copied and not world.keep_duplicates:
            fates[post.id] = "duplicate_photo"
        else:
            fates[post.id] = ""
            kept[post.id] = post
        before.append(post)
    reasons.update(fate for fate in fates.values() if fate)
    return Outcome(kept, reasons, posts)


def key(post: Post) -> int:
    from hashvision.data import records

    return records.id_hash(post.id)


def prepare(world: World, name: str, removals: bool) -> dict[str, typing.Any]:
    """Makes a dataset, checks that it is as expected, and returns its records."""
    manifest, written = dumps.prepare(
        world.folder / "posts.jsonl",
        world.folder / name,
        removals=str(world.folder / "removals.csv") if removals else None,
        evaluation_sets=[str(world.folder / "test")] if world.evaluation else [],
        keep_duplicates=world.keep_duplicates,
        keep_copies_of_removed=world.keep_copies,
        minimum_count=1,
        short_side=SHORT_SIDE,
    )
    outcome = expected(world, removals)
    assert dumps.dropped(manifest) == dict(outcome.reasons)
    assert written.keys() == outcome.kept.keys()
    return written


def audited(world: World, name: str) -> tuple[int, set[str]]:
    """Audit's exit code, and the posts whose records it names."""
    report = world.folder / "audit.json"
    flags = [f"--removals={world.folder / 'removals.csv'}", f"--dataset={world.folder / name}"]
    flags += ["--keep_copies_of_removed"] if world.keep_copies else []
    code = program.main(["audit", *flags, f"--json={report}"])
    found = json.loads(report.read_text())
    return code, {
        read_ids(world.folder / name / place["file"])[place["position"]]
        for removal in found["removals"]
        for place in removal["records"]
    }


def read_ids(shard: pathlib.Path) -> list[str]:
    import tensorflow as tf

    from hashvision.data import records

    parsed = tf.data.TFRecordDataset([str(shard)]).map(records.parse)
    return [record["id"].decode() for record in parsed.as_numpy_iterator()]


@pytest.fixture(scope="module", params=SEEDS)
def made(request, tmp_path_factory):
    world = draw(tmp_path_factory.mktemp(f"promise{request.param}"), request.param)
    return world, prepare(world, "old", removals=False), prepare(world, "new", removals=True)


@pytest.mark.slow
def test_the_dataset_holds_no_removed_photo_and_no_copy_of_one(made):
    world, _, new = made
    public = collections.defaultdict(lambda: True)
    for post in world.posts:
        public[post.id] &= post.public
    removed = [post for post in world.posts if followed(world, post, public[post.id])]
    for row in new.values():
        assert ("id", row.id) not in world.listed and ("owner", row.owner) not in world.listed
        assert ("sha256", row.sha256.hex()) not in world.listed
        shown = fingerprint(row.image)
        assert not any(shows(shown, post.print) for post in removed)
        for copy in row.copies:
            assert ("id", copy.id) not in world.listed
            assert ("owner", copy.owner) not in world.listed
            assert ("sha256", copy.sha256.hex()) not in world.listed
    # None is named: not in the lists of copies, nor in the examples of the manifest.
    names = {post.id for post in world.posts if on_list(world, post) or not public[post.id]}
    names -= new.keys()  # posts of which an earlier state is on the list
    for path in (world.folder / "new").iterdir():
        content = path.read_bytes()
        assert not [name for name in names if name.encode() in content], path.name


@pytest.mark.slow
def test_audit_names_removed_photos_in_the_old_dataset_and_none_in_the_new(made, capsys):
    world, old, new = made
    assert audited(world, "new") == (0, set())
    looked_at = expected(world, removals=False).posts
    removed = [post for post in looked_at if followed(world, post, True)]
    to_go = {
        name
        for name, row in old.items()
        if {("id", name), ("owner", row.owner), ("sha256", row.sha256.hex())} & world.listed
        or any(shows(fingerprint(row.image), post.print) for post in removed)
    }
    code, named = audited(world, "old")
    assert to_go <= named and code == bool(named)
    # Every record that it names is gone, or shows a photo whose copy is gone.
    told = {name for name, row in old.items() if any(c.id not in new for c in (row, *row.copies))}
    assert named <= told
