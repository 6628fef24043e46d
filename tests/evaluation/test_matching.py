"""Tests of matching test-set names to vocabulary classes."""

import pytest

from hashvision.evaluation import matching


def entry(name, count, tags=(), lemmas=()):
    return {"name": name, "count": count, "tags": dict.fromkeys(tags, 1), "lemmas": list(lemmas)}


VOCABULARY = {
    "classes": [
        entry("dog", 90, ["dog", "dogs", "canisfamiliaris"], ["dog", "domestic dog"]),
        entry("bicycle", 50, ["bicycle", "bike"], ["bicycle", "bike", "wheel", "cycle"]),
        entry("motorcycle", 40, ["motorcycle"], ["motorcycle", "bike"]),
        entry("wheel", 30, ["wheel"], ["wheel"]),
        entry("hotdog", 20, ["hotdog"], ["frankfurter", "hot dog"]),
        entry("puppies", 10, ["puppies"]),
        entry("leaf", 9, ["leaf"]),
        entry("cycling", 8, ["cycling"], ["cycle"]),
        {"name": "café", "count": 7, "tags": {"cafe": 7}, "synset": None, "lemmas": []},
    ]
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dog", "dog"),
        ("Domestic Dog", "dog"),
        ("domestic_dog", "dog"),
        ("hot-dog", "hotdog"),
        ("frankfurters", "hotdog"),
        ("bike", "bicycle"),  # a tag of bicycle, though a lemma of motorcycle
        ("wheel", "wheel"),  # its own class rather than a more frequent class's lemma
        ("cycle", "bicycle"),  # a lemma of two classes; the more frequent one wins
        ("puppy", "puppies"),
        ("leaves", "leaf"),
        ("dogs", "dog"),
        ("Café", "café"),
        ("cat", None),
        ("do", None),
        ("", None),
        ("!", None),
    ],
)
def test_match(name, expected):
    match = matching.match([name], VOCABULARY)
    if expected is None:
        assert match == ({}, (name,))
    else:
        assert VOCABULARY["classes"][match.classes[name]]["name"] == expected


def test_several_names_may_match_one_class():
    match = matching.match(["bike", "cat", "bicycles"], VOCABULARY)
    assert match.classes == {"bike": 1, "bicycles": 1}
    assert match.unmatched == ("cat",)


def test_lemmas_may_be_null():
    vocabulary = {"classes": [{"name": "dog", "tags": {"dog": 1}, "lemmas": None}]}
    assert matching.match(["dogs"], vocabulary).classes == {"dogs": 0}
