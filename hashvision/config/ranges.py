"""What a setting takes, in words and as a test: for keys of a config and for the command line."""

import ast
from collections.abc import Callable
from typing import Any, NamedTuple


class Range(NamedTuple):
    """The values that a setting takes."""

    kind: type  # bool, int, float, str or tuple
    words: str  # as in "epochs takes a number above 0"
    holds: Callable[[Any], bool]  # asked of values of that kind only
    optional: bool = False  # whether None is one of them

    def fits(self, value: Any) -> bool:
        """Whether the value is inside; a list stands for a tuple, as JSON has it."""
        if value is None:
            return self.optional
        if isinstance(value, bool) != (self.kind is bool):  # Python's bool is an int
            return False
        kinds = {float: (int, float), tuple: (tuple, list)}.get(self.kind, self.kind)
        return isinstance(value, kinds) and self.holds(value)

    def read(self, text: str) -> Any:
        """The value that is typed as `text`.

        Raises:
          ValueError: it is not one of this range.
        """
        if self.optional and text == "None":
            return None
        try:
            value = _READERS[self.kind](text)
        except (KeyError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise ValueError(text) from None
        if not self.fits(value):
            raise ValueError(text)
        return self.cast(value)

    def cast(self, value: Any) -> Any:
        """A value that fits, in the range's own type: a list as a tuple, 1 as 1.0."""
        if self.kind is float and value is not None:
            return float(value)
        return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


_READERS: dict[type, Callable[[str], Any]] = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: int,
    float: float,
    str: str,
    tuple: ast.literal_eval,
}

FLAG = Range(bool, "true or false", lambda _: True)
TEXT = Range(str, "a text", lambda value: "\0" not in value)
NAME = Range(str, "a text that is not empty", lambda value: value != "" and "\0" not in value)


def whole(least: int, most: int) -> Range:
    """Integers from `least` to `most`."""
    words = f"an integer from {least:,} to {most:,}"
    return Range(int, words, lambda value: least <= value <= most)


def number(low: float, high: float, *, above: bool = False, below: bool = False) -> Range:
    """Finite numbers from `low` to `high`, without `low` if `above`, without `high` if `below`."""
    start = f"above {low:,}, up to" if above else f"from {low:,} to"
    words = f"a number {start}{' below' if below else ''} {high:,}"

    def holds(value: float) -> bool:  # false of NaN
        return (low < value if above else low <= value) and (
            value < high if below else value <= high
        )

    return Range(float, words, holds)


SEED = whole(0, 2**32 - 1)  # of more bits JAX keeps the lower 32
SIDE = whole(1, 65_535)  # of a photo, in pixels: as many as a JPEG has at most


def one_of(*names: str) -> Range:
    """Some words."""
    *others, last = names
    return Range(str, f"{', '.join(others)} or {last}", lambda value: value in names)


def row(words: str, *parts: Range) -> Range:
    """Tuples that have a value for each part."""

    def holds(value: Any) -> bool:
        return len(value) == len(parts) and all(
            part.fits(each) for part, each in zip(parts, value, strict=True)
        )

    return Range(tuple, words, holds)


def optional(inside: Range) -> Range:
    """The same, or None."""
    return inside._replace(words=f"{inside.words}, or None", optional=True)
