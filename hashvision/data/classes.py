"""Which class of a run each class of a dataset is, once `prepare` has counted anew.

Fewer posts change the order of the classes (the commonest comes first), the tag that names a class
(its commonest) and which tags still occur. The network keeps the numbers that it began with.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hashvision.errors import UserError


def match(run: Mapping[str, Any], given: Mapping[str, Any], dataset: str) -> np.ndarray:
    """Matches the classes of a dataset to those of a run, one to one, by their tags.

    Two classes are the same if they share a tag, and the dataset's is named by a word that the
    run's has: its name or a tag. Where a vocabulary holds no tags of a class, its name decides.

    Args:
      run: the vocabulary that the run began with, as in vocabulary.json.
      given: that of the dataset.
      dataset: its folder, to name it in an error.

    Returns:
      int32 (K,): for each class of the dataset its number in the run.

    Raises:
      UserError: a class was lost or gained, or two were merged or one split.
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
            raise _refused(dataset, f"merges the classes {merged}, which the run keeps apart")
        number = min(same, default=-1)
        if number < 0 or name not in (known[number]["name"], *known[number]["tags"]):
            raise _refused(dataset, f"has the class {name!r}, which the run does not know")
        if number in found:
            split = f"{found[number]!r} and {name!r}"
            raise _refused(dataset, f"keeps the classes {split} apart, which are one in the run")
        found[number] = name
    for number, entry in enumerate(known):
        if number not in found:
            raise _refused(dataset, f"lacks the class {entry['name']!r}, which the run has learnt")
    return np.array([*found], np.int32)


def _tags(vocabulary: Mapping[str, Any]) -> list[tuple[str, set[str]]]:
    return [(entry["name"], {*entry["tags"]}) for entry in vocabulary["classes"]]


def _refused(dataset: str, how: str) -> UserError:
    return UserError(
        f"The vocabulary of {dataset} {how}; resume on the previous dataset with --removals=CSV,"
        " which leaves out what the list names, or train into a new --workdir."
    )
