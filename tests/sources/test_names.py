"""Tests that all spellings of an id or owner have one canonical form."""

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
def test_spellings_have_one_canonical_form(value, name):
    assert names.canonical(value) == name
    assert names.canonical(names.canonical(value)) == name


@pytest.mark.parametrize(
    "value",
    [["a"], {"id": 1}, True, 1.5, 1e300, float("nan"), float("inf"), "a" * 1001, "a\nb", "\ud800"],
)
def test_values_that_are_not_names_are_refused(value):
    with pytest.raises(ValueError):
        names.canonical(value)
