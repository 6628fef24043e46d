"""Writes the text of a drawn post: a caption, and hashtags in many spellings."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hashvision.synthetic import objects

# Rates that the tests check.
UNTAGGED = 0.15  # share of the objects that get no tag
WRONG = 0.05  # share of the tagged objects that get the tag of another kind


class Words(NamedTuple):
    """What people call a kind of object.

    Attributes:
        phrases: names of the kind in a sentence, with the article.
        lemmas: its tags, which are lemmas of one WordNet synset, the most used first.
        weights: how often each lemma is chosen; they sum to 1.
    """

    phrases: tuple[str, ...]
    lemmas: tuple[str, ...]
    weights: tuple[float, ...]


# All lemmas of a kind share a noun synset of Open English WordNet 2025 (see the comments).
WORDS = {
    "dog": Words(  # oewn-02086723-n
        ("a dog", "a good dog"),
        ("dog", "domestic dog", "Canis familiaris"),
        (0.76, 0.1, 0.14),
    ),
    "car": Words(  # oewn-02961779-n
        ("a car", "an automobile", "an old car"),
        ("car", "automobile", "auto", "motorcar"),
        (0.68, 0.16, 0.1, 0.06),
    ),
    "tree": Words(("a tree", "a lone tree"), ("tree",), (1.0,)),  # oewn-13124818-n
    "fish": Words(("a fish", "a big fish"), ("fish",), (1.0,)),  # oewn-02514684-n
    "bicycle": Words(  # oewn-02837983-n
        ("a bicycle", "a bike", "an old bicycle"),
        ("bicycle", "bike"),
        (0.7, 0.3),
    ),
    "butterfly": Words(("a butterfly",), ("butterfly",), (1.0,)),  # oewn-02276911-n
    "airplane": Words(  # oewn-02694015-n
        ("an airplane", "a plane", "an aeroplane"),
        ("airplane", "aeroplane", "plane"),
        (0.55, 0.2, 0.25),
    ),
    "owl": Words(  # oewn-01623768-n
        ("an owl", "a wise owl"),
        ("owl", "bird of night", "bird of Minerva"),
        (0.82, 0.1, 0.08),
    ),
    "sailboat": Words(  # oewn-04135600-n
        ("a sailboat", "a sailing boat"),
        ("sailboat", "sailing boat"),
        (0.65, 0.35),
    ),
    "snake": Words(  # oewn-01729333-n
        ("a snake", "a serpent"),
        ("snake", "serpent", "ophidian"),
        (0.68, 0.22, 0.1),
    ),
    "eyeglasses": Words(  # oewn-04279164-n
        ("a pair of glasses", "a pair of eyeglasses", "my spectacles"),
        ("eyeglasses", "spectacles", "glasses", "specs"),
        (0.4, 0.2, 0.28, 0.12),
    ),
    "giraffe": Words(  # oewn-02441664-n
        ("a giraffe", "a tall giraffe"),
        ("giraffe", "Giraffa camelopardalis", "camelopard"),
        (0.74, 0.16, 0.1),
    ),
}
SPAM = (
    "love instagood photooftheday tbt beautiful happy cute picoftheday follow nofilter art "
    "instadaily like4like fun amazing style bestoftheday throwback weekend vsco mood smile "
    "goodvibes memories nature life instapic family throwbackthursday l4l 2019 yolo"
).split()
_SPAM_FREQUENCY = 1 / np.arange(1, len(SPAM) + 1)
_SPAM_FREQUENCY /= _SPAM_FREQUENCY.sum()

_EMOJI = ("❤️", "😍", "📸", "🔥", "✨", "😂", "🌊", "👍🏽", "👨‍👩‍👧")
_ACCENTS = str.maketrans("aeiou", "áéíóú")
_CAPTIONS = (
    "{} on the way home",
    "Look, {}!",
    "{} in the afternoon light",
    "Found {} again",
    "Nothing but {} today",
    "Here is {}, what else",
    "I could look at {} all day",
    "Not every day one meets {}",
)


def _choose(rng: np.random.Generator, options: Sequence[str], weights=None) -> str:
    return options[int(rng.choice(len(options), p=weights))]


def _plural(lemma: str) -> str:
    if lemma[0].isupper() or " of " in lemma or lemma.endswith("s"):
        return lemma
    if lemma.endswith("y"):
        return lemma[:-1] + "ies"
    return lemma + ("es" if lemma.endswith("sh") else "s")


def _spell(rng: np.random.Generator, lemma: str) -> str:
    """Returns a lemma in one of the spellings of a hashtag, without the sign."""
    words = lemma.split()
    style = rng.random()
    if style < 0.16:
        return _plural(lemma).replace(" ", "").lower()
    if style < 0.32:
        return "".join(word.capitalize() for word in words)
    if style < 0.37:
        return "".join(words).upper()
    if style < 0.39:
        return "".join(words).lower().translate(_ACCENTS)
    if style < 0.39 + 0.2 * (len(words) > 1):
        return "_".join(words).lower()
    return "".join(words).lower()


def write_tags(rng: np.random.Generator, kinds: Sequence[str]) -> str:
    """Writes the hashtags of a scene as one string.

    Args:
        rng: decides everything.
        kinds: what the scene holds. UNTAGGED and WRONG say how many of these get no tag or a wrong
            one.
    """
    tags = []
    for kind in kinds:
        if rng.random() < UNTAGGED:
            continue
        if rng.random() < WRONG:
            kind = _choose(rng, [other for other in objects.KINDS if other not in kinds])
        words = WORDS[kind]
        for _ in range(1 + int(rng.random() < 0.2)):
            tags.append(_spell(rng, _choose(rng, words.lemmas, words.weights)))
    for _ in range(min(12, int(rng.geometric(0.35)) - 1)):
        tags.append(_choose(rng, SPAM, _SPAM_FREQUENCY))
    text = ""
    for tag in dict.fromkeys(tags):
        sign = "＃" if rng.random() < 0.02 else "#"
        before = " " if rng.random() < 0.85 else ""
        after = _choose(rng, _EMOJI) if rng.random() < 0.06 else ""
        text += before + sign + tag + after
    return text.strip()


def write_caption(rng: np.random.Generator, kinds: Sequence[str]) -> str:
    """Writes one sentence that names all kinds in the scene."""
    phrases = [_choose(rng, WORDS[kind].phrases) for kind in kinds]
    things = " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
    caption = _choose(rng, _CAPTIONS).format(things)
    caption = caption[0].upper() + caption[1:]
    return f"{caption} {_choose(rng, _EMOJI)}" if rng.random() < 0.25 else caption
