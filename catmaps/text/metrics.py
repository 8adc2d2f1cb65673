"""Statistics of sampled text that need no model: entropies, distinct n-grams, repetition, valid words.

Functions of `text` measure **one** text; functions of `texts` say in their name whether they average such
values (`mean_...`: a `Mean` with its standard error over texts) or throw all texts together (`pooled_...`).
The two differ: pooling hides texts that repeat themselves, averaging hides texts that repeat each other.
Entropies and shares of distinct n-grams fall or rise with the length of a text: compare them between texts of
one length only.
"""

import math
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, Real

from catmaps.errors import UserError


@runtime_checkable
class TextEncoder(Protocol):
    """Turns a text into token ids, such as a BPE tokeniser."""

    def encode(self, text: str, /) -> Integer[np.ndarray, "l"]:
        """Ids of the text's tokens."""
        ...


class Mean(NamedTuple):
    """An average over texts and its standard error (nan for a single text)."""

    mean: float
    stderr: float


class Diversity(NamedTuple):
    """What tells of a text that repeats itself: each measured on single texts, and averaged over them."""

    token_entropy: Mean  # nats, of the encoder's ids
    distinct_1: Mean
    distinct_2: Mean
    distinct_3: Mean
    repetition_rate: Mean
    compression_ratio: Mean


def mean_of(values: Sequence[float] | Real[np.ndarray, "n"]) -> Mean:
    """The average of one value a text.

    Raises:
        UserError: If there are none.
    """
    if len(values) == 0:
        raise UserError("there are no texts to measure")
    array = np.asarray(values, dtype=float)
    stderr = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return Mean(float(array.mean()), float(stderr))


def mean_over(texts: Sequence[str], statistic: Callable[[str], float]) -> Mean:
    """Average a statistic of one text over texts. Raises UserError if there are none."""
    return mean_of([statistic(text) for text in texts])


def ratio_of(
    numerators: Sequence[float] | Real[np.ndarray, "n"], denominators: Sequence[float] | Real[np.ndarray, "n"]
) -> Mean:
    """Sum of the numerators / sum of the denominators, each text giving one of both.

    The standard error is that of a ratio estimate over texts taken as independent draws (linearised; nan for a single
    text). Texts with denominator 0 change nothing.

    Raises:
        UserError: If the denominators sum to 0.
    """
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if below.sum() == 0:
        raise UserError("there is nothing to measure: every text is empty")
    ratio, num = above.sum() / below.sum(), np.count_nonzero(below)
    residuals = np.square(above - ratio * below).sum()
    stderr = math.sqrt(num / (num - 1) * residuals) / below.sum() if num > 1 else math.nan
    return Mean(float(ratio), float(stderr))


def histogram_entropy(ids: Integer[np.ndarray, "l"]) -> float:
    """Entropy in nats of the unigram histogram of the ids; 0 if there are none."""
    if len(ids) == 0:
        return 0.0
    counts = np.unique(ids, return_counts=True)[1]
    share = counts / len(ids)
    return max(0.0, float(-(share * np.log(share)).sum()))


def letter_entropy(text: str) -> float:
    """Entropy in nats of the characters of one text."""
    return histogram_entropy(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32))


def mean_letter_entropy(texts: Sequence[str]) -> Mean:
    """Entropy in nats of the characters of each text, averaged over texts."""
    return mean_over(texts, letter_entropy)


def pooled_letter_entropy(texts: Sequence[str]) -> float:
    """Entropy in nats of the characters of all texts together."""
    return letter_entropy("".join(texts))


def mean_token_entropy(texts: Sequence[str], encoder: TextEncoder) -> Mean:
    """Entropy in nats of the token ids of each text, averaged over texts: low where texts repeat themselves.

    The texts are re-tokenised, so that models with different vocabularies can be compared.
    """
    return mean_over(texts, lambda text: histogram_entropy(encoder.encode(text)))


def mean_id_entropy(sequences: Sequence[Integer[np.ndarray, "_"]]) -> Mean:
    """Entropy in nats of the ids of each sequence, averaged over sequences: the "entropy" of diffusion papers.

    With a model's own ids it compares only with models of the same vocabulary.
    """
    return mean_of([histogram_entropy(ids) for ids in sequences])


def distinct_ngrams(text: str, n: int) -> float:
    """Distinct-n: different word n-grams / word n-grams of one text, words being split at white space.

    1 where no n-gram occurs twice; also 1 for a text of fewer than n words, which repeats nothing.
    """
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def mean_distinct_ngrams(texts: Sequence[str], n: int) -> Mean:
    """Distinct-n of each text, averaged over texts."""
    return mean_over(texts, lambda text: distinct_ngrams(text, n))


def repetition_rate(text: str, window: int = 16) -> float:
    """Share of words that occur among the `window` words before them; 0 for a text without words.

    The rep/l of Welleck et al. 2019 (arXiv:1908.04319), on words.
    """
    words = text.split()
    last: dict[str, int] = {}
    repeats = 0
    for i, word in enumerate(words):
        repeats += i - last.get(word, -window - 1) <= window
        last[word] = i
    return repeats / len(words) if words else 0.0


def mean_repetition_rate(texts: Sequence[str], window: int = 16) -> Mean:
    """Repetition rate of each text, averaged over texts."""
    return mean_over(texts, lambda text: repetition_rate(text, window))


def compression_ratio(text: str) -> float:
    """Bytes of one text after zlib (level 9) / before; nan for the empty text.

    Above 1 for texts of a few words, since zlib adds about ten bytes: compare texts of one length.
    """
    raw = text.encode()
    return len(zlib.compress(raw, 9)) / len(raw) if raw else math.nan


def mean_compression_ratio(texts: Sequence[str]) -> Mean:
    """Compression ratio of each text that is not empty, averaged over texts: low where texts repeat themselves."""
    return mean_over([text for text in texts if text], compression_ratio)


def diversity(texts: Sequence[str], encoder: TextEncoder) -> Diversity:
    """All statistics that tell of texts which repeat themselves. Raises UserError if there are no texts."""
    return Diversity(
        token_entropy=mean_token_entropy(texts, encoder),
        distinct_1=mean_distinct_ngrams(texts, 1),
        distinct_2=mean_distinct_ngrams(texts, 2),
        distinct_3=mean_distinct_ngrams(texts, 3),
        repetition_rate=mean_repetition_rate(texts),
        compression_ratio=mean_compression_ratio(texts),
    )


def pooled_compression_ratio(texts: Sequence[str]) -> float:
    """Bytes after zlib (level 9) / bytes before, of all texts joined by line ends.

    zlib looks back 32 KiB, so this also falls where texts repeat each other. Raises UserError without any
    text.
    """
    raw = "\n".join(texts).encode()
    if not raw:
        raise UserError("there are no texts to measure")
    return len(zlib.compress(raw, 9)) / len(raw)


def pooled_valid_word_rate(texts: Sequence[str], words: Collection[str]) -> float:
    """Share of the words of all texts that occur in the word list (a set); 0 if the texts have no words.

    Words cut at the ends of a text count too: compare texts of one length.
    """
    said = [word for text in texts for word in text.split()]
    return sum(word in words for word in said) / len(said) if said else 0.0


def mean_valid_word_rate(texts: Sequence[str], words: Collection[str]) -> Mean:
    """As `pooled_valid_word_rate` (all words weigh the same), with the standard error over texts.

    Raises UserError if the texts have no words.
    """
    said = [text.split() for text in texts]
    valid = np.array([sum(word in words for word in own) for own in said])
    return ratio_of(valid, np.array([len(own) for own in said]))


def word_list(texts: Sequence[str], min_count: int = 1) -> frozenset[str]:
    """The words that occur at least `min_count` times in the texts."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in text.split():
            counts[word] = counts.get(word, 0) + 1
    return frozenset(word for word, count in counts.items() if count >= min_count)
