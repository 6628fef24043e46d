"""Matches the class names of a test set to vocabulary classes: by tag, WordNet lemma, plural."""

import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hashvision.tags import hashtags


class ClassMatch(typing.NamedTuple):
    """Which vocabulary class each name means."""

    classes: dict[str, int]  # name to class number
    unmatched: tuple[str, ...]


def _singulars(word: str) -> Iterator[str]:
    """Naive singulars; never of a short word or one in -ss, which are rarely plurals."""
    if len(word) < 4 or not word.endswith("s") or word.endswith("ss"):
        return
    if word.endswith("ies"):
        yield word[:-3] + "y"
    if word.endswith("ves"):
        yield word[:-3] + "f"
        yield word[:-3] + "fe"
    yield word[:-1]
    if word.endswith("es"):
        yield word[:-2]


def _plurals(word: str) -> Iterator[str]:
    yield word + "s"
    yield word + "es"
    if word.endswith("y"):
        yield word[:-1] + "ies"


def match(names: Iterable[str], vocabulary: Mapping[str, Any]) -> ClassMatch:
    """Finds the vocabulary class that each name means.

    A name is folded as hashtags are ("hot dog", "Hot-Dog" and #hotdog agree) and looked up as it
    stands, then as a plural made singular, then as a singular made plural; each time first among
    the classes' names and the tags merged into them, which are what people typed for the class,
    then among their WordNet lemmas. A name that several classes answer to goes to the most
    frequent one. Several names may mean one class.

    Args:
      names: class names of a test set, with spaces, underscores or hyphens between words.
      vocabulary: as in vocabulary.json, "classes" ordered from the most frequent.
    """
    tags: dict[str, int] = {}
    lemmas: dict[str, int] = {}
    for number, entry in enumerate(vocabulary["classes"]):
        for tag in (entry["name"], *entry["tags"]):
            tags.setdefault(hashtags.fold(tag), number)
        for lemma in entry.get("lemmas") or ():
            lemmas.setdefault(hashtags.fold(lemma), number)

    def find(name: str) -> int | None:
        key = hashtags.fold(name)
        for variant in (key, *_singulars(key), *_plurals(key)):
            for classes in (tags, lemmas):
                if variant and variant in classes:
                    return classes[variant]
        return None

    matched: dict[str, int] = {}
    unmatched = []
    for name in names:
        number = find(name)
        if number is None:
            unmatched.append(name)
        else:
            matched[name] = number
    return ClassMatch(matched, tuple(unmatched))
