"""Tests of matching the classes of a newly prepared dataset to those of a run."""

import numpy as np
import pytest

from hashvision.data import classes
from hashvision.errors import UserError


def vocabulary(*entries):
    """Each entry: tags with a space between, the first names the class."""
    return {
        "classes": [
            {"name": tags.split()[0], "count": 9, "tags": dict.fromkeys(tags.split(), 3)}
            for tags in entries
        ]
    }


RUN = vocabulary("bear brownbear bears", "dog dogs", "tree")


def match(*entries):
    return classes.match(RUN, vocabulary(*entries), "DATA").tolist()


def test_the_same_classes_keep_their_numbers():
    assert match("bear brownbear bears", "dog dogs", "tree") == [0, 1, 2]


def test_order_counts_and_names_may_change():
    assert match("tree", "brownbear bear bears", "dog dogs") == [2, 0, 1]


def test_tags_may_disappear_and_appear():
    assert match("dogs doggy", "tree trees", "bears") == [1, 2, 0]


def test_a_class_without_tags_is_matched_by_its_name():
    given = vocabulary("tree", "dog", "bear")
    for entry in given["classes"]:
        entry["tags"] = {}
    assert classes.match(RUN, given, "DATA").tolist() == [2, 1, 0]


@pytest.mark.parametrize("seed", range(5))
def test_a_random_vocabulary_is_matched(seed):
    rng = np.random.default_rng(seed)
    entries = [[f"t{n}x{k}" for k in range(rng.integers(1, 4))] for n in range(50)]
    run = vocabulary(*(" ".join(tags) for tags in entries))
    order = rng.permutation(50)
    left = [rng.permutation(entries[n])[: rng.integers(1, 4)] for n in order]
    given = vocabulary(*(" ".join(tags) for tags in left))
    np.testing.assert_array_equal(classes.match(run, given, "DATA"), order)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (("bear brownbear", "tree"), "lacks the class 'dog'"),
        (("bear", "dog", "tree", "boat"), "has the class 'boat', which the run does not have"),
        (("bear", "cat dogs", "tree"), "has the class 'cat'"),
        (("bear dog", "tree"), "merges the classes 'bear' and 'dog'"),
        (("bear", "brownbear", "dog", "tree"), "separates the classes 'bear' and 'brownbear'"),
        (("bear dogs", "dog", "tree"), "merges"),
        ((), "lacks the class 'bear'"),
    ],
)
def test_a_mismatch_is_named_with_the_remedy(entries, words):
    with pytest.raises(UserError, match=words) as error:
        match(*entries)
    assert "--removals=CSV" in str(error.value) and "new --workdir" in str(error.value)
    assert "DATA" in str(error.value)
