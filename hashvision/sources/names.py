"""Canonical form of post and owner ids, for comparing dumps with removal lists."""

import re
import unicodedata

LONGEST_NAME = 1000  # characters
_WHOLE_NUMBER = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")  # how pandas may write an integer column
_LARGEST_FLOAT = 2**53  # larger floats do not identify one integer


def canonical(value: object) -> str:
    """Converts an id or an owner to one text form, however it is written.

    Text is normalized to NFC and stripped of surrounding spaces. Integers are compared as integers:
    12345, 12345.0, "12345" and "12345.0" are one name. Long names are rejected, not truncated,
    because truncation could make two names equal.

    Args:
      value: from a JSON dump or a CSV field.

    Returns:
      The name; "" for None and for blank text.

    Raises:
      ValueError: the value is not a name: a list, an object, a boolean, a fraction, or text that is
        too long or contains control characters or surrogates.
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
        raise ValueError("too long, or contains control characters")
    number = _WHOLE_NUMBER.fullmatch(name)
    return number[1] if number else name
