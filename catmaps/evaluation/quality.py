"""Quality of sampled text: one row of figures per set of samples, control rows, and a verdict against a base.

Three questions are asked. *Is it like the training text?* Forward bits: cross-entropy of the samples under an
n-gram model of the training text. *Does it cover the language?* Reverse bits: cross-entropy of held-out text
under an n-gram model fitted to the samples, which a model that keeps writing the same good sentence fails.
*Does one text repeat itself?* Token entropy and distinct-2 of single texts. No figure means much alone: a
Markov chain of the training text has better forward bits than real text.

Long texts answer the last question: a model of short sequences writes them block by block, real text is cut whole.
Short samples joined would not do: a text of eight strangers repeats little, and a Markov chain passes for real.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate

import numpy as np
from rich.markup import escape
from rich.table import Table

from catmaps.errors import UserError
from catmaps.evaluation.judge import Judge
from catmaps.evaluation.ngram import NGramModel, markov_text
from catmaps.text.metrics import (
    mean_distinct_ngrams,
    mean_letter_entropy,
    mean_repetition_rate,
    mean_token_entropy,
    pooled_compression_ratio,
    pooled_letter_entropy,
    pooled_valid_word_rate,
)

CONTROL_CONTEXTS = {"i.i.d. letters": 0, "trigram chain": 2, "order-5 Markov chain": 5}
HELDOUT = "held-out text"


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Figures of one set of samples. Bits are per character; entropies are in nats.

    Measured on the samples as they are:
        forward_bits, forward_stderr: Cross-entropy under the training text's n-gram model, and its standard
            error over samples.
        reverse_bits, reverse_chars: Cross-entropy of held-out text under a model fitted to the first
            `reverse_chars` characters of the samples. It falls with their number: compare only rows where
            that is equal.
        valid_word_rate: Share of words that occur in the training text.
        zlib_ratio: Compressed / raw size of all samples together.
        letter_entropy_pooled: Of all characters together.
        num_samples, num_chars: How many samples, and characters in them.
    Averages over long texts, of `text_chars` characters in the mean:
        token_entropy, token_entropy_stderr: Of the retokenised ids of one text.
        distinct_2, distinct_2_stderr: Different word pairs / word pairs of one text.
        letter_entropy: Of the characters of one text.
        repetition_rate: Share of words that occur among the 16 words before.
        num_texts: How many long texts.
    """

    forward_bits: float
    forward_stderr: float
    reverse_bits: float
    reverse_chars: int
    valid_word_rate: float
    zlib_ratio: float
    letter_entropy_pooled: float
    num_samples: int
    num_chars: int
    token_entropy: float
    token_entropy_stderr: float
    distinct_2: float
    distinct_2_stderr: float
    letter_entropy: float
    repetition_rate: float
    num_texts: int
    text_chars: float


@dataclass(frozen=True, kw_only=True)
class Bars:
    """What a few-step model must reach: ratios of its bits to the base's, and nearness to real text.

    Attributes:
        forward: Largest forward bits / base's forward bits.
        reverse: Largest reverse bits / base's reverse bits.
        diversity: Largest relative difference, up or down, of token entropy and distinct-2 from the
            reference's.
    """

    forward: float = 1.0
    reverse: float = 1.0
    diversity: float = 0.03


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Ratios to the base (bits) and to the reference (the other two), and whether each meets its bar."""

    forward_ratio: float
    reverse_ratio: float
    token_entropy_ratio: float
    distinct_2_ratio: float
    forward_ok: bool
    reverse_ok: bool
    token_entropy_ok: bool
    distinct_2_ok: bool

    @property
    def passed(self) -> bool:
        """Whether every bar is met."""
        return self.forward_ok and self.reverse_ok and self.token_entropy_ok and self.distinct_2_ok


def join_texts(samples: Sequence[str], min_chars: int) -> list[str]:
    """Join consecutive samples by spaces until each text has at least `min_chars` characters.

    Samples that are long enough stay as they are. A last text that stays too short is left out, so that all
    texts have about one length (token entropy and distinct-2 depend on it).

    Raises:
        UserError: If all samples together are too short for one text.
    """
    texts, parts, size = [], [], 0
    for sample in samples:
        size += len(sample) + (1 if parts else 0)
        parts.append(sample)
        if size >= min_chars:
            texts.append(" ".join(parts))
            parts, size = [], 0
    if not texts:
        raise UserError(f"the samples make no text of {min_chars:,} characters: draw more of them")
    return texts


def draw_chunks(text: str, length: int, num: int, rng: np.random.Generator) -> list[str]:
    """Cut `num` chunks of `length` characters out of a text at random places.

    The text is cut from a random offset into consecutive chunks, which are shuffled; a new pass with a new
    offset begins when they are used up. So chunks overlap only where more text is asked for than there is.

    Raises:
        UserError: If the text is shorter than one chunk.
    """
    if not 1 <= length <= len(text):
        raise UserError(f"cannot cut chunks of {length:,} characters out of a text of {len(text):,}")
    chunks: list[str] = []
    while len(chunks) < num:
        start = int(rng.integers(min(length, len(text) - length + 1)))
        cut = [text[i : i + length] for i in range(start, len(text) - length + 1, length)]
        chunks += [cut[i] for i in rng.permutation(len(cut))]
    return chunks[:num]


def quality(samples: Sequence[str], judge: Judge, texts: Sequence[str] | None = None) -> Quality:
    """Measure samples, all of one length, in the alphabet of the judge.

    Args:
        samples: Of the model's own length.
        judge: What they are measured against.
        texts: Long texts, at least the judge's `min_chars` characters each; None: the samples, joined if they are
            shorter (`join_texts`), which only compares with rows joined alike.

    Raises:
        UserError: If a text is shorter than the judge's `min_chars`, the samples are too few for one, or they hold
            other characters.
    """
    texts = join_texts(samples, judge.config.min_chars) if texts is None else texts
    if not texts or min(map(len, texts)) < judge.config.min_chars:
        raise UserError(f"token entropy and distinct-2 need texts of at least {judge.config.min_chars:,} characters")
    symbols = judge.symbols(samples)
    forward = judge.forward.bits_per_char(symbols)
    reverse_bits, reverse_chars = _reverse(symbols, judge)
    tokens = mean_token_entropy(texts, judge.retokenizer)
    distinct = mean_distinct_ngrams(texts, 2)
    return Quality(
        forward_bits=forward.mean,
        forward_stderr=forward.stderr,
        reverse_bits=reverse_bits,
        reverse_chars=reverse_chars,
        valid_word_rate=pooled_valid_word_rate(samples, judge.words),
        zlib_ratio=pooled_compression_ratio(samples),
        letter_entropy_pooled=pooled_letter_entropy(samples),
        num_samples=len(samples),
        num_chars=sum(map(len, samples)),
        token_entropy=tokens.mean,
        token_entropy_stderr=tokens.stderr,
        distinct_2=distinct.mean,
        distinct_2_stderr=distinct.stderr,
        letter_entropy=mean_letter_entropy(texts).mean,
        repetition_rate=mean_repetition_rate(texts).mean,
        num_texts=len(texts),
        text_chars=sum(map(len, texts)) / len(texts),
    )


def evenly(judge: Judge, sets: Iterable[Sequence[str]], at_most: int | None = None) -> Judge:
    """The judge, with reverse models fitted to no more characters than the smallest of the sets of samples has.

    Texts of as many tokens hold more or fewer characters; reverse bits fall with their number, so that rows measured
    by this judge compare and rows of unequal sets do not.

    Args:
        judge: The judge.
        sets: The samples of each row.
        at_most: No more than these, if given: what a row that is not among the sets has.
    """
    sizes = [sum(map(len, judge.symbols(samples))) for samples in sets]
    limits = (judge.config.reverse_chars, *sizes, *([] if at_most is None else [at_most]))
    return replace(judge, config=replace(judge.config, reverse_chars=min(limits)))


def heldout_quality(
    judge: Judge, length: int, num: int, rng: np.random.Generator, num_texts: int | None = None
) -> Quality:
    """Quality of real text in the form of samples: the reference for models of that sequence length."""
    texts = None if num_texts is None else draw_chunks(judge.drawn, judge.config.min_chars, num_texts, rng)
    return quality(draw_chunks(judge.drawn, length, num, rng), judge, texts)


def control_rows(
    judge: Judge, length: int, num: int, rng: np.random.Generator, num_texts: int | None = None
) -> dict[str, Quality]:
    """Quality of texts of known worth: independent letters, Markov chains of the training text, real text.

    Chains whose context the judge's forward model does not reach are left out.

    Args:
        judge: Its forward model holds the counts of the chains, its `drawn` text is the real one.
        length: Characters per sample: the model's sequence length.
        num: Number of samples per row: as many as of the model.
        rng: Source of randomness.
        num_texts: Number of long texts per row; None: the samples joined.

    Returns:
        Rows by name, real text last.
    """
    rows = {}
    for name, context in CONTROL_CONTEXTS.items():
        if context < judge.forward.order:

            def chains(count: int, size: int, context: int = context) -> list[str]:
                symbols = size  # of bytes some do not decode, or several to one character
                while True:
                    drawn = [judge.text(row) for row in markov_text(judge.forward, context, (count, symbols), rng)]
                    if min(map(len, drawn)) >= size:
                        return [text[:size] for text in drawn]
                    symbols += symbols // 8 + 8

            texts = None if num_texts is None else chains(num_texts, judge.config.min_chars)
            rows[name] = quality(chains(num, length), judge, texts)
    rows[HELDOUT] = heldout_quality(judge, length, num, rng, num_texts)
    return rows


def verdict(quality: Quality, base: Quality, reference: Quality, bars: Bars | None = None) -> Verdict:
    """Hold a few-step model's figures against its base's bits and real text's diversity.

    Raises:
        UserError: If the two reverse models were fitted to different numbers of characters (by more than 2%):
            reverse bits would then compare the numbers (`evenly` is for that).
    """
    bars = bars or Bars()
    if abs(quality.reverse_chars - base.reverse_chars) > 0.02 * base.reverse_chars:
        raise UserError(
            f"reverse bits of {quality.reverse_chars:,} and {base.reverse_chars:,} characters do not "
            "compare: draw equally many samples"
        )
    forward, reverse = quality.forward_bits / base.forward_bits, quality.reverse_bits / base.reverse_bits
    tokens = quality.token_entropy / reference.token_entropy
    distinct = quality.distinct_2 / reference.distinct_2
    return Verdict(
        forward_ratio=forward,
        reverse_ratio=reverse,
        token_entropy_ratio=tokens,
        distinct_2_ratio=distinct,
        forward_ok=forward <= bars.forward,
        reverse_ok=reverse <= bars.reverse,
        token_entropy_ok=abs(tokens - 1) <= bars.diversity,
        distinct_2_ok=abs(distinct - 1) <= bars.diversity,
    )


def quality_table(rows: dict[str, Quality], reference: Quality | None = None) -> Table:
    """A table of the rows; a reference comes last, and differences from it stand beside diversity."""
    table = Table(title="Sample quality (bits per character; entropies in nats)")
    table.add_column("samples")
    for header in ("forward bits", "reverse bits", "token entropy", "distinct-2", "letter entropy"):
        table.add_column(header, justify="right")
    for header in ("valid words", "repetition", "zlib", "texts x chars"):
        table.add_column(header, justify="right")
    for name, row in rows.items():
        table.add_row(escape(name), *_cells(row, reference))
    if reference is not None:
        table.add_section()
        table.add_row("reference", *_cells(reference, None))
    return table


def to_json(rows: dict[str, Quality]) -> str:
    """The rows as JSON: name -> figures; a figure that is not a number is null."""
    record = {name: {key: _finite(value) for key, value in asdict(row).items()} for name, row in rows.items()}
    return json.dumps(record, indent=2, allow_nan=False)


def _reverse(symbols: Sequence[np.ndarray], judge: Judge) -> tuple[float, int]:
    """Bits per character of held-out text under a model of the samples, and the characters fitted to."""
    ends = list(accumulate(len(sample) for sample in symbols))
    used, limit = [], judge.config.reverse_chars
    for sample, end in zip(symbols, ends, strict=True):
        used.append(sample[: max(0, limit - (end - len(sample)))])
    model = NGramModel.fit(used, judge.config.reverse_order, judge.config.num_symbols)
    return model.bits_per_char(judge.symbols(judge.scored)).mean, min(ends[-1], limit)


def _cells(row: Quality, reference: Quality | None) -> list[str]:
    def beside(value: float, real: float | None) -> str:
        return f"{value:.3f}" if real is None else f"{value:.3f} ({100 * (value / real - 1):+.1f}%)"

    return [
        f"{row.forward_bits:.3f} ± {row.forward_stderr:.3f}",
        f"{row.reverse_bits:.3f}",
        beside(row.token_entropy, reference and reference.token_entropy),
        beside(row.distinct_2, reference and reference.distinct_2),
        f"{row.letter_entropy:.3f}",
        f"{100 * row.valid_word_rate:.1f}%",
        f"{100 * row.repetition_rate:.1f}%",
        f"{row.zlib_ratio:.3f}",
        f"{row.num_texts:,} x {row.text_chars:,.0f}",
    ]


def _finite(value: int | float) -> int | float | None:
    return value if math.isfinite(value) else None
