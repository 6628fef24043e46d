"""The verbs: `python -m hashvision VERB`; each imports its room only when called."""

import argparse
import contextlib
import difflib
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hashvision import __version__, storage
from hashvision.config.ranges import NAME, SEED, SIDE, Range, number, whole
from hashvision.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNNAMED = {errno.ENOENT: "The current folder, or one for temporary files,"}
_UNFORESEEN = 70  # exit code, EX_SOFTWARE of sysexits.h
_STOPPED = 130  # what shells give for Ctrl-C


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Lets SIGTERM stop a verb as Ctrl-C does, so that it clears away what is half done."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print("hashvision: stopped, and what was half done is removed.", file=sys.stderr)
        raise SystemExit(_STOPPED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@_stoppable()
def _drawn(arguments: argparse.Namespace, rest: list[str]) -> None:
    _refuse_stray(arguments, rest)
    from hashvision.synthetic import draw

    draw.write(arguments.output, arguments.posts, arguments.test_per_class, seed=arguments.seed)
    sheet = os.path.join(arguments.output, "contact_sheet.png")
    draw.draw_contact_sheet(sheet, seed=arguments.seed)
    print(f"{arguments.posts:,} drawn posts lie in {arguments.output}; {sheet} shows them.")


@_stoppable()
def _prepare(arguments: argparse.Namespace, rest: list[str]) -> None:
    from hashvision.prepare import pipeline

    manifest = pipeline.prepare(
        arguments.posts,
        arguments.output,
        images=arguments.images,
        wordnet=arguments.wordnet,
        minimum_count=arguments.minimum_count,
        short_side=arguments.short_side,
        keep_untagged=arguments.keep_untagged,
        keep_duplicates=arguments.keep_duplicates,
        removals=arguments.removals,
        key=arguments.key,
        keep_copies_of_removed=arguments.keep_copies_of_removed,
        evaluation_sets=arguments.evaluation_sets,
        beam_options=rest,
    )
    posts = manifest["posts"]
    dropped = ", ".join(f"{drop['count']:,} {why}" for why, drop in posts["dropped"].items())
    print(
        f"{posts['kept']:,} of {posts['read']:,} posts kept ({dropped});"
        f" {manifest['classes']:,} classes; the dataset lies in {arguments.output}."
    )


def _config(arguments: argparse.Namespace, rest: list[str]) -> None:
    _refuse_stray(arguments, rest, settings=True)
    from hashvision.config import recipes

    found = recipes.explain(arguments.config, rest)
    print(found.table(), flush=True)
    _write_json(arguments.json, found.as_json, "the config")


def _train(arguments: argparse.Namespace, rest: list[str]) -> int | None:
    _refuse_stray(arguments, rest, settings=True)
    from hashvision.config import recipes

    config = recipes.load(arguments.config, rest)
    from hashvision.training import hosts, workdir

    place = hosts.place()
    if place and place.host == 0 and not hosts.watched():
        with workdir.held(arguments.workdir):  # or nothing of another run is touched
            pass
    code = _among_hosts(arguments.workdir, config)
    if code is not None:
        return code
    from hashvision.training import loop

    check, removed = None, _removed(arguments)
    if config.knn.dataset:
        from hashvision.evaluation import online

        check = online.NearestNeighbours(config.knn.dataset, removed)
    if not loop.train(config, arguments.workdir, check, removed):
        return hosts.AGAIN
    print(f"The run lies in {arguments.workdir}.")


def _among_hosts(folder: str, config: Any) -> int | None:
    """Joins the other hosts, where there are several: all of them run the same command.

    Args:
      folder: in which the hosts find one another.
      config: of the run; how long they wait.

    Returns:
      None in the process that is to go on; in the one that watched it, its exit code.
    """
    from hashvision.training import hosts

    place, settings = hosts.place(), config.hosts
    if place and not hosts.watched():
        command = [sys.executable, *sys.orig_argv[1:]]
        return hosts.watch(place, folder, command, settings.join, settings.lost)
    if place:
        hosts.join(place, settings.join, settings.lost)
    return None


def _removed(arguments: argparse.Namespace) -> Any:
    """What --removals and the options beside it say."""
    from hashvision.data import removals

    lines = removals.read(arguments.removals) if arguments.removals else ()
    return removals.RemovalList(lines, arguments.key, arguments.keep_copies_of_removed)


def _evaluate(arguments: argparse.Namespace, rest: list[str]) -> int | None:
    _refuse_stray(arguments, rest)
    from hashvision.evaluation import encoder, protocols
    from hashvision.training import workdir

    chosen = arguments.protocol.split(",")
    protocols.check(chosen)
    removed = _removed(arguments)
    config, _ = workdir.read(arguments.workdir)
    # Beside a run that goes on, whose hosts find one another in the workdir itself.
    code = _among_hosts(os.path.join(arguments.workdir, "evaluations", "hosts"), config)
    if code is not None:
        return code
    network = encoder.load(arguments.workdir, arguments.untrained)
    protocols.evaluate(
        network, arguments.dataset, chosen, arguments.workdir, arguments.untrained, removed
    )
    return None


def _plan(arguments: argparse.Namespace, rest: list[str]) -> None:
    _refuse_stray(arguments, rest, settings=True)
    if arguments.topology != "gpu":
        os.environ["JAX_PLATFORMS"] = "cpu"  # the topology's devices are only described
    from hashvision.config import recipes

    config = recipes.load(arguments.config, rest)
    from hashvision.planning import fit, plan

    target = plan.Target(
        arguments.topology,
        arguments.classes,
        arguments.images,
        arguments.price_per_chip_hour,
        arguments.quick,
    )
    if arguments.fit:
        choice, found = fit.fit(config, target)
        print(f"\nThe shortest step of those that fit: {choice.overrides()}\n")
    else:
        found = plan.plan(config, target)
    print(plan.table(found))
    _write_json(arguments.json, found.as_json, "the plan")


def _audit(arguments: argparse.Namespace, rest: list[str]) -> int:
    _refuse_stray(arguments, rest)
    from hashvision.takedowns import audit

    if not arguments.removals and not arguments.verify:
        raise UserError("There is nothing to look for; give --removals a list, or --verify.")
    if not arguments.workdir and not arguments.dataset:
        raise UserError("Nothing to audit is named; give --dataset a dataset, or --workdir a run.")
    if arguments.verify and not arguments.dataset:
        raise UserError("--verify reads a dataset; give --dataset its folder.")
    if arguments.verify:
        print(audit.verify_dataset(arguments.dataset))
    if not arguments.removals:
        return 0
    listed = _removed(arguments)
    if arguments.workdir:
        found = audit.audit_run(arguments.workdir, listed, arguments.dataset)
    else:
        found = audit.audit_dataset(arguments.dataset, listed)
    print(found.table())
    _write_json(arguments.json, found.as_json, "the audit")
    return found.code


def _write_json(path: str | None, content: Callable[[], str], what: str) -> None:
    """Writes to --json, where it is given, what is printed above."""
    if not path:
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(content() + "\n")
    except OSError as error:
        raise UserError(
            f"--json={path} cannot be written ({error.strerror}); {what} stands above."
        ) from None


def _refuse_stray(arguments: argparse.Namespace, rest: list[str], settings: bool = False) -> None:
    """Refuses words that no option takes: one of them may be meant to name a removal list.

    Args:
      arguments: those that the command takes.
      rest: the others.
      settings: whether the command takes --config.KEY=VALUE too.

    Raises:
      UserError: it names the first such word, and the option that is spelled most like it.
    """
    stray = [word for word in rest if not (settings and word.startswith("--config."))]
    if not stray:
        return
    known = arguments.parser.flags()
    if settings:
        from hashvision.config import schema

        known += [f"--config.{key}" for key in schema.KEYS]
    name = stray[0].lstrip("-").partition("=")[0]
    near = difflib.get_close_matches(f"--{name}", known, 1) or [
        flag for flag in known if flag.rpartition(".")[2] == name
    ]
    prog = arguments.parser.prog
    told = f"the nearest is {near[0]}" if near else f"`{prog} --help` lists them"
    raise UserError(f"`{prog}` has no option {stray[0]}; {told}.")


class _Parser(argparse.ArgumentParser):
    """Takes each option once and spelled out, and refuses in one sentence."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.register("action", None, _Once)  # where an option names no other
        self.register("type", None, _within(NAME))
        self.set_defaults(parser=self)

    def flags(self) -> list[str]:
        """All that start with two dashes."""
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def error(self, message: str) -> Any:
        """Raises the UserError that says `message`."""
        said = " ".join(message.removeprefix("argument ").split())
        raise UserError(f"{said[0].upper()}{said[1:]}; `{self.prog} --help` tells more.")


class _Once(argparse.Action):
    """Keeps an option's value, and refuses a second one, which would hide the first."""

    given: Any = None

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.given not in (None, values):
            parser.error(f"{option_string} is given twice, as {self.given} and as {values}")
        self.given = values
        setattr(namespace, self.dest, values)


def _within(inside: Range) -> Callable[[str], Any]:
    """How argparse reads a value of a range."""

    def read(text: str) -> Any:
        try:
            return inside.read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {inside.words}") from None

    return read


_COUNT = _within(whole(1, 10**9))
_SIDE = _within(SIDE)


def _folders(text: str) -> list[str]:
    """The folders of a list with commas."""
    found = text.split(",")
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not DIR or DIR,DIR")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hashvision",
        description="Posts in, a tested vision model out.",
        epilog="`hashvision VERB --help` tells more.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser(
        "drawn", help="draw the embedded posts: everything runs with no download"
    )
    verb.add_argument(
        "--output", required=True, help="folder for posts.jsonl, images/ and test sets"
    )
    verb.add_argument("--posts", type=_COUNT, default=3000)
    verb.add_argument("--test_per_class", type=_COUNT, default=20)
    verb.add_argument("--seed", type=_within(SEED), default=0)
    verb.set_defaults(run=_drawn)

    verb = verbs.add_parser(
        "prepare",
        help="posts -> dataset folder",
        description="Options not listed here go to Apache Beam (--runner, ...).",
    )
    verb.add_argument("--posts", required=True, help="a JSONL dump, one post a line")
    verb.add_argument("--output", required=True, help="the dataset folder to make")
    verb.add_argument("--images", help="folder of the image paths; that of the posts by default")
    verb.add_argument("--wordnet", help="WordNet as WN-LMF (.xml, .xml.xz), to merge synonyms")
    verb.add_argument("--minimum_count", type=_COUNT, default=10, help="posts a class needs")
    verb.add_argument(
        "--short_side",
        type=_SIDE,
        default=384,
        help="pixels of the shorter side to which larger photos are shrunk, 384 by default: SwAV's"
        " and SEER's least crops are 14%% of a photo, which leaves 166 pixels of 512 x 384 to be"
        " enlarged to 224, and 110 with 256; a photo takes twice the bytes that it takes with 256",
    )
    verb.add_argument(
        "--keep_untagged",
        action="store_true",
        help="keep photos of no class, to learn without tags",
    )
    verb.add_argument(
        "--keep_duplicates", action="store_true", help="keep photos that another post shows too"
    )
    verb.add_argument(
        "--removals",
        help="CSV of posts not to use: kind,value,reason,received_at",
    )
    verb.add_argument("--key", help="the dataset's key, made if absent; OUTPUT.key by default")
    verb.add_argument(
        "--keep_copies_of_removed",
        action="store_true",
        help="keep what others posted of a removed owner's photos",
    )
    verb.add_argument(
        "--evaluation_sets",
        type=_folders,
        default=[],
        help="folders, DIR,DIR, of photos that no post may show",
    )
    verb.set_defaults(run=_prepare)

    verb = verbs.add_parser(
        "config",
        help="what each key of a config means, its value, and where that comes from",
        description="Prints a config as `train` would take it; --config.KEY=VALUE sets any key.",
    )
    verb.add_argument("--config", required=True, help="configs/NAME.py, or configs/NAME.py:VARIANT")
    verb.add_argument("--json", help="a file for the same")
    verb.set_defaults(run=_config)

    verb = verbs.add_parser(
        "train",
        help="dataset folder -> workdir",
        description="Trains, or goes on. --config.KEY=VALUE sets any key; `hashvision config` lists"
        " them. Configs are Python code: run only those you trust.",
    )
    verb.add_argument("--config", required=True, help="configs/NAME.py, or configs/NAME.py:VARIANT")
    verb.add_argument("--workdir", required=True, help="checkpoints, metrics and config go here")
    verb.add_argument("--removals", help="CSV of photos not to show: kind,value,reason,received_at")
    _add_takedown(verb)
    verb.set_defaults(run=_train)

    verb = verbs.add_parser(
        "plan",
        help="memory, speed and price of a run on a TPU pod, with no TPU at hand",
        description="Compiles the step that `train` would run; needs requirements-tpu.txt."
        " --config.KEY=VALUE sets any key of hashvision/config/schema.py.",
    )
    verb.add_argument("--config", required=True, help="configs/NAME.py, or configs/NAME.py:VARIANT")
    verb.add_argument(
        "--topology",
        required=True,
        help="KIND:SHAPE, such as v4:4x4x8 or v5e:16x16; cpu:N; or gpu, those that are here",
    )
    verb.add_argument("--classes", type=_COUNT, default=1500, help="of the vocabulary (hashtags)")
    verb.add_argument("--images", type=_within(number(1, 1e15)), default=1e9, help="of an epoch")
    verb.add_argument("--price_per_chip_hour", type=_within(number(0, 1e9)), default=0.0)
    verb.add_argument(
        "--fit", action="store_true", help="search fsdp, remat and accumulate for what fits best"
    )
    verb.add_argument(
        "--quick",
        action="store_true",
        help="compile in a third of the time: nearly the same memory, up to twice the cycles",
    )
    verb.add_argument("--json", help="a file for all figures")
    verb.set_defaults(run=_plan)

    verb = verbs.add_parser("evaluate", help="workdir and labelled photos -> numbers")
    verb.add_argument("--workdir", required=True)
    verb.add_argument(
        "--dataset", required=True, help="folders by class, a labels.jsonl, or a dataset folder"
    )
    verb.add_argument(
        "--protocol", required=True, help="knn, linear or multilabel, or several: knn,linear"
    )
    verb.add_argument(
        "--untrained", action="store_true", help="the same network, freshly initialised"
    )
    verb.add_argument("--removals", help="CSV of photos to leave out, as for prepare")
    _add_takedown(verb)
    verb.set_defaults(run=_evaluate)

    verb = verbs.add_parser(
        "audit",
        help="what a dataset still holds of a removal list, or a run's checkpoints saw",
        description="Of --dataset lists what is still inside, of --workdir which checkpoints saw"
        " which removed photo how often. Exit code 1 where there is any, 0 where there is none.",
    )
    verb.add_argument("--removals", help="CSV: kind,value,reason,received_at")
    verb.add_argument(
        "--dataset", help="a dataset folder; with --workdir, where the run's lies now"
    )
    verb.add_argument("--workdir", help="a run")
    verb.add_argument(
        "--verify",
        action="store_true",
        help="compare every byte of --dataset with its manifest; --removals may be left out then",
    )
    _add_takedown(verb)
    verb.add_argument("--json", help="a file for all records")
    verb.set_defaults(run=_audit)
    return parser


def _add_takedown(verb: argparse.ArgumentParser) -> None:
    """What a removal list needs of a dataset, and how far it reaches."""
    verb.add_argument("--key", help="the dataset's key; DATASET.key, beside it, by default")
    verb.add_argument(
        "--keep_copies_of_removed",
        action="store_true",
        help="an owner's removal leaves what others posted of the same photos",
    )


def _judged(error: Exception) -> tuple[int, str]:
    """The exit code for what no verb foresaw, and what to say: storage may fail anywhere."""
    cause = _os_error(error)
    if cause is None:
        return _UNFORESEEN, "".join(traceback.format_exception(error)).rstrip()
    unnamed = _UNNAMED.get(cause.errno or 0, "what this command writes")
    where, why = str(cause.filename or unnamed), cause.strerror
    code = 2
    if cause.errno in _NO_SPACE:
        told = f"There is no room for {where} ({why}); make some, and the same command goes on."
    elif not storage.is_remote(where):
        told = (
            f"{where} cannot be used ({why}); give another path, or see that it is there and may be"
            " read and written."
        )
    elif cause.errno == errno.EIO:  # it may be there again in a moment
        from hashvision.training import hosts

        told, code = f"{where} cannot be reached ({why}); the same command goes on.", hosts.AGAIN
    else:
        told = f"{where} cannot be reached ({why}); see that it is there and allowed."
    return code, f"hashvision: {told}"


def _os_error(error: BaseException | None) -> OSError | None:
    """What the system refused, of a path or for want of room, if that is at the bottom of it."""
    known = (*_NO_SPACE, *_UNNAMED)
    while error is not None:
        if isinstance(error, OSError) and (error.filename or error.errno in known):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


class _Unheard(io.RawIOBase):
    """A stream that lets a command go on when nobody reads it any more, as `head` does."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        with contextlib.suppress(BrokenPipeError):
            while left:
                left = left[self._stream.write(left) or 0 :]
        return len(content)


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Lets stdout and stderr take every character, and lose their reader."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in before.items():
        bytes_ = getattr(stream, "buffer", None)
        raw = getattr(bytes_, "raw", bytes_)  # with PYTHONUNBUFFERED there is no other
        if isinstance(raw, io.FileIO):  # and not what a caller has put there
            stream.flush()
            buffer: Any = _Unheard(raw)
            text = io.TextIOWrapper(
                buffer if raw is bytes_ else io.BufferedWriter(buffer),
                stream.encoding,
                "backslashreplace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, text)
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code.

    0; 1 where `audit` found something; 2 after one sentence on what the user can mend; 75 where a
    run was stopped, or a host lost, and the same command goes on; 130 where `prepare` or `drawn`
    was stopped; or 70 after the traceback of an error that nobody foresaw.
    """
    # TensorFlow only decodes here; its start-up notes tell nothing.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    # It would import Keras, for a third of its time to start and 100 MB; so it looks for the old
    # one, which is not there.
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    if not os.path.isabs(os.path.expanduser("~")):  # a user without one, as in some containers
        os.environ["HOME"] = os.devnull  # some packages will not be imported without
    with _streams():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments, rest = _parser().parse_known_args(argv)
        return arguments.run(arguments, rest) or 0
    except UserError as error:
        code, said = 2, f"hashvision: {error}"
    except Exception as error:
        code, said = _judged(error)
    print(said, file=sys.stderr, flush=True)
    from hashvision.training import hosts

    if hosts.watched():
        sys.stdout.flush()
        os._exit(code)  # JAX would first wait for hosts that wait for this one
    return code


if __name__ == "__main__":
    sys.exit(main())
