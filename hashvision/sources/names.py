"""The one form in which ids of posts and owners are compared, in dumps and in removal lists."""

import re
import unicodedata

LONGEST_NAME = 1000  # characters
_WHOLE_NUMBER = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")  # as pandas writes an integer column
_LARGEST_FLOAT = 2**53  # beyond, a float does not say which integer was meant


def canonical(value: object) -> str:
    """An id or an owner as text, the same for every way in which it is written.

    Text is compared in NFC, without spaces around it. Integers are compared as integers: 12345,
    12345.0, "12345" and "12345.0" are one name. Nothing is cut: two names could become one.

    Args:
      value: what a JSON dump or a CSV field holds.

    Returns:
      The name; "" where there is none (None, or text of spaces).

    Raises:
      ValueError: the value is not a name: a list, an object, a boolean, a fraction, or text that is
        too long or holds control characters or surrogates.
    """
    if value is None:
        return ""
    if isinstance(value, float):
        if not value.is_integer() or abs(value) >= _LARGEST_FLOAT:
            raise ValueError("a number that is not an integer")
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError("neither text nor an integer")
    name = unicodedata.normalize("NFC", value).strip()
    if len(name) > LONGEST_NAME or any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise ValueError("too long, or holds control characters")
    number = _WHOLE_NUMBER.fullmatch(name)
    return number[1] if number else name
