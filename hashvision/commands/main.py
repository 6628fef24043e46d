"""The program `hashvision`: finds the command, runs it, and turns errors into sentences."""

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from hashvision import __version__, storage
from hashvision.commands import streams
from hashvision.commands.flags import Parser
from hashvision.errors import UserError

COMMANDS = ("draw", "prepare", "config", "train", "plan", "evaluate", "audit")
_FORMER = {"drawn": "draw"}  # commands that were renamed; the old name works for one release

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNNAMED = {errno.ENOENT: "The current folder, or one for temporary files,"}
_UNEXPECTED = 70  # exit code, EX_SOFTWARE of sysexits.h


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Exit codes: 0; 1 if `audit` found something; 2 after one sentence on what the user can fix; 75
    if a run was stopped or lost a host, and the same command resumes it; 130 if `prepare` or `draw`
    was stopped; 70 after the traceback of an unexpected error.
    """
    # TensorFlow only decodes here; nobody needs its start-up messages.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    # TensorFlow imports Keras, which takes a third of its start-up time and 100 MB. With this set
    # it looks for an older package instead, which is not installed.
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    if not os.path.isabs(os.path.expanduser("~")):  # a user without a home, as in some containers
        os.environ["HOME"] = os.devnull  # some packages need one to be imported
    with streams.robust():
        return _run(sys.argv[1:] if argv is None else list(argv))


def _run(argv: list[str]) -> int:
    try:
        if argv and argv[0] in _FORMER:
            former, argv = argv[0], [_FORMER[argv[0]], *argv[1:]]
            print(f"hashvision: `{former}` is called `{argv[0]}` now.", file=sys.stderr)
        arguments, rest = parser().parse_known_args(argv)
        return arguments.run(arguments, rest) or 0
    except UserError as error:
        code, text = 2, f"hashvision: {error}"
    except Exception as error:
        code, text = explain(error)
    print(text, file=sys.stderr, flush=True)
    from hashvision.training import hosts

    if hosts.watched():
        sys.stdout.flush()
        os._exit(code)  # a normal exit would wait for hosts that wait for this one
    return code


def parser() -> Parser:
    """The parser of all commands and their flags."""
    top = Parser(
        prog="hashvision",
        description="Turns posts or photos into a vision model.",
        epilog="`hashvision COMMAND --help` lists a command's flags.",
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = importlib.import_module(f"hashvision.commands.{name}")
        added = commands.add_parser(
            name, help=command.HELP, description=getattr(command, "DESCRIPTION", None)
        )
        command.add_flags(added)
        added.set_defaults(run=command.run)
    return top


def explain(error: Exception) -> tuple[int, str]:
    """The exit code and the text for an error that no command handles: storage may fail anywhere.

    Args:
      error: not a UserError.

    Returns:
      2 and a sentence if the user can fix it, 75 and a sentence if the same command may succeed
      later, else 70 and the traceback.
    """
    cause = _os_error(error)
    if cause is None:
        return _UNEXPECTED, "".join(traceback.format_exception(error)).rstrip()
    unnamed = _UNNAMED.get(cause.errno or 0, "what this command writes")
    where, why = str(cause.filename or unnamed), cause.strerror
    code = 2
    if cause.errno in _NO_SPACE:
        text = f"There is no space for {where} ({why}); free some, and run the same command again."
    elif not storage.is_remote(where):
        text = (
            f"{where} cannot be used ({why}); give another path, or check that it exists and that"
            " you may read and write it."
        )
    elif cause.errno == errno.EIO:  # it may work again in a moment
        from hashvision.training import hosts

        text = f"{where} cannot be reached ({why}); run the same command again."
        code = hosts.AGAIN
    else:
        text = f"{where} cannot be reached ({why}); check that it exists and that you may use it."
    return code, f"hashvision: {text}"


def _os_error(error: BaseException | None) -> OSError | None:
    """The refusal of the operating system that caused an error, about a path or lack of space."""
    known = (*_NO_SPACE, *_UNNAMED)
    while error is not None:
        if isinstance(error, OSError) and (error.filename or error.errno in known):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None
