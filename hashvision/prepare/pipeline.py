"""Runs the graph: from a dump of posts to a dataset folder, whole or not at all."""

import _thread
import argparse
import ast
import contextlib
import difflib
import inspect
import io
import logging
import os
import re
import shlex
import sys
import threading
import typing
import warnings
from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    DirectOptions,
    PipelineOptions,
    StandardOptions,
)
from apache_beam.runners import runner as runners
from apache_beam.transforms import environments

import hashvision
from hashvision import storage
from hashvision.data import keys
from hashvision.data import removals as removal_list
from hashvision.duplicates import search
from hashvision.errors import UserError
from hashvision.prepare import folder, graph
from hashvision.prepare.staging import resolve_output
from hashvision.tags.wordnet import load_wordnet

RANGE_BYTES = 16 * 2**20  # of the dump, to one worker at a time
# Beam's threads that watch a worker process and hear from it.
_OF_WORKERS = ("run_worker", "beam_control_read", "read_grpc_client_inputs")
_HERE = ("directrunner", "fnapirunner")  # what Beam calls its runner within this process
# The last line of what Beam hands on of an error in a step.
_ERROR = re.compile(r"(?:RuntimeError: )?(?:([\w.]+): )?(.*?)(?: \[while running '.*'\])?")
_OS_ERROR = re.compile(r"\[Errno (\d+)\] (.*?)(?:: (['\"].*?['\"])(?: -> .*)?)?")


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

    The same dump, options and key make the same bytes.

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
      removals: CSV of posts that may not be used (hashvision/data/removals.py), nor what shows
        their photos.
      key: file of the dataset's key, made where there is none; OUTPUT.key if None.
      keep_copies_of_removed: keeps what others posted of a removed owner's photos; not of those
        that are removed by post or by file.
      evaluation_sets: folders of photos that no post may show.
      beam_options: Beam's own flags (--runner=..., --direct_num_workers=...).

    Returns:
      The manifest.

    Raises:
      UserError: an input is missing or no such thing, the output holds other things than a dataset
        or is in use, an option makes no sense, or no post came through.
      OSError: the output cannot be written.
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
    inputs = filter(None, (posts, images, wordnet, removals, *evaluation_sets))
    output = resolve_output(output, map(storage.absolute, inputs))
    ranges = _ranges(posts)
    if not storage.is_folder(images):
        raise UserError(f"the images' folder {images} does not exist; give it with --images")
    removed = removal_list.read(removals) if removals else []
    evaluation = list(search.evaluation_photos(evaluation_sets))
    key = storage.absolute(key) if key else keys.beside(output)
    if key.startswith(f"{output}/"):
        raise UserError(
            f"--key={key} lies in the dataset, where it protects nobody; give a file elsewhere."
        )
    with folder.make_staging(output) as staging:
        secret = keys.make(key)
        lexicon = load_wordnet(wordnet) if wordnet else None
        if lexicon is None:
            print("prepare: no WordNet file (--wordnet), so tags are merged by spelling only")
        with (
            reraise_step_errors(output),
            _surroundings(options),
            _no_worker_is_waited_for_that_has_ended(),
            beam.Pipeline(runner=_runner(options), options=options) as pipeline,
        ):
            graph.build(
                pipeline,
                ranges,
                images,
                staging,
                lexicon,
                removal_list.names(removed, secret),
                evaluation,
                graph.Options(
                    minimum_count=minimum_count,
                    short_side=short_side,
                    shard_bytes=shard_bytes,
                    keep_untagged=keep_untagged,
                    keep_duplicates=keep_duplicates,
                    keep_copies_of_removed=keep_copies_of_removed,
                ),
            )
        del lexicon
        summary = folder.take_summary(staging)
        matched = {(kind, name) for kind, name in summary.matched}
        unmatched = [line for line in removed if (line.kind, line.hash(secret)) not in matched]
        settings = {
            "posts": os.path.basename(posts),
            "images": os.path.basename(images),
            "wordnet": os.path.basename(wordnet) if wordnet else None,
            "minimum_count": minimum_count,
            "short_side": short_side,
            "shard_bytes": shard_bytes,
            "keep_untagged": keep_untagged,
            "keep_duplicates": keep_duplicates,
            "removals": {
                "file": os.path.basename(removals),
                "lines": len(removed),
                "unmatched": len(unmatched),
            }
            if removals
            else None,
            "keep_copies_of_removed": keep_copies_of_removed,
            "evaluation_sets": [
                os.path.basename(storage.absolute(each)) for each in evaluation_sets
            ],
        }
        manifest = folder.finish(staging, summary, settings, secret)
        if keys.read(key) != secret:
            raise UserError(f"The key {key} was replaced meanwhile; run prepare again.")
        folder.replace(staging, output)
    if removals:
        told = removal_list.nothing_matched(unmatched, len(removed), os.path.basename(posts))
        print(f"prepare: {told}")
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
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            options = PipelineOptions(list(flags))
            options.get_all_options(
                retain_unknown_options=True,
                add_extra_args_fn=lambda parser: _refuse_unknown(parser, flags, options),
            )
        except SystemExit:  # after a page on how to use Beam
            raise UserError(f"Beam says: {said.getvalue().strip().splitlines()[-1]}.") from None
    name = options.view_as(StandardOptions).runner
    if name and not _runs_here(options):
        try:
            runners.create_runner(name)
        except (ValueError, ImportError, AttributeError) as error:
            raise UserError(
                f"--runner={name} is not a runner that Beam has here ({error}); give"
                " --runner=DirectRunner, DataflowRunner, FlinkRunner or another that is installed."
            ) from None
    if _runs_here(options):
        workers = options.view_as(DirectOptions).direct_num_workers
        if workers < 0:
            raise UserError(
                f"--direct_num_workers={workers} is not a number of workers; give 1 or more, or 0"
                " for one on each core."
            )
        # Seen once in some forty runs: three of 903 posts never reached the records.
        if options.view_as(DirectOptions).direct_running_mode == "multi_threading":
            raise UserError(
                "--direct_running_mode=multi_threading has lost posts inside Beam's DirectRunner; "
                "use --direct_running_mode=multi_processing"
            )
    return options


def _refuse_unknown(
    parser: argparse.ArgumentParser, flags: Sequence[str], options: PipelineOptions
) -> None:
    """Refuses what neither `prepare` nor Beam knows: it may be meant to name a removal list.

    Flink, Spark and others take options that Beam learns from their job server only when the job
    starts. For these an option is refused if it is spelled like one of `prepare`.

    Args:
      parser: knows Beam's options.
      flags: those that are not of `prepare` itself.
      options: the same, parsed.
    """
    own = [f"--{name}" for name in inspect.signature(prepare).parameters]
    all_known = _runner_name(options) in (*_HERE, "dataflowrunner")
    for word in parser.parse_known_args(list(flags))[1]:
        name = word.lstrip("-").partition("=")[0]
        near = difflib.get_close_matches(f"--{name}", own, 1)
        if near or all_known or not name or not word.startswith("--"):
            told = f"the nearest is {near[0]}" if near else "`prepare --help` lists its own"
            raise UserError(f"Neither `prepare` nor Apache Beam has an option {word}; {told}.")


def _runner_name(options: PipelineOptions) -> str:
    return (options.view_as(StandardOptions).runner or _HERE[0]).rpartition(".")[2].lower()


def _runs_here(options: PipelineOptions) -> bool:
    return _runner_name(options) in _HERE


def _runner(options: PipelineOptions) -> typing.Any:
    """Beam's in-process runner for DirectRunner: by that name, Beam first downloads another."""
    if not _runs_here(options):
        return options.view_as(StandardOptions).runner
    from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

    direct, environment = options.view_as(DirectOptions), None
    if direct.direct_running_mode == "multi_processing":
        # Beam's own workers outlive a driver that is killed, and go on writing.
        direct.direct_running_mode = "in_memory"  # or Beam would put its own in place of these
        command = f"exec {shlex.quote(sys.executable)} -m hashvision.prepare.worker {os.getpid()}"
        processes: typing.Any = environments.SubprocessSDKEnvironment
        environment = processes.from_command_string(command)
    return FnApiRunner(default_environment=environment)


@contextlib.contextmanager
def reraise_step_errors(output: str) -> Iterator[None]:
    """Raises again what the graph's steps raised, of which Beam hands on the text alone.

    These are UserErrors, OSErrors and KeyboardInterrupts; all else stays as Beam has it.

    Args:
      output: what an OSError that names no file is about.
    """
    try:
        yield
    except RuntimeError as error:
        told = _ERROR.fullmatch(str(error).strip().rpartition("\n")[2])
        name, words = told.groups() if told else ("", "")
        found = _OS_ERROR.fullmatch(words)
        if words == "KeyboardInterrupt":
            raise KeyboardInterrupt from error
        if name and name.rpartition(".")[2] == "UserError":
            raise UserError(words) from error
        if found:
            number, why, path = found.groups()
            path = ast.literal_eval(path) if path else output
            raise OSError(int(number), why, path) from error
        raise


@contextlib.contextmanager
def _no_worker_is_waited_for_that_has_ended() -> Iterator[None]:
    """Ends the pipeline where a worker process here has ended before it, as for want of memory.

    Beam's thread that watches the process fails then, and the pipeline waits for its answers
    without end.

    Raises:
      UserError: a worker has ended.
    """
    before, ended = threading.excepthook, []

    def hook(failed: typing.Any) -> None:
        name = failed.thread.name if failed.thread else ""
        if name == "run_worker" and not ended:
            ended.append(failed.exc_value)
            _thread.interrupt_main()
        elif name not in _OF_WORKERS:
            before(failed)

    threading.excepthook = hook
    try:
        yield
    except KeyboardInterrupt:
        if not ended:
            raise
        raise UserError(
            f"A worker of --direct_num_workers has ended ({ended[0]}), as a process does that finds"
            " no memory; give fewer workers, or make room, and run the same command again."
        ) from None
    finally:
        threading.excepthook = before


@contextlib.contextmanager
def _surroundings(options: PipelineOptions) -> Iterator[None]:
    """Keeps Beam's and Pillow's notes off the screen; lets worker processes import this code.

    Of a runner elsewhere Beam's notes tell where the job is and how it goes.
    """
    logger = logging.getLogger("apache_beam")
    level, path = logger.level, os.environ.get("PYTHONPATH")
    home = os.path.dirname(os.path.dirname(os.path.abspath(hashvision.__file__)))
    if _runs_here(options):
        logger.setLevel(logging.CRITICAL)  # errors are raised, too
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
