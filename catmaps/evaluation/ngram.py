"""Character n-gram models: the judges of sampled text, and the Markov chains that serve as controls.

Throughout, a model of **order n counts n-grams**: it conditions on up to n - 1 previous symbols, so order 6
means contexts of up to five characters. A *Markov chain* is named by its context instead: `context=5`
conditions on five symbols and uses the same 6-grams.

Symbols are integers in [0, alphabet): 27 letters, 256 bytes or anything else, as long as alphabet^order <
2^63.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64, Integer

from catmaps.errors import UserError

DENSE_CELLS = 2**24  # up to here counting in a dense array beats sorting


class BitsPerChar(NamedTuple):
    """A cross-entropy in bits per character and its standard error over texts (nan for a single text)."""

    mean: float
    stderr: float


@dataclass(frozen=True)
class NGramTable:
    """The n-grams of one length that occur, sorted, so that those of one context lie side by side.

    An n-gram is the number whose digits, base `alphabet`, are its symbols; its context is that number without
    the last digit. Context i owns the rows starts[i] ... starts[i + 1] - 1.
    """

    grams: Int64[np.ndarray, "g"]
    counts: Int64[np.ndarray, "g"]
    contexts: Int64[np.ndarray, "h"]
    starts: Int64[np.ndarray, "h"]
    totals: Int64[np.ndarray, "h"]  # occurrences of the context (with a symbol after it)
    types: Int64[np.ndarray, "h"]  # different symbols seen after it

    @classmethod
    def build(cls, grams: Int64[np.ndarray, "g"], counts: Int64[np.ndarray, "g"], alphabet: int) -> "NGramTable":
        """Index sorted n-grams by their context."""
        context_of = grams // alphabet
        starts = np.flatnonzero(np.diff(context_of, prepend=-1))
        totals = np.add.reduceat(counts, starts)
        types = np.diff(starts, append=len(grams))
        return cls(grams, counts, context_of[starts], starts, totals, types)


@dataclass(frozen=True)
class NGramModel:
    """An interpolated character n-gram model with Witten-Bell smoothing.

    With N(h) the number of times that context h was followed by anything, N(hc) by c, T(h) the number of
    different symbols that followed it, and h' the context without its oldest symbol,

        P(c | h) = (N(hc) + T(h) P(c | h')) / (N(h) + T(h)),     P(c | h) = P(c | h')   if N(h) = 0,

    and below the empty context lies the uniform law 1 / alphabet. So P(. | h) sums to 1 for every h, seen or
    unseen, and no symbol has probability 0.

    Source: Witten and Bell 1991; interpolated form as in Chen and Goodman 1998, section 2.5.
    """

    order: int
    alphabet: int
    tables: tuple[NGramTable, ...]  # of 1-grams, 2-grams, ... order-grams

    @classmethod
    def fit(
        cls, ids: Integer[np.ndarray, "l"] | Sequence[Integer[np.ndarray, "_"]], order: int, alphabet: int
    ) -> "NGramModel":
        """Count the n-grams of one text, or of several: no n-gram crosses from one text into the next.

        Args:
            ids: Symbols in [0, alphabet), one array or one array per text.
            order: Length of the longest n-gram, >= 1: contexts have up to order - 1 symbols.
            alphabet: Number of symbols.

        Raises:
            UserError: If there is no text, an id is outside [0, alphabet), or alphabet^order >= 2^63.
        """
        if order < 1 or alphabet < 1 or alphabet**order >= 2**63:
            raise UserError(f"order {order} over {alphabet} symbols does not fit a 63-bit key: choose another order")
        symbols, offsets = _concatenate(ids, alphabet)
        tables = []
        for n, keys in _keys_by_length(symbols, order, alphabet):
            grams, counts = _count(keys[offsets >= n - 1], alphabet**n)
            if len(grams) == 0:
                raise UserError(f"the texts are too short for an n-gram model: none has {n} characters")
            tables.append(NGramTable.build(grams, counts, alphabet))
        return cls(order, alphabet, tuple(tables))

    def bits(self, texts: Integer[np.ndarray, "l"] | Sequence[Integer[np.ndarray, "_"]]) -> Float[np.ndarray, "total"]:
        """-log2 P of every symbol of the texts (joined into one array), each given up to order - 1 before it.

        The first symbols of every text have shorter contexts. Raises as `fit` does.
        """
        symbols, offsets = _concatenate(texts, self.alphabet)
        probability = np.full(len(symbols), 1.0 / self.alphabet)
        for n, keys in _keys_by_length(symbols, self.order, self.alphabet):
            inside = np.flatnonzero(offsets >= n - 1)
            probability[inside] = self._interpolate(n, keys[inside], probability[inside])
        return -np.log2(probability)

    def bits_per_char(self, texts: Integer[np.ndarray, "l"] | Sequence[Integer[np.ndarray, "_"]]) -> BitsPerChar:
        """Cross-entropy of the texts under the model: all their bits over all their characters.

        The standard error is that of a ratio estimate over texts taken as independent draws.
        """
        bits = self.bits(texts)
        lengths = np.array([len(text) for text in _as_texts(texts)])
        mean, num = bits.sum() / len(bits), len(lengths)
        if num < 2:
            return BitsPerChar(float(mean), float("nan"))
        cumulative = np.concatenate([[0.0], np.cumsum(bits)])
        ends = np.cumsum(lengths)
        residuals = cumulative[ends] - cumulative[ends - lengths] - mean * lengths
        stderr = np.sqrt(num / (num - 1) * np.square(residuals).sum()) / len(bits)
        return BitsPerChar(float(mean), float(stderr))

    def next_symbol_law(self, context: Integer[np.ndarray, "h"]) -> Float[np.ndarray, "v"]:
        """P(. | context), all symbols, using the last order - 1 of the context."""
        history = context[max(len(context) - self.order + 1, 0) :]
        symbols = np.arange(self.alphabet)
        probability = np.full(self.alphabet, 1.0 / self.alphabet)
        for n in range(1, len(history) + 2):
            key = 0
            for symbol in history[len(history) - n + 1 :]:
                key = key * self.alphabet + int(symbol)
            probability = self._interpolate(n, key * self.alphabet + symbols, probability)
        return probability

    def _interpolate(
        self, n: int, grams: Int64[np.ndarray, "l"], shorter: Float[np.ndarray, "l"]
    ) -> Float[np.ndarray, "l"]:
        """One Witten-Bell step: from P(c | h') to P(c | h), for n-grams hc."""
        table = self.tables[n - 1]
        row, seen = _find(table.contexts, grams // self.alphabet)
        total, types = np.where(seen, table.totals[row], 0), np.where(seen, table.types[row], 1)
        row, seen = _find(table.grams, grams)
        count = np.where(seen, table.counts[row], 0)
        # an unseen context has total 0 and, set above, one type: the formula then returns `shorter` itself
        return (count + types * shorter) / (total + types)


def markov_text(
    model: NGramModel, context: int, shape: tuple[int, int], rng: np.random.Generator
) -> Int64[np.ndarray, "n l"]:
    """Draw texts from the Markov chain of the training text: raw counts, `context` previous symbols.

    Context 0 gives independent letters, 2 a trigram chain, 5 the chain of 6-grams. The first symbols have
    shorter contexts; so has a symbol after a context that occurs only at the very end of the training text.

    Args:
        model: Its counts are used; its order must be at least context + 1.
        context: Number of previous symbols that a symbol depends on.
        shape: Number of texts and their length.
        rng: Source of randomness.

    Raises:
        UserError: If the model's order is too small.
    """
    if not 0 <= context < model.order:
        raise UserError(f"a chain of context {context} needs an n-gram model of order {context + 1} or more")
    num, length = shape
    out = np.empty((num, length), dtype=np.int64)
    history = np.zeros(num, dtype=np.int64)
    below = [np.concatenate([[0], np.cumsum(table.counts)]) for table in model.tables[: context + 1]]
    for i in range(length):
        todo = np.arange(num)
        for n in range(min(context, i) + 1, 0, -1):
            table = model.tables[n - 1]
            row, seen = _find(table.contexts, history[todo] % model.alphabet ** (n - 1))
            row, now, todo = row[seen], todo[seen], todo[~seen]
            draw = below[n - 1][table.starts[row]] + rng.integers(table.totals[row])
            gram = np.searchsorted(below[n - 1], draw, side="right") - 1
            out[now, i] = table.grams[gram] % model.alphabet
        history = (history * model.alphabet + out[:, i]) % model.alphabet**context
    return out


def _as_texts(
    ids: Integer[np.ndarray, "l"] | Sequence[Integer[np.ndarray, "_"]],
) -> list[Integer[np.ndarray, "_"]]:
    return [ids] if isinstance(ids, np.ndarray) else list(ids)


def _concatenate(
    ids: Integer[np.ndarray, "l"] | Sequence[Integer[np.ndarray, "_"]], alphabet: int
) -> tuple[Int64[np.ndarray, "total"], Int64[np.ndarray, "total"]]:
    """All symbols in one array, and for each its position in its own text."""
    texts = _as_texts(ids)
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    if lengths.sum() == 0:
        raise UserError("there is no text: every text given to the n-gram model is empty")
    symbols = np.concatenate(texts).astype(np.int64)
    if symbols.min() < 0 or symbols.max() >= alphabet:
        raise UserError(f"an id lies outside [0, {alphabet}): encode the text with the model's own alphabet")
    first = np.cumsum(lengths) - lengths
    return symbols, np.arange(len(symbols)) - np.repeat(first, lengths)


def _keys_by_length(
    symbols: Int64[np.ndarray, "l"], order: int, alphabet: int
) -> Iterator[tuple[int, Int64[np.ndarray, "l"]]]:
    """For n = 1 ... order: the key of the n-gram that ends at each position (no meaning where none fits)."""
    keys = symbols
    yield 1, keys
    for n in range(2, order + 1):
        longer = symbols.copy()
        longer[1:] += keys[:-1] * alphabet
        keys = longer
        yield n, keys


def _count(keys: Int64[np.ndarray, "l"], cells: int) -> tuple[Int64[np.ndarray, "g"], Int64[np.ndarray, "g"]]:
    """The different keys in order, and how often each occurs."""
    if cells <= DENSE_CELLS:
        dense = np.bincount(keys, minlength=1)
        grams = np.flatnonzero(dense)
        return grams, dense[grams]
    keys = np.sort(keys)
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[starts], np.diff(starts, append=len(keys))


def _find(
    table: Int64[np.ndarray, "g"], keys: Int64[np.ndarray, "l"]
) -> tuple[Int64[np.ndarray, "l"], Int64[np.ndarray, "l"] | np.ndarray]:
    """Rows of the keys in a sorted table, and whether they are there (else the row is any row)."""
    rows = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return rows, table[rows] == keys
