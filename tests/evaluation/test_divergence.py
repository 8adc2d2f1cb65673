"""Divergence frontiers: closed forms, equal and disjoint sets, mixtures; the clusters under them."""

import math
from itertools import pairwise

import numpy as np
import pytest

from catmaps.errors import UserError
from catmaps.evaluation.divergence import GRID, area, divergence, frontier, kmeans, ngram_vectors, principal


def cloud(num: int, centre: float, seed: int, dims: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, dims)) + centre


def near(p: np.ndarray, q: np.ndarray) -> float:
    return divergence(p, q, clusterings=2, resamples=0).area


def test_equal_shares_have_area_one() -> None:
    shares = np.array([0.5, 0.3, 0.2])
    points = frontier(shares, shares)
    assert points.shape == (GRID, 2)
    np.testing.assert_allclose(points[1:-1], 1.0)
    assert area(points) == pytest.approx(1.0)


def test_disjoint_shares_have_the_area_of_their_closed_form() -> None:
    points = frontier(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    w = np.linspace(0, 1, GRID)
    np.testing.assert_allclose(points, np.stack([(1 - w) ** 5, w**5], 1), atol=1e-12)
    # integral of w^5 d(1 - (1-w)^5) = 5 B(6, 5)
    assert area(points) == pytest.approx(5 * math.gamma(6) * math.gamma(5) / math.gamma(11), rel=1e-2)


def test_a_point_of_the_frontier_by_hand() -> None:
    p, q = np.array([0.75, 0.25]), np.array([0.25, 0.75])
    middle = frontier(p, q)[GRID // 2]
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert middle == pytest.approx([math.exp(-5 * kl)] * 2)
    assert area(frontier(p, q)) == pytest.approx(area(frontier(q, p)))


def test_equal_sets_are_near_one_and_strangers_near_zero() -> None:
    one = cloud(300, 0.0, 0)
    halves = divergence(one, cloud(300, 0.0, 1), clusterings=2, resamples=20)
    assert near(one, one) > 0.99
    assert halves.area > 0.9
    assert near(one, cloud(300, 6.0, 2)) < 0.03
    assert (halves.texts, halves.clusters) == (300, 30)
    assert 0 < halves.stderr < 0.05
    assert np.isnan(divergence(one, one, resamples=1).stderr)


def test_area_falls_as_strangers_are_mixed_in() -> None:
    real, own, strangers = cloud(400, 0.0, 0), cloud(400, 0.0, 1), cloud(400, 4.0, 2)
    areas = [near(np.concatenate([own[n:], strangers[:n]]), real) for n in (0, 50, 100, 200, 400)]
    assert all(a > b + 0.02 for a, b in pairwise(areas))


def test_a_set_that_lacks_a_mode_and_one_that_has_too_many_are_both_caught() -> None:
    both = np.concatenate([cloud(150, 0.0, 0), cloud(150, 5.0, 1)])
    again = np.concatenate([cloud(150, 0.0, 2), cloud(150, 5.0, 3)])
    half = cloud(300, 0.0, 4)
    assert near(half, both) < 0.8 * near(again, both)
    assert near(both, half) < 0.8 * near(again, both)


def test_standard_error_is_that_of_other_texts() -> None:
    pairs = [(cloud(100, 0.3, 2 * i), cloud(100, 0.0, 2 * i + 1)) for i in range(20)]
    drawn = [divergence(*pair, clusterings=1, resamples=30) for pair in pairs]
    spread = np.std([one.area for one in drawn], ddof=1)
    assert 0.5 < np.mean([one.stderr for one in drawn]) / spread < 2


def test_everything_hangs_on_the_seed_only() -> None:
    p, q = cloud(60, 0.0, 0), cloud(60, 1.0, 1)
    first, again, other = (divergence(p, q, clusterings=1, resamples=5, seed=seed) for seed in (0, 0, 1))
    assert (first.area, first.stderr) == (again.area, again.stderr)
    assert first.area != other.area


def test_sets_of_unequal_size_are_refused() -> None:
    with pytest.raises(UserError, match="equally many texts"):
        divergence(cloud(20, 0.0, 0), cloud(21, 0.0, 0))
    with pytest.raises(UserError, match="at least 10"):
        divergence(cloud(9, 0.0, 0), cloud(9, 0.0, 0))


def test_kmeans_finds_separate_clouds() -> None:
    vectors = np.concatenate([cloud(30, 0.0, 0), cloud(30, 20.0, 1), cloud(30, -20.0, 2)])
    labels = kmeans(vectors, 3, np.random.default_rng(0))
    assert all(len(set(labels[i : i + 30])) == 1 for i in (0, 30, 60))
    assert set(labels) == {0, 1, 2}
    assert kmeans(np.zeros((5, 2)), 3, np.random.default_rng(0)).max() < 3  # fewer different vectors than clusters


def test_principal_directions_keep_distances() -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 3)) @ np.random.default_rng(1).normal(size=(3, 30))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    kept = principal(vectors)
    assert kept.shape[1] <= 3
    far = np.linalg.norm(unit[:, None] - unit, axis=-1)
    assert np.linalg.norm(kept[:, None] - kept, axis=-1) == pytest.approx(far, abs=0.5)
    assert np.isfinite(principal(np.concatenate([vectors, np.zeros((1, 30))]))).all()


def test_ngram_vectors_count_ngrams() -> None:
    first, second, empty = ngram_vectors(["abab", "ab", ""], dims=1 << 16)
    assert np.square(first).sum() == pytest.approx(4 + 3 + 2 + 1)
    assert np.square(second).sum() == pytest.approx(2 + 1)
    assert empty.sum() == 0
    np.testing.assert_allclose(np.square(first)[second > 0], 2)  # a, b and ab, each twice
    assert np.array_equal(ngram_vectors(["Größe 🐟"]), ngram_vectors(["Größe 🐟"]))
    assert (ngram_vectors(["ab"]) != ngram_vectors(["ba"])).any()


def test_ngram_vectors_tell_languages_apart() -> None:
    rng = np.random.default_rng(0)
    cat, kater = (["the", "cat", "sat", "on", "a", "mat"], ["der", "kater", "sah", "einen", "roten", "fisch"])
    sets = [[" ".join(rng.choice(words, 20)) for _ in range(60)] for words in (cat, cat, kater)]
    a, b, c = (ngram_vectors(texts) for texts in sets)
    assert near(a, b) > 0.8
    assert near(a, c) < 0.05
