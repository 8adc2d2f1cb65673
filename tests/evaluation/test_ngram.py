import math
import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from catmaps.errors import UserError
from catmaps.evaluation.ngram import NGramModel, markov_text


class NaiveWittenBell:
    """The definition, with dictionaries and recursion."""

    def __init__(self, texts: list[list[int]], order: int, alphabet: int) -> None:
        self.order, self.alphabet = order, alphabet
        self.after: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for text in texts:
            for i, symbol in enumerate(text):
                for k in range(min(order - 1, i) + 1):
                    self.after[tuple(text[i - k : i])][symbol] += 1

    def probability(self, symbol: int, context: tuple[int, ...]) -> float:
        shorter = self.probability(symbol, context[1:]) if context else 1 / self.alphabet
        seen = self.after.get(context)
        if not seen:
            return shorter
        return (seen[symbol] + len(seen) * shorter) / (seen.total() + len(seen))

    def bits(self, text: list[int]) -> list[float]:
        contexts = [tuple(text[max(0, i - self.order + 1) : i]) for i in range(len(text))]
        return [-math.log2(self.probability(c, h)) for c, h in zip(text, contexts, strict=True)]


def random_texts(rng: np.random.Generator, alphabet: int, lengths: tuple[int, ...]) -> list[np.ndarray]:
    """Texts with structure: mostly the next symbol round the alphabet, sometimes any."""
    texts = []
    for length in lengths:
        steps = np.where(rng.random(length) < 0.7, 1, rng.integers(alphabet, size=length))
        texts.append(np.cumsum(steps) % alphabet)
    return texts


@pytest.mark.parametrize(("order", "alphabet"), [(1, 4), (2, 3), (4, 5), (6, 27), (6, 256)])
def test_equals_the_dictionary_definition(order: int, alphabet: int) -> None:
    rng = np.random.default_rng(order)
    train = random_texts(rng, alphabet, (60, 1, 2, 200, 37))
    held = random_texts(rng, alphabet, (50, 1, 80, 3))
    model = NGramModel.fit(train, order, alphabet)
    naive = NaiveWittenBell([text.tolist() for text in train], order, alphabet)
    expected = [bits for text in held for bits in naive.bits(text.tolist())]
    np.testing.assert_allclose(model.bits(held), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64])
def test_any_integer_type_gives_the_same_bits(dtype: type[np.integer]) -> None:
    text = np.random.default_rng(0).integers(27, size=300)
    expected = NGramModel.fit(text, 5, 27).bits(text)
    np.testing.assert_array_equal(NGramModel.fit(text.astype(dtype), 5, 27).bits(text.astype(dtype)), expected)


@pytest.mark.parametrize("alphabet", [5, 27, 256])
def test_is_a_distribution_after_any_context(alphabet: int) -> None:
    rng = np.random.default_rng(1)
    texts = random_texts(rng, alphabet, (400, 300))
    model = NGramModel.fit(texts, 6, alphabet)
    seen = [texts[0][i : i + n] for i in range(40) for n in range(7)]
    unseen = [rng.integers(alphabet, size=n) for n in (1, 2, 3, 5, 8) for _ in range(20)]
    for context in seen + unseen:
        law = model.next_symbol_law(context)
        assert law.min() > 0
        assert law.sum() == pytest.approx(1.0, abs=1e-12)


def test_next_symbol_law_is_what_bits_uses() -> None:
    rng = np.random.default_rng(2)
    text = rng.integers(4, size=200)
    model = NGramModel.fit(text, 3, 4)
    held = rng.integers(4, size=30)
    expected = [-np.log2(model.next_symbol_law(held[:i])[held[i]]) for i in range(len(held))]
    np.testing.assert_allclose(model.bits(held), expected, rtol=1e-12)


def test_contexts_do_not_cross_texts() -> None:
    apart = NGramModel.fit([np.array([0, 1]), np.array([2, 0])], 2, 3)
    together = NGramModel.fit(np.array([0, 1, 2, 0]), 2, 3)
    assert apart.tables[1].grams.tolist() == [1, 6]  # 01 and 20, not 12
    assert together.tables[1].grams.tolist() == [1, 5, 6]
    one, two = np.array([0, 1, 2]), np.array([1, 1])
    expected = np.concatenate([apart.bits(one), apart.bits(two)])
    np.testing.assert_array_equal(apart.bits([one, two]), expected)


def test_sorting_and_dense_counting_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    text = np.random.default_rng(3).integers(27, size=5000)
    dense = NGramModel.fit(text, 3, 27)
    monkeypatch.setattr("catmaps.evaluation.ngram.DENSE_CELLS", 0)
    for one, other in zip(dense.tables, NGramModel.fit(text, 3, 27).tables, strict=True):
        np.testing.assert_array_equal(one.grams, other.grams)
        np.testing.assert_array_equal(one.counts, other.counts)


def test_mean_weighs_characters_and_stderr_is_of_texts() -> None:
    rng = np.random.default_rng(4)
    model = NGramModel.fit(rng.integers(3, size=100), 2, 3)
    equal = [rng.integers(3, size=50) for _ in range(20)]
    each = np.array([model.bits(text).mean() for text in equal])
    result = model.bits_per_char(equal)
    assert result.mean == pytest.approx(each.mean())
    assert result.stderr == pytest.approx(each.std(ddof=1) / np.sqrt(20))
    ragged = [equal[0], equal[1][:10]]
    assert model.bits_per_char(ragged).mean == pytest.approx(model.bits(ragged).mean())
    assert math.isnan(model.bits_per_char(equal[0]).stderr)


def test_the_entropy_of_a_known_chain_is_found() -> None:
    rng = np.random.default_rng(5)
    law = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    text = [0]
    draws = rng.random(40_000)
    for u in draws:
        text.append(int(np.searchsorted(np.cumsum(law[text[-1]]), u)))
    train, held = np.array(text[:30_000]), np.array(text[30_000:])
    stationary = np.linalg.matrix_power(law, 200)[0]
    entropy = -(stationary[:, None] * law * np.log2(law)).sum()
    assert NGramModel.fit(train, 3, 3).bits_per_char(held).mean == pytest.approx(entropy, abs=0.02)


@pytest.mark.parametrize("context", [0, 1, 2])
def test_markov_text_has_the_chains_own_law(context: int) -> None:
    rng = np.random.default_rng(6)
    train = random_texts(rng, 3, (3000,))[0]
    model = NGramModel.fit(train, 4, 3)
    drawn = markov_text(model, context, (3000, 60), rng)
    assert drawn.shape == (3000, 60)
    laws = []
    for table in (model.tables[context], NGramModel.fit(list(drawn), context + 1, 3).tables[context]):
        assert table.grams.tolist() == list(range(3 ** (context + 1)))
        laws.append(table.counts.reshape(-1, 3) / table.totals[:, None])
    np.testing.assert_allclose(laws[1], laws[0], atol=0.015)


def test_markov_text_writes_only_ngrams_of_the_training_text() -> None:
    rng = np.random.default_rng(7)
    train = random_texts(rng, 27, (2000,))[0]
    model = NGramModel.fit(train, 4, 27)
    drawn = markov_text(model, 3, (50, 100), rng)
    seen = {tuple(train[i : i + 4].tolist()) for i in range(len(train) - 3)}
    written = [tuple(row[i : i + 4].tolist()) for row in drawn for i in range(97)]
    unseen = [gram for gram in written if gram not in seen]
    ends = [gram for gram in unseen if gram[:3] == tuple(train[-3:].tolist())]
    assert len(unseen) == len(ends)  # only a dead end, the last context of the training text, may write others


def test_markov_text_survives_a_dead_end_and_is_seeded() -> None:
    model = NGramModel.fit(np.array([0, 0, 0, 1, 2]), 3, 3)  # nothing follows 1 2
    one = markov_text(model, 2, (5, 40), np.random.default_rng(0))
    np.testing.assert_array_equal(one, markov_text(model, 2, (5, 40), np.random.default_rng(0)))
    assert set(one.ravel().tolist()) == {0, 1, 2}


def test_mistakes_are_named() -> None:
    text = np.arange(5)
    with pytest.raises(UserError, match=r"outside \[0, 4\)"):
        NGramModel.fit(text, 2, 4)
    with pytest.raises(UserError, match="order 14"):
        NGramModel.fit(text, 14, 27)
    with pytest.raises(UserError, match="too short"):
        NGramModel.fit(text, 6, 5)
    with pytest.raises(UserError, match="empty"):
        NGramModel.fit([], 2, 5)
    with pytest.raises(UserError, match="context 2"):
        markov_text(NGramModel.fit(text, 2, 5), 2, (1, 5), np.random.default_rng(0))


def test_a_million_characters_take_seconds() -> None:
    text = np.random.default_rng(8).integers(27, size=1_000_000)
    start = time.perf_counter()
    NGramModel.fit(text, 4, 27).bits_per_char(text)
    assert time.perf_counter() - start < 20  # about 1 s; the room is for busy machines
