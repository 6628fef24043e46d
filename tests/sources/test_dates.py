"""Tests that dates in many formats sort by the time they mean."""

import pytest

from hashvision.sources import dates
from hashvision.sources.dates import UNDATED, sortable

MOMENT = sortable("2020-02-29T12:30:00Z")


@pytest.mark.parametrize(
    "written",
    [
        "2020-02-29T12:30:00+00:00",
        "2020-02-29T14:30:00+02:00",
        "2020-02-29T07:00:00-05:30",
        "2020-02-29 12:30:00.000000",
        "2020-02-29T12:30",
        "20200229T123000Z",
        " 2020-02-29T12:30:00Z\n",
        "1582979400",
        "1582979400.0",
        "1.5829794e9",
        "1582979400000",
        "1582979400000000",
        "1582979400000000000",
        "+1582979400",
    ],
)
def test_all_spellings_of_one_time_give_one_number(written: str):
    assert sortable(written) == MOMENT


def test_numbers_sort_by_time():
    written = [
        "0001-01-01",
        "-100",
        "1970-01-01T00:00:01Z",
        "1999",
        "1999-02",
        "1999-02-02",
        "2019-12-31T23:59:59.999Z",
        "20200101",
        "2020-01-01T00:00:00-00:01",
        "1609459200",  # 2021-01-01
        "1612010100000",  # 2021-01-30, and the hour 00:00 of 1612-01-01 if read as ISO 8601
        "2021-02-01T00:00:00+09:00",
        "9999-12-31",
    ]
    numbers = [sortable(each) for each in written]
    assert numbers == sorted(numbers) and len(set(numbers)) == len(numbers)
    assert numbers[0] == 0 and numbers[-1] < UNDATED < 2**dates.BITS
    assert sortable("0001-01-01T00:00:00+14:00") == 0


@pytest.mark.parametrize(
    "written",
    [
        "",
        " ",
        "yesterday",
        "2020-13-01",
        "2020-02-30",
        "nan",
        "inf",
        "1e999",
        "-1e300",
        "0x10",
        "~",
    ],
)
def test_unreadable_dates_sort_last(written: str):
    assert sortable(written) == UNDATED
