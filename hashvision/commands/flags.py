"""The parser of all commands, and the flags and checks that several of them share."""

import argparse
import difflib
from collections.abc import Callable
from typing import Any

from hashvision.config.ranges import NAME, Range, integer
from hashvision.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser that refuses abbreviated and repeated flags, and raises UserError."""

    def __init__(self, **options: Any) -> None:
        """Takes the options of argparse.ArgumentParser."""
        super().__init__(allow_abbrev=False, **options)
        self.register("action", None, _Once)  # used where a flag names no other action
        self.register("type", None, within(NAME))
        self.set_defaults(parser=self)

    def flags(self) -> list[str]:
        """All flags that start with two dashes."""
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def error(self, message: str) -> Any:
        """Raises the UserError that says `message`."""
        text = " ".join(message.removeprefix("argument ").split())
        raise UserError(f"{text[0].upper()}{text[1:]}; see `{self.prog} --help`.")


class _Once(argparse.Action):
    """Keeps a flag's value, and refuses a second one, which would hide the first."""

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


def within(values: Range) -> Callable[[str], Any]:
    """An argparse type that takes the values of a range."""

    def read(text: str) -> Any:
        try:
            return values.read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {values.words}") from None

    return read


COUNT = within(integer(1, 10**9))


def folders(text: str) -> list[str]:
    """An argparse type for folders separated by commas."""
    found = text.split(",")
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not DIR or DIR,DIR")
    return found


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds --config."""
    parser.add_argument(
        "--config",
        required=True,
        help="a recipe, NAME or NAME:VARIANT (`hashvision config --list` lists them), or the path"
        " of one, FILE.py or FILE.py:VARIANT",
    )


def add_takedown(
    parser: argparse.ArgumentParser,
    *,
    removals: str,
    key: str = "the dataset's key; by default DATASET.key, beside the dataset",
) -> None:
    """Adds --removals and --key, with the given help texts, and --keep_copies_of_removed."""
    parser.add_argument("--removals", help=removals)
    parser.add_argument("--key", help=key)
    parser.add_argument(
        "--keep_copies_of_removed",
        action="store_true",
        help="when an owner is removed, keep the same photos if others posted them",
    )


def removal_list(arguments: argparse.Namespace) -> Any:
    """The RemovalList that the flags of add_takedown describe."""
    from hashvision.data import removals

    lines = removals.read(arguments.removals) if arguments.removals else ()
    return removals.RemovalList(lines, arguments.key, arguments.keep_copies_of_removed)


def refuse_unknown(arguments: argparse.Namespace, rest: list[str], settings: bool = False) -> None:
    """Raises UserError for words that no flag takes, since one may be meant to name a removal list.

    Args:
      arguments: of the command.
      rest: the words that no flag takes.
      settings: whether the command also takes --config.KEY=VALUE.

    Raises:
      UserError: names the first such word, and the flag with the most similar name.
    """
    unknown = [word for word in rest if not (settings and word.startswith("--config."))]
    if not unknown:
        return
    known = arguments.parser.flags()
    if settings:
        from hashvision.config import schema

        known += [f"--config.{key}" for key in schema.KEYS]
    name = unknown[0].lstrip("-").partition("=")[0]
    near = difflib.get_close_matches(f"--{name}", known, 1) or [
        flag for flag in known if flag.rpartition(".")[2] == name
    ]
    prog = arguments.parser.prog
    remedy = f"did you mean {near[0]}?" if near else f"see `{prog} --help`."
    raise UserError(f"`{prog}` has no option {unknown[0]}; {remedy}")


def write_json(path: str | None, content: Callable[[], str], what: str) -> None:
    """Writes what a command has printed to the file of --json, if one is given.

    Raises:
      UserError: the file cannot be written.
    """
    if not path:
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(content() + "\n")
    except OSError as error:
        raise UserError(
            f"--json={path} cannot be written ({error.strerror}); {what} is printed above."
        ) from None
