"""One person has one name, however a dump or a list writes it."""

import pytest

from hashvision.sources import names


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (12345, "12345"),
        (12345.0, "12345"),
        ("12345", "12345"),
        ("12345.0", "12345"),
        (" 12345.00 ", "12345"),
        (-7.0, "-7"),
        ("007", "007"),
        ("1.5.0", "1.5.0"),
        ("zoe\u0308", "zo\u00eb"),
        ("zo\u00eb", "zo\u00eb"),
        (None, ""),
        ("  ", ""),
    ],
)
def test_spellings_of_one_name(value, name):
    assert names.canonical(value) == name
    assert names.canonical(names.canonical(value)) == name


@pytest.mark.parametrize(
    "value",
    [["a"], {"id": 1}, True, 1.5, 1e300, float("nan"), float("inf"), "a" * 1001, "a\nb", "\ud800"],
)
def test_what_is_not_a_name(value):
    with pytest.raises(ValueError):
        names.canonical(value)
