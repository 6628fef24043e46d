"""Runs the graph: from a dump of posts to a dataset folder, whole or not at all."""

import contextlib
import logging
import os
import typing
import warnings
from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    DirectOptions,
    PipelineOptions,
    StandardOptions,
)

import hashvision
from hashvision import storage
from hashvision.data import removals as removal_list
from hashvision.errors import UserError
from hashvision.prepare import duplicates, folder, graph
from hashvision.prepare.wordnet import load_wordnet

RANGE_BYTES = 16 * 2**20  # of the dump, to one worker at a time


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
    evaluation_sets: Sequence[str] = (),
    beam_options: Sequence[str] = (),
) -> dict[str, typing.Any]:
    """Makes a dataset folder from a dump of posts; the same bytes for the same dump and options.

    The folder appears, or replaces the dataset that lay there, when all of it is written.

    Args:
      posts: JSONL file, one post a line: id, image or image_bytes, text, owner, visibility,
        created_at.
      output: the dataset folder to make.
      images: folder that the posts' image paths are relative to; the posts file's own if None.
      wordnet: WN-LMF file by which tags are merged; by spelling only if None.
      minimum_count: posts a class needs.
      short_side: pixels to which larger photos are reduced.
      shard_bytes: approximate size of a shard.
      keep_untagged: keeps photos of no class, to learn from without tags (SwAV).
      keep_duplicates: keeps photos that show what another post's does.
      removals: CSV of posts that may not be used (hashvision/data/removals.py).
      evaluation_sets: folders of photos that no post may show.
      beam_options: Beam's own flags (--runner=..., --direct_num_workers=...).

    Returns:
      The manifest.

    Raises:
      UserError: an input is missing or no such thing, the output cannot be written, an option makes
        no sense, or no post came through.
    """
    for name, value in (
        ("minimum_count", minimum_count),
        ("short_side", short_side),
        ("shard_bytes", shard_bytes),
    ):
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    options = _beam_options(beam_options)
    posts = storage.absolute(posts)
    images = os.path.dirname(posts) if images is None else storage.absolute(images)
    ranges = _ranges(posts)
    if not storage.is_folder(images):
        raise UserError(f"the images' folder {images} does not exist; give it with --images")
    removed = removal_list.read(removals) if removals else []
    evaluation = list(duplicates.evaluation_photos(evaluation_sets))
    output = storage.absolute(output)
    staging = folder.make_staging(output)
    try:
        lexicon = load_wordnet(wordnet) if wordnet else None
        if lexicon is None:
            print("prepare: no WordNet file (--wordnet), so tags are merged by spelling only")
        with (
            _surroundings(options),
            beam.Pipeline(runner=_runner(options), options=options) as pipeline,
        ):
            graph.build(
                pipeline,
                ranges,
                images,
                staging,
                lexicon,
                removal_list.names(removed),
                evaluation,
                graph.Options(
                    minimum_count, short_side, shard_bytes, keep_untagged, keep_duplicates
                ),
            )
        del lexicon
        settings = {
            "posts": os.path.basename(posts),
            "images": os.path.basename(images),
            "wordnet": os.path.basename(wordnet) if wordnet else None,
            "minimum_count": minimum_count,
            "short_side": short_side,
            "shard_bytes": shard_bytes,
            "keep_untagged": keep_untagged,
            "keep_duplicates": keep_duplicates,
            "removals": {"file": os.path.basename(removals), "lines": len(removed)}
            if removals
            else None,
            "evaluation_sets": [
                os.path.basename(storage.absolute(each)) for each in evaluation_sets
            ],
        }
        manifest = folder.finish(staging, settings)
        folder.replace(staging, output)
    finally:
        folder.discard(staging)
    return manifest


def _ranges(posts: str) -> list[tuple[str, int, int]]:
    """The dump cut for the workers: (path, start, end) in bytes."""
    try:
        with storage.open(posts) as file:
            size = file.seek(0, os.SEEK_END)
    except OSError:
        raise UserError(f"the posts file {posts} cannot be read; give a JSONL file") from None
    return [(posts, start, min(start + RANGE_BYTES, size)) for start in range(0, size, RANGE_BYTES)]


def _beam_options(flags: Sequence[str]) -> PipelineOptions:
    options = PipelineOptions(list(flags))
    known = options.get_all_options()
    if _runs_here(options):  # other runners have flags of their own that Beam does not list
        unknown = set(options.get_all_options(retain_unknown_options=True)) - set(known)
        if unknown:
            raise UserError(
                f"prepare has no option --{sorted(unknown)[0]}, and neither has Beam's DirectRunner"
            )
        # Seen once in some forty runs: three of 903 posts never reached the records.
        if options.view_as(DirectOptions).direct_running_mode == "multi_threading":
            raise UserError(
                "--direct_running_mode=multi_threading has lost posts inside Beam's DirectRunner; "
                "use --direct_running_mode=multi_processing"
            )
    return options


def _runs_here(options: PipelineOptions) -> bool:
    name = options.view_as(StandardOptions).runner
    return name is None or name.rpartition(".")[2].lower() in ("directrunner", "fnapirunner")


def _runner(options: PipelineOptions) -> typing.Any:
    """Beam's in-process runner for DirectRunner: by that name, Beam first downloads another."""
    if _runs_here(options):
        from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

        return FnApiRunner()
    return options.view_as(StandardOptions).runner


@contextlib.contextmanager
def _surroundings(options: PipelineOptions) -> Iterator[None]:
    """Keeps Beam's and Pillow's notes off the screen; lets worker processes import this code.

    Of a runner elsewhere Beam's notes tell where the job is and how it goes.
    """
    logger = logging.getLogger("apache_beam")
    level, path = logger.level, os.environ.get("PYTHONPATH")
    home = os.path.dirname(os.path.dirname(os.path.abspath(hashvision.__file__)))
    if _runs_here(options):
        logger.setLevel(logging.ERROR)
    else:
        logging.basicConfig(format="%(message)s")
        logger.setLevel(logging.INFO)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (home, path)))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            yield
    finally:
        logger.setLevel(level)
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
