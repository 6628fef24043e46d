"""Converts the dates of posts, which dumps write in many formats, to numbers that sort by time."""

import datetime
import re

BITS = 49  # enough for any date
UNDATED = 2**BITS - 1  # sorts after every date

_FIRST = datetime.datetime(1, 1, 1, tzinfo=datetime.UTC)
_MILLISECOND = datetime.timedelta(milliseconds=1)
_EPOCH = (datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) - _FIRST) // _MILLISECOND
_YEAR_OR_MONTH = re.compile(r"[0-9]{4}(-[0-9]{2})?")  # ISO 8601 that `fromisoformat` rejects
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_SHORT = re.compile(r"[0-9]{1,8}")  # a year (2020) or a day (20200131), not seconds in 1970
_LARGEST_SECONDS = 1e11  # the year 5138
_UNITS = 4  # seconds, milliseconds, microseconds, nanoseconds


def sortable(created_at: str) -> int:
    """Converts a date to milliseconds since the year 1, below 2^BITS; UNDATED if it is unreadable.

    A date is either ISO 8601 (a year, month, day or time; UTC if it has no offset) or a number of
    seconds since 1970. Numbers too large for seconds count as milli-, micro- or nanoseconds.

    Args:
      created_at: as in the dump; a number as text.
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
