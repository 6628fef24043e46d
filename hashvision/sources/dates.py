"""When a post was made, as one number: dumps write dates in many ways, and text does not sort."""

import datetime
import re

BITS = 49  # of a date
UNDATED = 2**BITS - 1  # after every date

_FIRST = datetime.datetime(1, 1, 1, tzinfo=datetime.UTC)
_MILLISECOND = datetime.timedelta(milliseconds=1)
_EPOCH = (datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) - _FIRST) // _MILLISECOND
_YEAR_OR_MONTH = re.compile(r"[0-9]{4}(-[0-9]{2})?")  # ISO 8601, but not for `fromisoformat`
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_SHORT = re.compile(r"[0-9]{1,8}")  # 2020 is a year, 20200131 a day: no post is of 1970
_LARGEST_SECONDS = 1e11  # the year 5138
_UNITS = 4  # seconds, and thousandths of thousandths of them


def sortable(created_at: str) -> int:
    """A date as milliseconds since the year 1, below 2^BITS; UNDATED where it cannot be read.

    A date is in ISO 8601 (a year, a month, a day or a moment; in UTC where it has no offset), or it
    is a number: seconds since 1970, or milli-, micro- or nanoseconds if it is too large for those.

    Args:
      created_at: as the dump has it; a number as text.
    """
    text = created_at.strip()
    short = _SHORT.fullmatch(text)
    if _NUMBER.fullmatch(text) and not short:
        return _since_1970(float(text))
    try:
        if _YEAR_OR_MONTH.fullmatch(text):
            text += "-01" if "-" in text else "-01-01"
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        return _since_1970(float(text)) if short else UNDATED
    if found.tzinfo is None:
        found = found.replace(tzinfo=datetime.UTC)
    return max(0, (found - _FIRST) // _MILLISECOND)


def _since_1970(seconds: float) -> int:
    for _ in range(_UNITS):
        if abs(seconds) < _LARGEST_SECONDS:
            found = _EPOCH + round(seconds * 1000)
            return found if found >= 0 else UNDATED
        seconds /= 1000
    return UNDATED
