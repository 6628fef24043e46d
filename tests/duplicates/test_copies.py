"""Tests that chains of copies end where plain loops end, and that posts get their copies."""

import collections
import hashlib
import json
import pathlib
import random

import apache_beam as beam
import pytest
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from hashvision.data import records
from hashvision.duplicates import spool
from hashvision.duplicates.search import DuplicatePair
from hashvision.prepare import copies, once
from hashvision.prepare.reading import Photo


def photo(number: int) -> Photo:
    """Post `number` in the order of dates; the hashes of ids are in another order."""
    name = f"p{number}"
    return Photo(
        order=(records.id_hash(name), 1000 - number),
        id=name,
        owner=f"u{number % 7}",
        when=number,
        tags=(f"tag{number}", "both"),
        words=(f"word{number}",),
        sha256=hashlib.sha256(name.encode()).digest(),
        location=spool.Location("file", number, 1),
    )


def copy_of(number: int) -> records.Copy:
    post = photo(number)
    return records.Copy(post.id, post.owner, post.sha256)


PACKED = [photo(number).pack().decode() for number in range(300)]


def forest(seed: int) -> list[DuplicatePair]:
    """Pairs of most of 300 posts with earlier posts: stars, short chains, and a slow film."""
    generator = random.Random(seed)
    matches = []
    for number in range(3, 300):
        film = 120 < number < 200
        kind = generator.choices(("", "duplicate", "leak", "removed"), (20, 70, 3, 2))[0]
        kind = "duplicate" if film else kind
        if kind:
            before = number - 1 if film or generator.random() < 0.5 else generator.randrange(number)
            partner = {"leak": '["x", "/x"]', "removed": ""}.get(kind, PACKED[before])
            also = {generator.randrange(number) for _ in range(generator.randrange(3))} - {before}
            also = tuple(PACKED[each] for each in sorted(also))
            order, *_ = once.join_input((photo(number), None))
            matches.append(DuplicatePair(order, PACKED[number], kind, partner, 0.97, also))
    generator.shuffle(matches)
    return matches


def run(folder: pathlib.Path, matches: list[DuplicatePair], keep_duplicates: bool):
    """Returns {post: (end, fate)} of FollowChains, and {post: (copies, tags)} of GroupCopies."""

    def write(found, name):
        (folder / name).write_text(json.dumps(found))

    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        links = (
            pipeline
            | beam.Create([0])
            | beam.FlatMap(lambda _: matches)
            | beam.Reshuffle()
            | copies.FollowChains(buckets=5)
        )
        _ = (
            links
            | "Links" >> beam.Map(lambda link: (link.key.hex(), link.end.hex(), link.fate))
            | "AllLinks" >> beam.combiners.ToList()
            | "WriteLinks" >> beam.Map(write, "links")
        )
        _ = (
            links
            | copies.GroupCopies(str(folder / "spool"), 5, keep_duplicates)
            | "Groups" >> beam.Map(lambda g: (g.key.hex(), g.copies, sorted(g.tags | g.words)))
            | "AllGroups" >> beam.combiners.ToList()
            | "WriteGroups" >> beam.Map(write, "groups")
        )
    numbers = {photo(number).key.hex(): number for number in range(300)}
    links = json.loads((folder / "links").read_text())
    assert len(links) == len(matches)
    groups = {}
    for key, location, texts in json.loads((folder / "groups").read_text()):
        locations, before = groups.get(numbers[key], ((), set()))
        groups[numbers[key]] = (*locations, spool.Location(*location)), before | {*texts}
    reader = spool.SpoolReader(str(folder / "spool"))
    told = {
        number: (copies.read(reader, photo(number)._replace(copies=locations)), texts)
        for number, (locations, texts) in groups.items()
    }
    reader.close()
    return {numbers[key]: (numbers[end], fate) for key, end, fate in links}, told


def plain(matches: list[DuplicatePair]):
    """The same ends and fates by a plain loop, and the other pairs of posts that show one photo."""
    posts = {packed: number for number, packed in enumerate(PACKED)}
    found = {posts[match.name]: match for match in matches}
    ends = {}
    for number in found:
        end = number
        while end in found and found[end].kind == "duplicate":
            end = posts[found[end].partner]
        ends[number] = end, found[end].kind if end in found else "kept"
    also = {(number, posts[each]) for number in found for each in found[number].also}
    return ends, also


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_kept_post_gets_all_its_copies(tmp_path, seed):
    matches = forest(seed)
    ends, told = run(tmp_path, matches, keep_duplicates=False)
    expected, also = plain(matches)
    assert ends == expected
    assert max(collections.Counter(ends.values()).values()) >= 79  # the film
    for number in {*range(300)} - {*ends}:
        ending = {each for each, (end, _) in ends.items() if end == number}
        shows = ending | {each for each, other in also if other == number}
        names, texts = told.get(number, ((), set()))
        assert names == tuple(sorted(map(copy_of, shows)))
        of_ending = {text for each in ending for text in photo(each).tags + photo(each).words}
        assert texts == of_ending


def test_with_keep_duplicates_each_post_gets_all_copies(tmp_path):
    matches = forest(2)
    ends, told = run(tmp_path, matches, keep_duplicates=True)
    expected, also = plain(matches)
    assert ends == expected
    for number in range(300):
        end, fate = ends.get(number, (number, "kept"))
        if fate == "removed":
            continue
        circle = {each for each, other in ends.items() if other[0] == end} | {end}
        circle |= {other for each, other in also if each == number}
        circle |= {each for each, other in also if other == number}
        names, texts = told.get(number, ((), set()))
        assert names == tuple(sorted(map(copy_of, circle - {number}))) and not texts


def test_a_post_inherits_only_the_most_common_tags_of_many_copies(tmp_path):
    matches = [
        DuplicatePair(
            once.join_input((photo(number), None))[0], PACKED[number], "duplicate", PACKED[0], 0.97
        )
        for number in range(1, 300)
    ]
    _, told = run(tmp_path, matches, keep_duplicates=False)
    names, texts = told[0]
    tags = {text for text in texts if not text.startswith("word")}
    expected = {"both", *sorted(f"tag{number}" for number in range(1, 300))[:199]}
    assert len(names) == 299 and tags == expected and len(texts - tags) == 299
