"""How `prepare` runs Beam: options, runner, worker processes, and the errors of its steps."""

import _thread
import argparse
import ast
import contextlib
import difflib
import io
import logging
import os
import re
import shlex
import signal
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
from hashvision.errors import UserError

_LOCAL_RUNNERS = ("directrunner", "fnapirunner")  # Beam's names of its runner in this process
# Beam's threads that watch a worker process and receive its messages.
_WORKER_THREADS = ("run_worker", "beam_control_read", "read_grpc_client_inputs")
# The last line of the text in which Beam reports an error of a step.
_ERROR = re.compile(r"(?:RuntimeError: )?(?:([\w.]+): )?(.*?)(?: \[while running '.*'\])?")
_OS_ERROR = re.compile(r"\[Errno (\d+)\] (.*?)(?:: (['\"].*?['\"])(?: -> .*)?)?")


@contextlib.contextmanager
def open_pipeline(options: PipelineOptions, output: str) -> Iterator[beam.Pipeline]:
    """Yields an empty pipeline, and runs it at the end of the block.

    Args:
      options: as `parse_options` returns them.
      output: named in an OSError that names no file.

    Raises:
      UserError, OSError, KeyboardInterrupt: a step raised it; UserError too if a worker has ended.
      RuntimeError: a step raised any other error.
    """
    with (
        reraise_step_errors(output),
        _beam_environment(options),
        _fail_if_a_worker_ends(),
        beam.Pipeline(runner=_make_runner(options), options=options) as pipeline,
    ):
        yield pipeline


def parse_options(flags: Sequence[str], own_flags: Sequence[str]) -> PipelineOptions:
    """Parses Beam's flags and checks those that choose its runner.

    Args:
      flags: the flags that `prepare` itself does not know.
      own_flags: the names of all flags of `prepare`, such as --posts.

    Raises:
      UserError: a flag is unknown or its value is not valid.
    """
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            options = PipelineOptions(list(flags))
            options.get_all_options(
                retain_unknown_options=True,
                add_extra_args_fn=lambda parser: _refuse_unknown(
                    parser, flags=flags, own_flags=own_flags, options=options
                ),
            )
        except SystemExit:  # argparse has printed its usage and then the error
            raise UserError(f"Beam says: {printed.getvalue().strip().splitlines()[-1]}.") from None
    if _runs_locally(options):
        _check_local(options.view_as(DirectOptions))
    elif name := options.view_as(StandardOptions).runner:
        try:
            runners.create_runner(name)
        except (ValueError, ImportError, AttributeError) as error:
            raise UserError(
                f"--runner={name} is not a runner that Beam has here ({error}); give"
                " --runner=DirectRunner, DataflowRunner, FlinkRunner or another one that is"
                " installed."
            ) from None
    return options


def _refuse_unknown(
    parser: argparse.ArgumentParser,
    flags: Sequence[str],
    own_flags: Sequence[str],
    options: PipelineOptions,
) -> None:
    """Refuses flags that neither `prepare` nor Beam knows: one may be a misspelled --removals.

    Flink, Spark and other runners take options that Beam learns from their job server only when
    the job starts. For these runners a flag is refused only if it resembles a flag of `prepare`.

    Args:
      parser: knows Beam's options.
      flags: the flags that `prepare` itself does not know.
      own_flags: the names of all flags of `prepare`.
      options: `flags`, parsed.
    """
    all_known = _runner_name(options) in (*_LOCAL_RUNNERS, "dataflowrunner")
    for word in parser.parse_known_args(list(flags))[1]:
        name = word.lstrip("-").partition("=")[0]
        near = difflib.get_close_matches(f"--{name}", own_flags, 1)
        if near or all_known or not name or not word.startswith("--"):
            remedy = f"the nearest is {near[0]}" if near else "`prepare --help` lists its options"
            raise UserError(f"Neither `prepare` nor Apache Beam has an option {word}; {remedy}.")


def _check_local(direct: DirectOptions) -> None:
    """Raises a UserError for options with which Beam's local runner fails."""
    workers = direct.direct_num_workers
    if workers < 0:
        raise UserError(
            f"--direct_num_workers={workers} is not a number of workers; give 1 or more, or 0 for"
            " one per core."
        )
    # In one of some forty runs, three of 903 posts never reached the records.
    if direct.direct_running_mode == "multi_threading":
        raise UserError(
            "--direct_running_mode=multi_threading loses posts in Beam's DirectRunner; use"
            " --direct_running_mode=multi_processing."
        )


def _runner_name(options: PipelineOptions) -> str:
    name = options.view_as(StandardOptions).runner or _LOCAL_RUNNERS[0]
    return name.rpartition(".")[2].lower()


def _runs_locally(options: PipelineOptions) -> bool:
    return _runner_name(options) in _LOCAL_RUNNERS


def _make_runner(options: PipelineOptions) -> typing.Any:
    """Makes the runner: for DirectRunner the one in this process, so that Beam downloads none."""
    if not _runs_locally(options):
        return options.view_as(StandardOptions).runner
    from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

    direct, environment = options.view_as(DirectOptions), None
    if direct.direct_running_mode == "multi_processing":
        # Beam's own workers outlive a driver that is killed, and continue to write.
        direct.direct_running_mode = "in_memory"  # or Beam replaces our workers with its own
        command = f"exec {shlex.quote(sys.executable)} -m hashvision.prepare.worker {os.getpid()}"
        processes: typing.Any = environments.SubprocessSDKEnvironment
        environment = processes.from_command_string(command)
    return FnApiRunner(default_environment=environment)


@contextlib.contextmanager
def reraise_step_errors(output: str) -> Iterator[None]:
    """Raises the errors of the graph's steps again, because Beam passes on only their text.

    This restores UserErrors, OSErrors and KeyboardInterrupts; any other error stays Beam's
    RuntimeError.

    Args:
      output: named in an OSError that names no file.
    """
    try:
        yield
    except RuntimeError as error:
        found = _ERROR.fullmatch(str(error).strip().rpartition("\n")[2])
        name, message = found.groups() if found else ("", "")
        os_error = _OS_ERROR.fullmatch(message)
        if message == "KeyboardInterrupt":
            raise KeyboardInterrupt from error
        if name and name.rpartition(".")[2] == "UserError":
            raise UserError(message) from error
        if os_error:
            number, reason, path = os_error.groups()
            path = ast.literal_eval(path) if path else output
            raise OSError(int(number), reason, path) from error
        raise


@contextlib.contextmanager
def _beam_environment(options: PipelineOptions) -> Iterator[None]:
    """Sets up logging, warnings and PYTHONPATH for Beam, and restores them at the end.

    Beam and Pillow print nothing for a local run. For another runner, Beam's log reports where the
    job is and how it proceeds. PYTHONPATH lets worker processes import this package.
    """
    logger = logging.getLogger("apache_beam")
    level, path = logger.level, os.environ.get("PYTHONPATH")
    home = os.path.dirname(os.path.dirname(os.path.abspath(hashvision.__file__)))
    if _runs_locally(options):
        logger.setLevel(logging.CRITICAL)  # errors are raised as well
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


@contextlib.contextmanager
def _fail_if_a_worker_ends() -> Iterator[None]:
    """Stops the pipeline if a local worker process ends before it, such as for lack of memory.

    Beam's thread that watches the process fails then, but the pipeline would wait forever for the
    worker's answers.

    Raises:
      UserError: a worker has ended.
    """
    before, ended = threading.excepthook, []

    def hook(failed: typing.Any) -> None:
        name = failed.thread.name if failed.thread else ""
        if name == "run_worker" and not ended:
            ended.append(failed.exc_value)
            # A command in the background of a script ignores SIGINT; it stops on SIGTERM.
            ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            _thread.interrupt_main(signal.SIGTERM if ignored else signal.SIGINT)
        elif name not in _WORKER_THREADS:
            before(failed)

    threading.excepthook = hook
    try:
        yield
    except KeyboardInterrupt:
        if not ended:
            raise
        raise UserError(
            f"A worker process has ended ({ended[0]}), probably for lack of memory; give a lower"
            " --direct_num_workers, or free memory, and run the same command again."
        ) from None
    finally:
        threading.excepthook = before
