"""`prepare`: from a dump of posts to a dataset folder that appears complete or not at all."""

import inspect
import os
import typing
from collections.abc import Mapping, Sequence

from hashvision import storage
from hashvision.data import keys
from hashvision.data import removals as removal_list
from hashvision.duplicates import search
from hashvision.errors import UserError
from hashvision.prepare import folder, graph, runner
from hashvision.prepare.staging import resolve_output
from hashvision.tags.wordnet import load_wordnet

RANGE_BYTES = 16 * 2**20  # of the dump, for one worker at a time


def prepare(
    posts: str,
    output: str,
    images: str | None = None,
    wordnet: str | None = None,
    minimum_count: int = 10,
    short_side: int = 384,
    shard_bytes: int = 100_000_000,
    keep_untagged: bool = False,
    keep_duplicates: bool = False,
    removals: str | None = None,
    key: str | None = None,
    keep_copies_of_removed: bool = False,
    evaluation_sets: Sequence[str] = (),
    beam_options: Sequence[str] = (),
) -> dict[str, typing.Any]:
    """Makes a dataset folder from a dump of posts.

    The same dump, options and key make the same bytes. The dataset appears in the output, or
    replaces the one there, only when it is complete.

    Args:
      posts: JSONL file, one post per line: id, image or image_bytes, text, owner, visibility,
        created_at.
      output: the dataset folder to make.
      images: folder that the posts' image paths are relative to; the posts file's own if None.
      wordnet: WN-LMF file for merging tags; they are merged by spelling only if None.
      minimum_count: posts that a class needs.
      short_side: in pixels; photos with a longer short side are reduced to it.
      shard_bytes: approximate size of a shard.
      keep_untagged: whether to keep photos without a class, for training without tags (SwAV).
      keep_duplicates: whether to keep photos that show the same as another post's photo.
      removals: CSV of posts that may not be used (hashvision/data/removals.py); photos that show
        the same as theirs are left out, too.
      key: file of the dataset's key, made if it does not exist; OUTPUT.key if None.
      keep_copies_of_removed: whether to keep others' copies of photos whose owner is on the list;
        copies of photos that are listed by post or by file are always left out.
      evaluation_sets: folders of photos that no post may show.
      beam_options: Beam's own flags (--runner=..., --direct_num_workers=...).

    Returns:
      The manifest.

    Raises:
      UserError: an input is missing or not valid, the output is in use or holds anything but a
        dataset, an option is not valid, or no post was kept.
      OSError: the output cannot be written.
    """
    limits = {
        "minimum_count": minimum_count,
        "short_side": short_side,
        "shard_bytes": shard_bytes,
    }
    for name, value in limits.items():
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1.")
    own_flags = [f"--{name}" for name in inspect.signature(prepare).parameters]
    options = runner.parse_options(beam_options, own_flags)
    posts = storage.absolute(posts)
    images = os.path.dirname(posts) if images is None else storage.absolute(images)
    inputs = filter(None, (posts, images, wordnet, removals, *evaluation_sets))
    output = resolve_output(output, map(storage.absolute, inputs))
    ranges = _ranges(posts)
    if not storage.is_folder(images):
        raise UserError(f"The image folder {images} does not exist; give --images.")
    removed = removal_list.read(removals) if removals else []
    evaluation = list(search.evaluation_photos(evaluation_sets))
    key = _key_path(key, output)
    with folder.make_staging(output) as staging:
        secret = keys.make(key)
        lexicon = load_wordnet(wordnet) if wordnet else None
        if lexicon is None:
            print("prepare: no WordNet file (--wordnet), so tags are merged by spelling only")
        with runner.open_pipeline(options, output) as pipeline:
            graph.build(
                pipeline,
                ranges=ranges,
                images=images,
                output=staging,
                lexicon=lexicon,
                removed=removal_list.names(removed, secret),
                evaluation=evaluation,
                options=graph.Options(
                    minimum_count=minimum_count,
                    short_side=short_side,
                    shard_bytes=shard_bytes,
                    keep_untagged=keep_untagged,
                    keep_duplicates=keep_duplicates,
                    keep_copies_of_removed=keep_copies_of_removed,
                ),
            )
        del lexicon
        summary = folder.read_summary(staging)
        unmatched = _unmatched(summary, removed, secret)
        settings = {
            "posts": os.path.basename(posts),
            "images": os.path.basename(images),
            "wordnet": os.path.basename(wordnet) if wordnet else None,
            **limits,
            "keep_untagged": keep_untagged,
            "keep_duplicates": keep_duplicates,
            "removals": _removals_entry(removals, len(removed), len(unmatched)),
            "keep_copies_of_removed": keep_copies_of_removed,
            "evaluation_sets": [
                os.path.basename(storage.absolute(each)) for each in evaluation_sets
            ],
        }
        manifest = folder.finish(staging, summary=summary, settings=settings, key=secret)
        if keys.read(key) != secret:
            raise UserError(f"The key {key} was replaced during the run; run prepare again.")
        folder.replace(staging, output)
    if removals:
        found = removal_list.describe_unmatched(unmatched, len(removed), os.path.basename(posts))
        print(f"prepare: {found}")
    return manifest


def _ranges(posts: str) -> list[tuple[str, int, int]]:
    """Cuts the dump into ranges for the workers: (path, start, end) in bytes."""
    try:
        with storage.open(posts) as file:
            size = file.seek(0, os.SEEK_END)
    except OSError:
        raise UserError(
            f"The posts file {posts} cannot be read; give --posts a JSONL file."
        ) from None
    return [(posts, start, min(start + RANGE_BYTES, size)) for start in range(0, size, RANGE_BYTES)]


def _key_path(key: str | None, output: str) -> str:
    """Returns the path of the key's file, which must not be in the dataset."""
    path = storage.absolute(key) if key else keys.beside(output)
    if path.startswith(f"{output}/"):
        raise UserError(
            f"--key={path} is in the dataset, where it protects nobody; give --key another file."
        )
    return path


def _unmatched(
    summary: folder.Summary, removed: Sequence[removal_list.Removal], key: keys.Key
) -> list[removal_list.Removal]:
    """Returns the lines of the removal list that match no post."""
    matched = {(kind, name) for kind, name in summary.matched}
    return [line for line in removed if (line.kind, line.hash(key)) not in matched]


def _removals_entry(
    removals: str | None, lines: int, unmatched: int
) -> Mapping[str, typing.Any] | None:
    """Returns what the manifest says about the removal list; None without one."""
    if not removals:
        return None
    return {"file": os.path.basename(removals), "lines": lines, "unmatched": unmatched}
