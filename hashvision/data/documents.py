"""Reads the JSON files of datasets and workdirs, and reports every fault as one sentence."""

import json
import reprlib
import typing

from hashvision import storage
from hashvision.errors import UserError

_DEEPEST = 50  # levels; valid files have at most six


def load(path: str, missing: str, remedy: str) -> dict[str, typing.Any]:
    """Reads a JSON file that contains an object.

    Args:
      path: of the file.
      missing: the end of the error sentence if the file does not exist.
      remedy: what to do if it is damaged.

    Raises:
      UserError: the file does not exist, or does not contain a JSON object.
    """
    return parse(path, read(path, missing), remedy)


def read(path: str, missing: str) -> bytes:
    """Reads the bytes of a file; `missing` and errors as for `load`."""
    try:
        return storage.read(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing, {missing}.") from None


def parse(path: str, text: bytes, remedy: str) -> dict[str, typing.Any]:
    """Parses the text of a JSON file; `remedy` and errors as for `load`."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} contains {shorten(found)} instead of a JSON object; {remedy}.")
    level: list[typing.Any] = [found]
    for _ in range(_DEEPEST):
        lists = [each.values() if isinstance(each, dict) else each for each in level]
        level = [each for one in lists for each in one if isinstance(each, dict | list)]
    if level:
        raise UserError(f"{path} is nested more than {_DEEPEST} levels deep; {remedy}.")
    return found


def shorten(value: typing.Any) -> str:
    """Formats a value for an error message, shortened."""
    return reprlib.repr(value)


def is_count(value: typing.Any) -> bool:
    """Whether a value is a valid number of bytes, records, posts or steps: an int in [0, 2^53)."""
    return type(value) is int and 0 <= value < 2**53
