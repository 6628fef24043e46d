"""Measures how far the posts of a tag differ from all posts, which separates #dog from #love.

The posts of a tag that is independent of their content (#love, #tbt) have the words of all posts;
the posts of #dog have other words. Scale: one vector of 2 * MAXIMUM_TERMS counts for each tag with
at least MINIMUM_USES_DEPENDENT posts; Beam combines and reduces it where the posts are.
"""

import math
import typing
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

MAXIMUM_TERMS = 1000  # the commonest words, and as many tags, by which posts are compared

# Nats per post: effect, own word and two standard errors together. Measured on tags with at least
# MINIMUM_USES_INDEPENDENT uses: spam has at most 0.31 on real posts (Flickr8k captions) and 0.47 on
# synthetic ones; objects have at least 1.63 on real posts, 0.51 of it without their own words.
DEPENDENCE_THRESHOLD = 0.5
MINIMUM_USES_INDEPENDENT = 30  # fewer uses are too little evidence of independence
MINIMUM_USES_DEPENDENT = 20  # fewer uses are too little evidence of dependence
MINIMUM_TERMS = 20  # fewer comparable terms are too little evidence for either


class Spread(typing.NamedTuple):
    """How far the posts of a tag differ from all posts, in nats per post."""

    effect: float  # from the other words of the captions
    error: float  # standard error of `effect` if the tag were independent of the content
    own: float  # from the tag's own word, at least 0
    terms: int  # number of terms compared
    uses: int  # number of posts with the tag

    @property
    def content_independent(self) -> bool:
        """Whether the tag is clearly independent of what the post shows.

        A tag whose own word is in the caption is not, even if the rest of the caption is typical.
        """
        enough = self.uses >= MINIMUM_USES_INDEPENDENT and self.terms >= MINIMUM_TERMS
        return enough and self.effect + self.own + 2 * self.error < DEPENDENCE_THRESHOLD

    @property
    def content_dependent(self) -> bool:
        """Whether the tag clearly depends on what the post shows.

        The tag's own word in the caption is not evidence: it may be '#weekend' and 'my weekend'.
        """
        enough = self.uses >= MINIMUM_USES_DEPENDENT and self.terms >= MINIMUM_TERMS
        return enough and self.effect - 2 * self.error >= DEPENDENCE_THRESHOLD

    def __str__(self) -> str:
        """The numbers as in the `why` of a vocabulary."""
        own = f" and {self.own:.2f} by its own word" if self.own >= 0.005 else ""
        return f"{self.effect:.2f} ± {2 * self.error:.2f} nats a post{own}"


def measure_spread(
    observed: np.ndarray, totals: np.ndarray, uses: int, posts: int, own: int | None = None
) -> Spread:
    """Measures how the terms of a tag's posts differ from those of all posts.

    For each term it computes the log-likelihood ratio G (Dunning 1993) of the 2x2 table, corrects
    it for sampling without replacement, and subtracts its expectation of 1 under independence. It
    sums this over the terms that are expected at least once among the tag's posts. Half the sum per
    use is the bias-corrected divergence in nats per post. Under independence each G has a variance
    of 2.

    Args:
      observed: int (K,), number of posts with both the tag and the term.
      totals: int (K,), number of posts with the term.
      uses: number of posts with the tag.
      posts: number of all posts.
      own: index of the term that is the tag's own word, which is measured separately; None if none
        is.
    """
    if not 0 < uses < posts:
        return Spread(0.0, math.inf, 0.0, 0, uses)
    expected = uses * totals / posts
    excess = _log_likelihood_ratio(observed, expected, uses) / (1 - uses / posts) - 1
    comparable = (expected >= 1) & (totals < posts)
    own_effect = 0.0
    if own is not None:
        comparable[own] = False
        if observed[own] > expected[own]:
            own_effect = max(0.0, float(excess[own])) / (2 * uses)
    terms = int(comparable.sum())
    effect = float(excess[comparable].sum()) / (2 * uses)
    return Spread(effect, math.sqrt(2 * terms) / (2 * uses), own_effect, terms, uses)


def _log_likelihood_ratio(observed: np.ndarray, expected: np.ndarray, uses: int) -> np.ndarray:
    g = np.zeros(len(observed))
    for have, expect in ((observed, expected), (uses - observed, uses - expected)):
        some = have > 0
        g[some] += 2 * have[some] * np.log(have[some] / expect[some])
    return g


Terms = dict[str, tuple[int, int]]  # term -> (number, posts)


def number_terms(commonest: Sequence[tuple[str, int]]) -> Terms:
    """Numbers terms by frequency, independently of the order in which workers found them."""
    ordered = sorted(commonest, key=lambda pair: (-pair[1], pair[0]))
    return {term: (number, posts) for number, (term, posts) in enumerate(ordered)}


def terms_by_tag(
    context: tuple[tuple[str, ...], tuple[str, ...]],
    counts: Mapping[str, int],
    words: Terms,
    tags: Terms,
) -> Iterator[tuple[str, tuple[list[int], list[int]]]]:
    """Yields each sufficiently frequent tag of a post with the numbers of the post's terms."""
    post_tags, post_words = context
    numbers = (
        [words[word][0] for word in post_words if word in words],
        [tags[tag][0] for tag in post_tags if tag in tags],
    )
    for tag in post_tags:
        if counts.get(tag, 0) >= MINIMUM_USES_DEPENDENT:
            yield tag, numbers


def measure_tag(
    observed: tuple[str, np.ndarray],
    counts: Mapping[str, int],
    words: Terms,
    tags: Terms,
    posts: int,
) -> tuple[str, Spread]:
    """Measures a tag by its captions, or by the other tags of its posts if captions are short."""
    tag, (seen_words, seen_tags) = observed
    spread = _measure(seen_words, words, tag, counts[tag], posts)
    if spread.terms < MINIMUM_TERMS:
        # Every post with the tag has the tag itself, which is not evidence.
        spread = _measure(seen_tags, tags, tag, counts[tag], posts)._replace(own=0.0)
    return tag, spread


def _measure(seen: np.ndarray, terms: Terms, tag: str, uses: int, posts: int) -> Spread:
    totals = np.array([total for _, total in terms.values()], np.int64)  # ordered by number
    own = terms[tag][0] if tag in terms else None
    return measure_spread(seen[: len(terms)], totals, uses, posts, own)
