import math
import zlib

import numpy as np
import pytest
from jaxtyping import Integer

from catmaps.errors import UserError
from catmaps.text import metrics


class WordIds:
    """One id per different word, in order of appearance."""

    def encode(self, text: str) -> Integer[np.ndarray, "l"]:
        words = text.split()
        return np.array([words.index(word) for word in words], dtype=np.int64)


def test_histogram_entropy_of_known_histograms() -> None:
    assert metrics.histogram_entropy(np.array([3, 3, 3])) == 0.0
    assert metrics.histogram_entropy(np.array([], dtype=np.int64)) == 0.0
    assert metrics.histogram_entropy(np.arange(8)) == pytest.approx(math.log(8))
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert metrics.histogram_entropy(np.array([0, 0, 9, 0], dtype=np.uint16)) == pytest.approx(expected)


def test_per_text_and_pooled_letter_entropy_differ_as_their_names_say() -> None:
    texts = ["aaaa", "bbbb"]
    assert metrics.mean_letter_entropy(texts).mean == 0.0
    assert metrics.pooled_letter_entropy(texts) == pytest.approx(math.log(2))


def test_token_entropy_is_of_single_texts() -> None:
    result = metrics.mean_token_entropy(["to be or to", "no no no no"], WordIds())
    first = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert result.mean == pytest.approx(first / 2)
    assert result.stderr == pytest.approx(first / 2)  # two values a, 0: sd / sqrt(2) = a / 2


def test_a_single_text_has_no_standard_error() -> None:
    assert math.isnan(metrics.mean_letter_entropy(["ab"]).stderr)


def test_distinct_ngrams_by_hand() -> None:
    text = "a b a b a"  # pairs ab ba ab ba
    assert metrics.distinct_ngrams(text, 2) == 0.5
    assert metrics.distinct_ngrams(text, 1) == pytest.approx(2 / 5)
    assert metrics.distinct_ngrams(text, 3) == pytest.approx(2 / 3)
    assert metrics.distinct_ngrams("one", 2) == 1.0
    assert metrics.mean_distinct_ngrams([text, "a b c"], 2).mean == 0.75


def test_repetition_looks_back_a_window_only() -> None:
    assert metrics.repetition_rate("a b a b", window=2) == 0.5
    assert metrics.repetition_rate("a b c a", window=2) == 0.0
    assert metrics.repetition_rate("a b c a", window=3) == 0.25
    assert metrics.repetition_rate("", window=3) == 0.0


def test_compression_sees_repeats_between_texts() -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), 500)) for _ in range(4)]
    assert metrics.pooled_compression_ratio([texts[0]] * 4) < 0.4 * metrics.pooled_compression_ratio(texts)


def test_valid_words_and_word_list() -> None:
    train = ["the cat sat", "the dog"]
    assert metrics.word_list(train) == {"the", "cat", "sat", "dog"}
    assert metrics.word_list(train, min_count=2) == {"the"}
    assert metrics.pooled_valid_word_rate(["the qat", " cat cat "], metrics.word_list(train)) == 0.75
    assert metrics.pooled_valid_word_rate(["  "], metrics.word_list(train)) == 0.0


def test_no_texts_is_the_users_mistake() -> None:
    with pytest.raises(UserError):
        metrics.mean_letter_entropy([])
    with pytest.raises(UserError):
        metrics.pooled_compression_ratio([])


def test_means_and_ratios_by_hand() -> None:
    assert metrics.mean_of([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7 / 3)))
    ratio = metrics.ratio_of(
        [1.0, 2.0, 0.0], [2.0, 2.0, 0.0]
    )  # residuals -1/2, 1/2 about 3/4; empty texts do not count
    assert ratio == pytest.approx((0.75, math.sqrt(2 * (0.25 + 0.25)) / 4))
    assert math.isnan(metrics.ratio_of([1.0], [2.0]).stderr)
    for nothing in ([], [0.0, 0.0]):
        with pytest.raises(UserError):
            metrics.ratio_of([0.0] * len(nothing), nothing)
    with pytest.raises(UserError):
        metrics.mean_of([])


def test_id_entropy_is_of_single_sequences() -> None:
    result = metrics.mean_id_entropy([np.array([5, 5, 7, 7]), np.array([1, 1, 1])])
    assert result.mean == pytest.approx(math.log(2) / 2)


def test_compression_of_single_texts() -> None:
    text = "abcdefgh" * 64
    assert metrics.compression_ratio(text) == len(zlib.compress(text.encode(), 9)) / 512
    assert metrics.compression_ratio(text) < 0.1
    assert metrics.compression_ratio("ab") > 1
    assert math.isnan(metrics.compression_ratio(""))
    both = metrics.mean_compression_ratio([text, "", "ab"])
    assert both.mean == pytest.approx((metrics.compression_ratio(text) + metrics.compression_ratio("ab")) / 2)


def test_valid_words_weigh_the_same_in_every_text() -> None:
    words = frozenset({"the", "cat"})
    texts = ["the cat", "a cat sat on", ""]
    rate = metrics.mean_valid_word_rate(texts, words)
    assert rate.mean == metrics.pooled_valid_word_rate(texts, words) == 0.5
    assert rate.stderr == pytest.approx(math.sqrt(2 * (1 + 1)) / 6)


def test_diversity_is_all_of_it() -> None:
    texts = ["a b a b", "a b c d"]
    whole = metrics.diversity(texts, WordIds())
    assert whole.token_entropy == metrics.mean_token_entropy(texts, WordIds())
    assert (whole.distinct_1.mean, whole.distinct_2.mean, whole.distinct_3.mean) == pytest.approx((3 / 4, 5 / 6, 1.0))
    assert whole.repetition_rate.mean == 0.25
    assert whole.compression_ratio == metrics.mean_compression_ratio(texts)
