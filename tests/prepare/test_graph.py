"""Tests of the graph's own steps."""

import numpy as np

from hashvision.prepare.graph import TermCounts


def test_term_counts_combine_in_any_way():
    counts = TermCounts()
    posts = [([0, 2], [1]), ([2], []), ([], [1, 3])]
    together = counts.create_accumulator()
    apart = []
    for post in posts:
        together = counts.add_input(together, post)
        apart.append(counts.add_input(counts.create_accumulator(), post))
    np.testing.assert_array_equal(together, counts.merge_accumulators(apart))
    np.testing.assert_array_equal(together[:, :4], [[1, 0, 2, 0], [0, 2, 0, 1]])
