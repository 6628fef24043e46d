"""Tests of bands: small ones pair all rows, large ones the similar rows."""

import collections

import numpy as np
import pytest

import bands as bands_benchmark
from hashvision.duplicates import alignment, bands
from hashvision.duplicates.bands import POST
from hashvision.duplicates.fingerprints import BITS, Fingerprint, pack_spectra, unpack_spectra

SIZE = 10_000


@pytest.fixture(scope="module")
def large() -> bands_benchmark.Planted:
    return bands_benchmark.band(SIZE, 1000, seed=3)


def pairs_of(met: np.ndarray) -> list[tuple[int, int]]:
    """(post, partner) by the files of the photos."""
    return sorted(zip(met["post"]["file"].tolist(), met["partner"]["file"].tolist(), strict=True))


def test_spectra_take_six_bits_per_coefficient():
    spectra = np.random.default_rng(0).integers(-31, 32, (50, BITS)).astype(np.int8)
    packed = pack_spectra(spectra)
    assert packed.dtype == np.uint8 and packed.shape == (50, 27)
    np.testing.assert_array_equal(unpack_spectra(packed), spectra)


def test_a_row_is_small_and_locates_the_fingerprint():
    spectra = np.random.default_rng(0).integers(-31, 32, (2, BITS)).astype(np.int8)
    boxes = np.array([[1, 2, 90, 80], [200, 2, 90, 80]], np.uint8)
    print_ = Fingerprint(
        bytes(range(16)),
        b"",
        np.array([7, 2**32 - 1], "<u4").tobytes(),
        boxes.tobytes(),
        pack_spectra(spectra).tobytes(),
    )
    made = bands.rows(print_, POST, b"\1\2", "00ff00ff00ff00ff", 12)
    assert made.itemsize == 56
    assert made["band"].tolist() == [0x03020100, 7, 2**32 - 1]
    assert set(made["file"].tolist()) == {0x00FF00FF00FF00FF} and set(made["offset"]) == {12}
    assert set(made["order"].tolist()) == {0x0102 << 48} and set(made["rank"]) == {POST}
    np.testing.assert_array_equal(made["box"][1:], boxes)
    np.testing.assert_array_equal(unpack_spectra(made["spectrum"][1:]), spectra)


def small_bands(seed: int, size: int = 600) -> np.ndarray:
    """Bands of 1 to 40 rows: with keys, with equal bytes, and with orders that begin alike."""
    random = np.random.default_rng(seed)
    rows = np.zeros(size, bands.ROW)
    rows["band"] = random.integers(0, 60, size) * (random.random(size) < 0.9)
    rows["rank"] = np.where(random.random(size) < 0.7, POST, random.integers(0, POST, size))
    rows["order"] = random.integers(0, size // 2, size)  # some come twice
    rows["file"], rows["offset"] = np.arange(size), random.integers(0, 9, size)
    whole = rows["band"] % 4 == 1
    rows["box"][~whole] = [0, 0, 255, 255]
    rows["box"][(rows["file"] % 7 == 0) & ~whole] = [0, 0, 127, 127]
    spectra = np.where(random.random((size, 1)) < 0.3, -1, 1) * np.full((size, BITS), 9)
    spectra[:, :3] = random.integers(-9, 9, (size, 3))
    rows["spectrum"] = pack_spectra(spectra.astype(np.int8))
    rows["spectrum"][whole] = 0
    rows["spectrum"][whole, 0] = rows["band"][whole]
    rows["spectrum"][whole, 15] = random.integers(0, 4, whole.sum())
    return rows


def plain_loop(rows: np.ndarray) -> list[tuple[int, int]]:
    spectra = unpack_spectra(rows["spectrum"])
    found = []
    for post in np.flatnonzero(rows["rank"] == POST):
        for partner in np.flatnonzero(rows["band"] == rows["band"][post]):
            one, other = rows[post], rows[partner]
            lower = other["rank"] < POST
            if post == partner or not (lower or other["order"] <= one["order"]):
                continue
            places = [[post], [partner]]
            if one["box"].any():
                boxes = rows["box"][places]
                if not alignment.agree(
                    boxes[0], spectra[post][None], boxes[1], spectra[partner][None]
                )[0]:
                    continue
            else:
                same = (rows["spectrum"] == one["spectrum"]).all(1)
                alike = same & (rows["rank"] == other["rank"])
                if not same[partner] or other["order"] != rows["order"][alike].min():
                    continue
            found.append((int(one["file"]), int(other["file"])))
    return sorted(found)


@pytest.mark.parametrize("seed", range(4))
def test_small_bands_pair_all_rows_whose_rectangles_agree(seed: int, monkeypatch):
    monkeypatch.setattr(bands, "_PAIRS_AT_ONCE", 300)
    rows = small_bands(seed)
    expected = plain_loop(rows)
    assert len(expected) > 300
    assert pairs_of(bands.meetings(rows)) == expected
    shuffled = np.random.default_rng(seed).permutation(rows)
    assert pairs_of(bands.meetings(shuffled)) == expected


def test_a_band_of_one_row_has_no_pairs():
    rows = small_bands(0)
    assert not len(bands.meetings(rows[:1])) and not len(bands.meetings(rows[:0]))


def test_the_largest_of_the_small_bands_is_compared_whole(monkeypatch):
    monkeypatch.setattr(bands, "CELL", 64)
    rows = bands_benchmark.band(64, 1, seed=0).rows
    expected = plain_loop(rows)
    assert max(collections.Counter(post for post, _ in expected).values()) > bands.NEAREST
    assert pairs_of(bands.meetings(rows)) == expected


@pytest.mark.slow
def test_copies_meet_in_a_large_band(large):
    met = bands.meetings(large.rows)
    found = bands_benchmark.found(large, met)
    assert found[~large.hard].mean() >= 0.96 and found[large.hard].mean() >= 0.85
    assert len(met) <= 4 * SIZE  # false candidates are few, however large the band
    order = large.rows["order"]
    assert (order[met["partner"]["file"]] < order[met["post"]["file"]]).all()
    assert len(set(pairs_of(met))) == len(met)


@pytest.mark.slow
def test_pairs_of_a_large_band_do_not_depend_on_the_order_of_rows():
    rows = bands_benchmark.band(2000, 1, seed=4).rows
    rows["order"] //= 50  # many begin alike
    expected = pairs_of(bands.meetings(rows))
    shuffled = np.random.default_rng(0).permutation(rows)
    assert pairs_of(bands.meetings(shuffled)) == expected


@pytest.mark.slow
def test_posts_of_a_large_band_meet_photos_of_lower_rank(large):
    rows = large.rows.copy()
    rows["rank"][large.earlier] = 0
    # Those of lower rank are met whatever their order.
    rows["order"][large.earlier] = 2**63
    met = bands.meetings(rows)
    found = bands_benchmark.found(large, met)
    assert found[~large.hard].mean() >= 0.96 and found[large.hard].mean() >= 0.85
    assert (rows["rank"][met["post"]["file"]] == POST).all()


@pytest.mark.slow
def test_each_of_many_copies_in_a_large_band_meets_an_earlier_one():
    """So only the first is kept, wherever it is, although copies fill many cells."""
    rows, random = bands_benchmark.band(4000, 1, seed=5).rows, np.random.default_rng(0)
    copies = random.permutation(len(rows))[:1500]
    spectra = unpack_spectra(rows["spectrum"][copies[:1]]).repeat(len(copies), 0)
    spectra += random.integers(-1, 2, spectra.shape).astype(np.int8)
    rows["spectrum"][copies] = pack_spectra(np.clip(spectra, -31, 31))
    rows["box"][copies] = rows["box"][copies[0]]
    met = bands.meetings(rows)
    among = np.isin(met["post"]["file"], copies) & np.isin(met["partner"]["file"], copies)
    alone = set(copies.tolist()) - set(met["post"]["file"][among].tolist())
    first = copies[np.argmin(rows["order"][copies])]
    assert first in alone and len(alone) <= 5
