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
from jaxtyping import Integer

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


def mean_over(texts: Sequence[str], statistic: Callable[[str], float]) -> Mean:
    """Average a statistic of one text over texts.

    Raises:
        UserError: If there are no texts.
    """
    if not texts:
        raise UserError("there are no texts to measure")
    values = np.array([statistic(text) for text in texts])
    stderr = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(float(values.mean()), float(stderr))


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


def word_list(texts: Sequence[str], min_count: int = 1) -> frozenset[str]:
    """The words that occur at least `min_count` times in the texts."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in text.split():
            counts[word] = counts.get(word, 0) + 1
    return frozenset(word for word, count in counts.items() if count >= min_count)
