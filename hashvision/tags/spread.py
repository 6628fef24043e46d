"""How far the posts of a tag differ from all posts: what tells #dog from #love.

A tag that comes whatever its posts show (#love, #tbt) has posts like all posts; the posts of #dog
say other words than the rest. Scale: one vector of 2 * MAXIMUM_TERMS counts for each tag with
MINIMUM_USES_TIED posts, combined where the posts lie and reduced to a Spread there.
"""

import math
import typing
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

MAXIMUM_TERMS = 1000  # words, and as many tags, by which posts are compared: the commonest

# Nats a post, effect and own word and two standard errors. Measured on tags with
# MINIMUM_USES_EVEN uses: spam at most 0.31 on real posts (Flickr8k captions) and 0.47 on drawn
# ones; things at least 1.63 on real posts, of which 0.51 without their own words.
EVEN_BELOW = 0.5
MINIMUM_USES_EVEN = 30  # below, a tag is never called even, for want of evidence
MINIMUM_USES_TIED = 20  # below, a doubtful tag is never called tied to what posts show
MINIMUM_TERMS = 20  # fewer comparable terms are no evidence either


class Spread(typing.NamedTuple):
    """How far the posts of a tag differ from all posts, in nats a post."""

    effect: float  # by the other words of the captions
    error: float  # standard error of `effect` were the tag spread evenly
    own: float  # by the tag's own word, at least 0
    terms: int
    uses: int

    @property
    def even(self) -> bool:
        """Whether the tag comes whatever the post shows, beyond doubt.

        What is named in the caption does not come at random, even if the rest of the caption does.
        """
        enough = self.uses >= MINIMUM_USES_EVEN and self.terms >= MINIMUM_TERMS
        return enough and self.effect + self.own + 2 * self.error < EVEN_BELOW

    @property
    def tied(self) -> bool:
        """Whether the tag depends on what the post shows, beyond doubt.

        That the caption repeats the tag does not tell: it may be '#weekend' and 'my weekend'.
        """
        enough = self.uses >= MINIMUM_USES_TIED and self.terms >= MINIMUM_TERMS
        return enough and self.effect - 2 * self.error >= EVEN_BELOW

    def __str__(self) -> str:
        """The numbers as `why` gives them."""
        own = f" and {self.own:.2f} by its own word" if self.own >= 0.005 else ""
        return f"{self.effect:.2f} ± {2 * self.error:.2f} nats a post{own}"


def measure_spread(
    observed: np.ndarray, totals: np.ndarray, uses: int, posts: int, own: int | None = None
) -> Spread:
    """Measures how the terms of a tag's posts differ from those of all posts.

    The log-likelihood ratio G (Dunning 1993) of each term's 2x2 table, corrected for sampling
    without replacement, less its expectation of 1 under independence, summed over the terms that
    are expected at least once among the tag's posts; halved and divided by the uses it is the
    bias-corrected divergence in nats a post. The variance of each G is 2 under independence.

    Args:
      observed: int (K,), posts with both the tag and the term.
      totals: int (K,), posts with the term.
      uses: posts with the tag.
      posts: all posts.
      own: which term is the tag's own word, measured apart; None where none is.
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
    """Numbers the commonest terms; the numbers do not depend on the workers' order."""
    ordered = sorted(commonest, key=lambda pair: (-pair[1], pair[0]))
    return {term: (number, posts) for number, (term, posts) in enumerate(ordered)}


def terms_by_tag(
    context: tuple[tuple[str, ...], tuple[str, ...]],
    counts: Mapping[str, int],
    words: Terms,
    tags: Terms,
) -> Iterator[tuple[str, tuple[list[int], list[int]]]]:
    """For each tag of a post that is frequent enough to be measured, the post's terms."""
    post_tags, post_words = context
    numbers = (
        [words[word][0] for word in post_words if word in words],
        [tags[tag][0] for tag in post_tags if tag in tags],
    )
    for tag in post_tags:
        if counts.get(tag, 0) >= MINIMUM_USES_TIED:
            yield tag, numbers


def spread_of(
    observed: tuple[str, np.ndarray],
    counts: Mapping[str, int],
    words: Terms,
    tags: Terms,
    posts: int,
) -> tuple[str, Spread]:
    """How the captions of a tag's posts differ from all; their other tags where words are few."""
    tag, (seen_words, seen_tags) = observed
    spread = _measure(seen_words, words, tag, counts[tag], posts)
    if spread.terms < MINIMUM_TERMS:
        # That every post with the tag has the tag among its tags tells nothing.
        spread = _measure(seen_tags, tags, tag, counts[tag], posts)._replace(own=0.0)
    return tag, spread


def _measure(seen: np.ndarray, terms: Terms, tag: str, uses: int, posts: int) -> Spread:
    totals = np.array([total for _, total in terms.values()], np.int64)  # in order of numbers
    own = terms[tag][0] if tag in terms else None
    return measure_spread(seen[: len(terms)], totals, uses, posts, own)
