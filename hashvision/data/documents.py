"""The JSON files of datasets and workdirs, read with every fault in one sentence."""

import json
import reprlib
import typing

from hashvision import storage
from hashvision.errors import UserError

_DEEPEST = 50  # levels; ours have six


def load(path: str, missing: str, remedy: str) -> dict[str, typing.Any]:
    """The object in a JSON file.

    Args:
      path: of the file.
      missing: what it means that there is none, as the sentence's end.
      remedy: what to do where it is damaged.

    Raises:
      UserError: the file is missing, or holds something else.
    """
    return parse(path, read(path, missing), remedy)


def read(path: str, missing: str) -> bytes:
    """The bytes of a file; `missing` and errors as for `load`."""
    try:
        return storage.read(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing, {missing}.") from None


def parse(path: str, text: bytes, remedy: str) -> dict[str, typing.Any]:
    """The object in the text of a JSON file; `remedy` and errors as for `load`."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {shown(found)} and not a JSON object; {remedy}.")
    level: list[typing.Any] = [found]
    for _ in range(_DEEPEST):
        lists = [each.values() if isinstance(each, dict) else each for each in level]
        level = [each for one in lists for each in one if isinstance(each, dict | list)]
    if level:
        raise UserError(f"{path} is nested more than {_DEEPEST} levels deep; {remedy}.")
    return found


def shown(value: typing.Any) -> str:
    """A value for a sentence, shortened."""
    return reprlib.repr(value)


def is_count(value: typing.Any) -> bool:
    """Whether a value is a whole number of bytes, records, posts or steps."""
    return type(value) is int and 0 <= value < 2**53
