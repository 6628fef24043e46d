"""Ranges of values, in words and as a test, for keys of a config and flags of the command line."""

import ast
from collections.abc import Callable
from typing import Any, NamedTuple


class Range(NamedTuple):
    """The values that a setting takes."""

    kind: type  # bool, int, float, str or tuple
    words: str  # as in "epochs takes a number above 0"
    holds: Callable[[Any], bool]  # only called with values of that kind
    optional: bool = False  # whether None is in the range

    def fits(self, value: Any) -> bool:
        """Whether the value is in the range; a list counts as a tuple, since JSON has no tuples."""
        if value is None:
            return self.optional
        if isinstance(value, bool) != (self.kind is bool):  # Python's bool is an int
            return False
        kinds = {float: (int, float), tuple: (tuple, list)}.get(self.kind, self.kind)
        return isinstance(value, kinds) and self.holds(value)

    def read(self, text: str) -> Any:
        """Parses a value typed by a user.

        Raises:
          ValueError: the text is not a value of this range.
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
        """Converts a value that fits to the range's type: a list to a tuple, 1 to 1.0."""
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
TEXT = Range(str, "a string", lambda value: "\0" not in value)
NAME = Range(str, "a non-empty string", lambda value: value != "" and "\0" not in value)


def integer(least: int, most: int) -> Range:
    """Integers from `least` to `most`."""
    words = f"an integer from {least:,} to {most:,}"
    return Range(int, words, lambda value: least <= value <= most)


def number(low: float, high: float, *, above: bool = False, below: bool = False) -> Range:
    """Finite numbers from `low` to `high`; `above` excludes `low`, and `below` excludes `high`."""
    start = f"above {low:,}, up to" if above else f"from {low:,} to"
    words = f"a number {start}{' below' if below else ''} {high:,}"

    def holds(value: float) -> bool:  # False for NaN
        return (low < value if above else low <= value) and (
            value < high if below else value <= high
        )

    return Range(float, words, holds)


SEED = integer(0, 2**32 - 1)  # JAX would drop all but the lower 32 bits
SIDE = integer(1, 65_535)  # pixels per side of a photo; a JPEG cannot have more


def one_of(*names: str) -> Range:
    """The given words."""
    *others, last = names
    return Range(str, f"{', '.join(others)} or {last}", lambda value: value in names)


def fixed_tuple(words: str, *parts: Range) -> Range:
    """Tuples with one value of each range, in this order; `words` describes them."""

    def holds(value: Any) -> bool:
        return len(value) == len(parts) and all(
            part.fits(each) for part, each in zip(parts, value, strict=True)
        )

    return Range(tuple, words, holds)


def optional(inside: Range) -> Range:
    """The values of a range, and None."""
    return inside._replace(words=f"{inside.words}, or None", optional=True)
