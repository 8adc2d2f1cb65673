"""How far two sets of texts are apart as distributions: a divergence frontier over clusters of their features.

The texts of both sets become vectors, both sets' vectors are cut into clusters together, and with the shares P and Q of
the two sets in the clusters and R_w = w P + (1 - w) Q,

    frontier(w) = (exp(-c KL(Q | R_w)), exp(-c KL(P | R_w))),   0 < w < 1,   c = 5,

runs from (1, 0) to (0, 1). The area under it is 1 for equal shares and 0.004 where no cluster is shared. Text that P
writes and Q does not costs in one coordinate, text of Q that P lacks in the other. Source: Pillutla et al. 2021,
arXiv:2102.01454 (MAUVE), whose frontier, c and number of clusters these are; the features differ.

Caveats. The area is no absolute number: it falls with fewer texts (two halves of one corpus do not reach 1), and
depends on the length of the texts, on the number of clusters and on the features. Compare areas of one setting only,
beside that of real text against other real text. Both sets must hold equally many texts. The standard error is that of
redrawing texts within the clusters found; it leaves out what other clusters would say, hence several clusterings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64, Real

from catmaps.errors import UserError

SCALE = 5.0
GRID = 101  # points of the frontier
TEXTS_PER_CLUSTER = 20  # of both sets together
EXPLAINED = 0.9  # share of the variance that the kept directions hold
MOST_DIRECTIONS = 64
HASHED = 4096
LONGEST_NGRAM = 4


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Nearness of two sets of texts.

    Attributes:
        area: Under the frontier, averaged over clusterings: 1 is equal.
        stderr: Over texts, by the bootstrap, clusters held fixed.
        frontier: Points of the first clustering's frontier.
        texts, clusters: Texts in each set, and clusters.
    """

    area: float
    stderr: float
    frontier: Float64[np.ndarray, "w 2"]
    texts: int
    clusters: int


def divergence(
    p: Real[np.ndarray, "n d"],
    q: Real[np.ndarray, "m d"],
    *,
    clusters: int | None = None,
    clusterings: int = 5,
    resamples: int = 100,
    seed: int = 0,
) -> Divergence:
    """The frontier between two sets of vectors, one row a text.

    Rows are brought to length 1, then projected on the principal directions of both sets together.

    Args:
        p: Of the samples.
        q: Of real text, as many.
        clusters: None: one for every 20 vectors, at least 2 and at most 500.
        clusterings: How many, from different starts.
        resamples: Of the bootstrap; below 2 there is no standard error.
        seed: Of all randomness.

    Raises:
        UserError: If the sets are not of one size, or hold fewer than 10 texts each.
    """
    num = len(p)
    if num != len(q) or num < 10:
        raise UserError(
            f"a divergence compares equally many texts, at least 10 of each, not {num} with {len(q)}: draw as many"
        )
    clusters = clusters or min(500, max(2, 2 * num // TEXTS_PER_CLUSTER))
    rng = np.random.default_rng(seed)
    vectors = principal(np.concatenate([p, q]).astype(np.float64))
    labels = [kmeans(vectors, clusters, rng) for _ in range(clusterings)]
    shares = [(_shares(row[:num], clusters), _shares(row[num:], clusters)) for row in labels]
    again = np.zeros(resamples)
    for i in range(resamples):
        of_p, of_q = rng.integers(num, size=num), rng.integers(num, size=num)
        drawn = [(_shares(row[of_p], clusters), _shares(row[num + of_q], clusters)) for row in labels]
        again[i] = np.mean([area(frontier(*pair)) for pair in drawn])
    return Divergence(
        area=float(np.mean([area(frontier(*pair)) for pair in shares])),
        stderr=float(again.std(ddof=1)) if resamples > 1 else float("nan"),
        frontier=frontier(*shares[0]),
        texts=num,
        clusters=clusters,
    )


def frontier(p: Float64[np.ndarray, "k"], q: Float64[np.ndarray, "k"]) -> Float64[np.ndarray, "w 2"]:
    """Points (exp(-c KL(q|r)), exp(-c KL(p|r))) over the mixtures r of p and q, from (1, 0) to (0, 1)."""
    weight = np.linspace(0, 1, GRID)[1:-1, None]
    mixed = weight * p + (1 - weight) * q
    points = np.exp(-SCALE * np.stack([_kl(q, mixed), _kl(p, mixed)], 1))
    return np.concatenate([[[1.0, 0.0]], points, [[0.0, 1.0]]])


def area(points: Float64[np.ndarray, "w 2"]) -> float:
    """Under a frontier whose first coordinate falls and second rises: trapezoids."""
    x, y = points[::-1].T
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def _kl(p: Float64[np.ndarray, "k"], mixed: Float64[np.ndarray, "w k"]) -> Float64[np.ndarray, "w"]:
    there = p > 0
    return (p[there] * np.log(p[there] / mixed[:, there])).sum(1)


def _shares(labels: Int64[np.ndarray, "n"], clusters: int) -> Float64[np.ndarray, "k"]:
    """Shares of the clusters, half a text added to each: an empty cluster may be chance (Krichevsky, Trofimov)."""
    counts = np.bincount(labels, minlength=clusters) + 0.5
    return counts / counts.sum()


def principal(vectors: Float64[np.ndarray, "n d"]) -> Float64[np.ndarray, "n k"]:
    """Unit vectors, projected on the directions that hold 90% of their variance, 64 at most."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(lengths > 0, lengths, 1)
    left, scale, _ = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    held = np.cumsum(np.square(scale))
    keep = min(MOST_DIRECTIONS, int(np.searchsorted(held, EXPLAINED * held[-1])) + 1)
    return left[:, :keep] * scale[:keep]


def kmeans(
    vectors: Float[np.ndarray, "n d"], clusters: int, rng: np.random.Generator, *, rounds: int = 50
) -> Int64[np.ndarray, "n"]:
    """Labels 0 ... clusters - 1 by Lloyd's iteration from a k-means++ start.

    A cluster that runs empty takes the vector farthest from its centre. Source of the start: Arthur and
    Vassilvitskii 2007.
    """
    centres = [vectors[rng.integers(len(vectors))]]
    nearest = np.square(vectors - centres[0]).sum(1)
    while len(centres) < clusters:
        total = nearest.sum()
        chance = nearest / total if total > 0 else None
        centres.append(vectors[rng.choice(len(vectors), p=chance)])
        nearest = np.minimum(nearest, np.square(vectors - centres[-1]).sum(1))
    middle, labels = np.stack(centres), np.full(len(vectors), -1)
    for _ in range(rounds):
        distance = np.square(middle).sum(1) - 2 * vectors @ middle.T  # but for the vectors' own lengths
        moved = distance.argmin(1)
        if (moved == labels).all():
            break
        labels = moved
        far = np.argsort(-(distance[np.arange(len(labels)), labels] + np.square(vectors).sum(1)))
        for empty in np.setdiff1d(np.arange(clusters), labels):
            labels[far[0]], far = empty, far[1:]
        for k in np.unique(labels):
            middle[k] = vectors[labels == k].mean(0)
    return labels.astype(np.int64)


def ngram_vectors(texts: Sequence[str], dims: int = HASHED) -> Float64[np.ndarray, "n {dims}"]:
    """Hashed counts of the character n-grams (n = 1 ... 4) of texts, as square roots: no model, no vocabulary.

    The hash is a fixed polynomial of the code points, the same on every machine.
    """
    out = np.zeros((len(texts), dims))
    for row, text in zip(out, texts, strict=True):
        codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32).astype(np.uint64)
        key = np.zeros(len(codes), dtype=np.uint64)
        for n in range(1, LONGEST_NGRAM + 1):
            key = (key[:-1] if n > 1 else key) * np.uint64(0x9E3779B97F4A7C15) + codes[n - 1 :] + np.uint64(n)
            slot = (key ^ (key >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32)
            row += np.bincount((slot % np.uint64(dims)).astype(np.int64), minlength=dims)
    return np.sqrt(out)
