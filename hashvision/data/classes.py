"""Matches the classes of a newly prepared dataset to the classes of a run, for resuming.

With fewer posts, the order of the classes (by frequency), the tag that names a class (its
commonest) and the set of tags can change. The network keeps the class numbers that it started with.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hashvision.errors import UserError


def match(run: Mapping[str, Any], given: Mapping[str, Any], dataset: str) -> np.ndarray:
    """Matches the classes of a dataset to the classes of a run, one to one, by their tags.

    Two classes match if they share a tag and the name of the dataset's class is the name or a tag
    of the run's class. If a vocabulary has no tags for a class, the name decides.

    Args:
      run: the vocabulary that the run started with, as in vocabulary.json.
      given: the vocabulary of the dataset.
      dataset: folder of the dataset, for error messages.

    Returns:
      int32 (K,): for each class of the dataset, its number in the run.

    Raises:
      UserError: a class disappeared or is new, two were merged, or one was split.
    """
    known = run["classes"]
    if _tags(run) == _tags(given):
        return np.arange(len(known), dtype=np.int32)
    by_name = {entry["name"]: number for number, entry in enumerate(known)}
    by_tag = {tag: number for number, entry in enumerate(known) for tag in entry["tags"]}
    found: dict[int, str] = {}
    for entry in given["classes"]:
        name = entry["name"]
        same = {by_tag[tag] for tag in entry["tags"] if tag in by_tag}
        if not same and name in by_name:
            same = {by_name[name]}
        if len(same) > 1:
            merged = " and ".join(repr(known[number]["name"]) for number in sorted(same))
            raise _mismatch(dataset, f"merges the classes {merged}, which are separate in the run")
        number = min(same, default=-1)
        if number < 0 or name not in (known[number]["name"], *known[number]["tags"]):
            raise _mismatch(dataset, f"has the class {name!r}, which the run does not have")
        if number in found:
            split = f"{found[number]!r} and {name!r}"
            raise _mismatch(dataset, f"separates the classes {split}, which are one in the run")
        found[number] = name
    for number, entry in enumerate(known):
        if number not in found:
            raise _mismatch(dataset, f"lacks the class {entry['name']!r}, which the run has learnt")
    return np.array([*found], np.int32)


def _tags(vocabulary: Mapping[str, Any]) -> list[tuple[str, set[str]]]:
    return [(entry["name"], {*entry["tags"]}) for entry in vocabulary["classes"]]


def _mismatch(dataset: str, problem: str) -> UserError:
    return UserError(
        f"The vocabulary of {dataset} {problem}; resume on the previous dataset with --removals=CSV"
        " to exclude the removed photos, or train into a new --workdir."
    )
