"""Tests of the measure of how a tag's posts differ from all posts."""

import math

import numpy as np

from hashvision.tags.spread import DEPENDENCE_THRESHOLD, Spread, measure_spread, number_terms


def plain(observed, totals, uses, posts, own=None):
    """The sum over terms of G / (1 - n/N) - 1, divided by 2n, in scalars."""
    total, total_own, terms = 0.0, 0.0, 0
    for term, (seen, m) in enumerate(zip(observed, totals, strict=True)):
        expected = uses * m / posts
        g = 0.0
        if seen:
            g += 2 * seen * math.log(seen / expected)
        if uses - seen:
            g += 2 * (uses - seen) * math.log((uses - seen) / (uses - expected))
        excess = g / (1 - uses / posts) - 1
        if term == own:
            total_own = max(0.0, excess) if seen > expected else 0.0
        elif expected >= 1 and m < posts:
            total += excess
            terms += 1
    return total / (2 * uses), math.sqrt(2 * terms) / (2 * uses), total_own / (2 * uses), terms


def draw(generator: np.random.Generator, lift: float, posts: int = 2000, uses: int = 200):
    """Draws posts with 60 terms; with the tag, a third of the terms is `lift` times as frequent."""
    tagged = np.arange(posts) < uses
    probability = np.full((posts, 60), 0.1)
    probability[:uses, :20] *= lift
    has = generator.random((posts, 60)) < probability
    return has[tagged].sum(0), has.sum(0), uses, posts


def test_equals_the_scalar_transcription():
    generator = np.random.default_rng(0)
    for uses in (7, 50, 400):
        case = draw(generator, 1.7, uses=uses)
        for own in (None, 3, 40):
            found = measure_spread(*case, own=own)
            np.testing.assert_allclose(found[:4], plain(*case, own=own), rtol=1e-12)


def test_is_unbiased_with_a_correct_error_for_independent_tags():
    generator = np.random.default_rng(1)
    found = [measure_spread(*draw(generator, 1.0)) for _ in range(400)]
    effects = np.array([spread.effect for spread in found])
    assert abs(effects.mean()) < 3 * found[0].error / 20
    np.testing.assert_allclose(effects.std(), found[0].error, rtol=0.15)


def test_dependence_and_independence_need_evidence():
    generator = np.random.default_rng(2)
    independent, dependent = (
        measure_spread(*draw(generator, 1.0)),
        measure_spread(*draw(generator, 4.0)),
    )
    assert independent.content_independent and not independent.content_dependent
    assert dependent.content_dependent and not dependent.content_independent
    few = measure_spread(*draw(generator, 1.0, uses=25))
    assert not few.content_independent and not few.content_dependent
    assert not measure_spread(np.zeros(0), np.zeros(0), 500, 2000).content_independent
    everywhere = measure_spread(np.array([9]), np.array([9]), 9, 9)
    assert not everywhere.content_independent and not everywhere.content_dependent
    assert Spread(DEPENDENCE_THRESHOLD - 0.1, 0.04, 0.0, 99, 99).content_independent
    assert not Spread(DEPENDENCE_THRESHOLD - 0.1, 0.06, 0.0, 99, 99).content_independent


def test_its_own_word_makes_a_tag_neither_independent_nor_dependent():
    named = Spread(0.1, 0.02, 0.9, 99, 99)
    assert not named.content_independent and not named.content_dependent
    generator = np.random.default_rng(3)
    observed, totals, uses, posts = draw(generator, 1.0)
    rare = np.array([150])  # a word that hardly any other post has
    observed, totals = np.append(observed, rare), np.append(totals, rare + 5)
    assert not measure_spread(observed, totals, uses, posts, own=60).content_independent
    assert measure_spread(observed, totals, uses, posts, own=60).effect < 0.1
    observed[60], totals[60] = 0, 900  # avoided rather than named
    assert measure_spread(observed, totals, uses, posts, own=60).own == 0


def test_term_numbers_do_not_depend_on_order():
    pairs = [("b", 3), ("a", 3), ("c", 9)]
    assert number_terms(pairs) == {"c": (0, 9), "a": (1, 3), "b": (2, 3)}
    assert number_terms(pairs[::-1]) == number_terms(pairs)
