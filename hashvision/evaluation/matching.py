"""Matches the class names of a test set to vocabulary classes, by tags, lemmas and plurals."""

import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hashvision.tags import hashtags


class ClassMatch(typing.NamedTuple):
    """The vocabulary class of each name."""

    classes: dict[str, int]  # name -> class number
    unmatched: tuple[str, ...]


def match(names: Iterable[str], vocabulary: Mapping[str, Any]) -> ClassMatch:
    """Finds the vocabulary class of each name.

    A name is folded like a hashtag ("hot dog", "Hot-Dog" and #hotdog agree). It is looked up as it
    is, then in the singular, then in the plural. Each form is looked up first among the classes'
    names and merged tags, which are what people typed for the class, then among their WordNet
    lemmas. If several classes match, the most frequent one wins. Several names may match one class.

    Args:
      names: class names of a test set, with spaces, underscores or hyphens between words.
      vocabulary: as in vocabulary.json; "classes" starts with the most frequent.
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


def _singulars(word: str) -> Iterator[str]:
    """Naive singulars; none for a short word or one in -ss, which are rarely plurals."""
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
