"""What a causal judge says of a set of texts, never without the figures that give its known exploits away.

Perplexity is cheap to win: a text that repeats itself is easy to predict (a phrase said thrice costs nothing the third
time), and so is a model that writes few texts well. So every row holds token entropy, distinct n-grams, repetition and
compression of single texts, and `flattered` says where they fall below those of real text. Per *token* perplexity is
not even ordered for models of letters: noise is cut into more and cheaper tokens than words are. Bits per character
are; compare judges and models by them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from catmaps.errors import UserError
from catmaps.evaluation.causal_judge import CausalJudge, Scores
from catmaps.text.metrics import Diversity, Mean, diversity, ratio_of

TOLERANCE = 0.05  # how far below real text's a figure may fall, relative to it
REPETITION = 0.05  # how far above real text's the share of repeated words may rise


@dataclass(frozen=True, kw_only=True)
class JudgeFigures:
    """A judge's figures of a set of texts; standard errors are over texts.

    Attributes:
        judge: Its `id`.
        num_texts, num_tokens, num_chars: Texts, and what was scored of them: all but their first tokens.
        gen_ppl, gen_ppl_stderr: exp(all nats / all tokens), tokens being the judge's.
        gen_ppl_median: Median over texts of exp(nats / tokens).
        bits_per_char, bits_per_char_stderr: All bits / all characters.
        bits_per_byte: All bits / all bytes of UTF-8.
        diversity: Of single texts; the entropy is that of the judge's tokens.
    """

    judge: str
    num_texts: int
    num_tokens: int
    num_chars: int
    gen_ppl: float
    gen_ppl_stderr: float
    gen_ppl_median: float
    bits_per_char: float
    bits_per_char_stderr: float
    bits_per_byte: float
    diversity: Diversity

    def as_dict(self) -> dict[str, float | int | str]:
        """Flat, for JSON: means of the diversity figures by name, their errors with _stderr."""
        values: dict[str, float | int | str] = {k: v for k, v in vars(self).items() if k != "diversity"}
        for name, mean in self.diversity._asdict().items():
            values |= {name: mean.mean, f"{name}_stderr": mean.stderr}
        return values

    def __str__(self) -> str:
        d = self.diversity
        return (
            f"{self.bits_per_char:.3f} ± {self.bits_per_char_stderr:.3f} bits/char, "
            f"gen-PPL {self.gen_ppl:.1f} ± {self.gen_ppl_stderr:.1f} (token entropy {d.token_entropy.mean:.2f} nats, "
            f"repeated words {d.repetition_rate.mean:.1%}, distinct-2 {d.distinct_2.mean:.3f}, "
            f"compression {d.compression_ratio.mean:.3f}; {self.num_texts} texts)"
        )


def judge_texts(
    texts: Sequence[str], judge: CausalJudge, *, progress: Callable[[float], None] | None = None
) -> JudgeFigures:
    """Scores texts and measures how much they repeat themselves.

    Raises:
        UserError: If there are no texts, or none of two tokens.
    """
    return figures(texts, judge.score(texts, progress=progress), judge)


def figures(texts: Sequence[str], scores: Scores, judge: CausalJudge) -> JudgeFigures:
    """The figures of texts that have been scored already."""
    if not scores.tokens.any():
        raise UserError("there is nothing to judge: no text has two tokens")
    per_token, bits = ratio_of(scores.nats, scores.tokens), scores.nats / math.log(2)
    per_char, scored = ratio_of(bits, scores.chars), scores.tokens > 0
    perplexity = _exp(per_token.mean)
    return JudgeFigures(
        judge=judge.id,
        num_texts=len(texts),
        num_tokens=int(scores.tokens.sum()),
        num_chars=int(scores.chars.sum()),
        gen_ppl=perplexity,
        gen_ppl_stderr=perplexity * per_token.stderr,
        gen_ppl_median=_exp(float(np.median(scores.nats[scored] / scores.tokens[scored]))),
        bits_per_char=per_char.mean,
        bits_per_char_stderr=per_char.stderr,
        bits_per_byte=float(bits.sum() / scores.bytes.sum()),
        diversity=diversity(texts, judge),
    )


def flattered(own: Diversity, real: Diversity) -> tuple[str, ...]:
    """Why bits and perplexity of texts flatter them: what they repeat more than real text of the same length does.

    A figure counts that is worse by 5% of real text's (repeated words: by 5 points), and by two standard errors more.
    Empty if none is.
    """
    reasons = []
    for name in ("token_entropy", "distinct_1", "distinct_2", "distinct_3", "compression_ratio"):
        mine, reference = getattr(own, name), getattr(real, name)
        if mine.mean + _noise(mine, reference) < (1 - TOLERANCE) * reference.mean:
            reasons.append(f"{name.replace('_', ' ')} {mine.mean:.3f} against {reference.mean:.3f}")
    repeated, reference = own.repetition_rate, real.repetition_rate
    if repeated.mean - _noise(repeated, reference) > reference.mean + REPETITION:
        reasons.append(f"repeated words {repeated.mean:.1%} against {reference.mean:.1%}")
    return tuple(reasons)


def _noise(a: Mean, b: Mean) -> float:
    """Two standard errors of a difference; those of single texts, which are not known, count as none."""
    return 2 * math.hypot(*(0.0 if math.isnan(x) else x for x in (a.stderr, b.stderr)))


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))
