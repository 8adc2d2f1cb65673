"""Quality against diversity over temperature and network calls: rows, where they are kept, figures at equal entropy.

Any model can be made to look better by a lower temperature, which costs diversity; so one point says little and two
models compare where their diversity is equal. A row is one (run, sampler, steps, temperature); rows of one run and
number of steps make a curve; its quality is read where its token entropy is that of held-out text, between two
neighbouring temperatures and never beyond the last.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from catmaps.evaluation.causal_judge import CausalJudge
from catmaps.evaluation.collect import long_texts
from catmaps.evaluation.divergence import divergence, ngram_vectors
from catmaps.evaluation.frontier_rows import FrontierRow, RowKey, digest, key_of, name_of, read_rows, write_rows
from catmaps.evaluation.judge import Judge
from catmaps.evaluation.judged import figures, flattered
from catmaps.evaluation.ngram import markov_text
from catmaps.evaluation.quality import CONTROL_CONTEXTS, HELDOUT, draw_chunks, quality
from catmaps.generation import SamplingConfig, generate_texts
from catmaps.model import MODEL, Run
from catmaps.text.metrics import Diversity, diversity

REPEATED = "one phrase repeated"
PHRASE = 32  # characters of it


class Texts(NamedTuple):
    """What a row is measured on: samples of the model's own length, and long texts."""

    samples: list[str]
    texts: list[str]


class Task(NamedTuple):
    """A row to come."""

    key: RowKey
    calls: int
    draw: Callable[[], Texts]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows of a frontier share.

    Attributes:
        judge: n-gram models, words and held-out text of the corpus.
        causal: A causal judge, or None.
        length: Characters of a sample.
        num, num_texts: Samples and long texts of a row.
        seed: Of all draws.
        corpus: See `RowKey`.
    """

    judge: Judge
    causal: CausalJudge | None
    length: int
    num: int
    num_texts: int
    seed: int
    corpus: str

    @cached_property
    def heldout(self) -> tuple[Texts, list[str]]:
        """Real text in the form of samples, and as many other samples that divergences are taken from."""
        rng = np.random.default_rng(self.seed)
        short = draw_chunks(self.judge.drawn, self.length, 2 * self.num, rng)
        long = draw_chunks(self.judge.drawn, self.judge.config.min_chars, self.num_texts, rng)
        return Texts(short[: self.num], long), short[self.num :]

    @cached_property
    def reference(self) -> tuple[np.ndarray, Diversity]:
        """Vectors of the other samples, and the diversity of real long texts."""
        texts, others = self.heldout
        return self.vectors(others), diversity(texts.texts, self.judge.retokenizer)

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        if self.causal is None:
            return ngram_vectors(texts)
        vectors = self.causal.score(texts, vectors=True).vectors
        assert vectors is not None
        return vectors

    def key(self, series: str) -> RowKey:
        return RowKey(
            series=series,
            num=self.num,
            num_texts=self.num_texts,
            seed=self.seed,
            corpus=self.corpus,
            judge=self.causal.id if self.causal else "",
        )


def control_tasks(setting: Setting) -> list[Task]:
    """Held-out text, Markov chains of the training text and a repeated phrase, in the form of the samples."""
    judge, long = setting.judge, setting.judge.config.min_chars
    room = 1 if judge.config.alphabet is not None else 4  # a character has up to four bytes

    def chains(context: int) -> Texts:
        rng = np.random.default_rng([setting.seed, context])

        def texts(num: int, length: int) -> list[str]:
            drawn = markov_text(judge.forward, context, (num, room * length), rng)
            return [judge.text(row)[:length] for row in drawn]

        return Texts(texts(setting.num, setting.length), texts(setting.num_texts, long))

    def repeated() -> Texts:
        rng = np.random.default_rng(setting.seed)

        def texts(num: int, length: int) -> list[str]:
            return [(phrase * length)[:length] for phrase in draw_chunks(judge.drawn, PHRASE, num, rng)]

        return Texts(texts(setting.num, setting.length), texts(setting.num_texts, long))

    tasks = [Task(setting.key(HELDOUT), 0, lambda: setting.heldout[0])]
    for name, context in CONTROL_CONTEXTS.items():
        if context < judge.forward.order:
            tasks.append(Task(setting.key(name), 0, lambda context=context: chains(context)))
    return [*tasks, Task(setting.key(REPEATED), 0, repeated)]


def run_tasks(
    setting: Setting, run: Run, name: str, sampling: Sequence[SamplingConfig], temperatures: Sequence[float]
) -> list[Task]:
    """One task for every way of sampling and temperature.

    Args:
        setting: See there; its seed counts.
        run: The run.
        name: Of its rows.
        sampling: Ways, of different steps.
        temperatures: At least one.
    """
    weights = digest(run.path / MODEL)

    def draw(config: SamplingConfig) -> Texts:
        samples = generate_texts(run, setting.num, config)
        return Texts(samples, long_texts(run, setting.judge, config, setting.num_texts))

    tasks = []
    for way in sampling:
        for temperature in temperatures:
            config = replace(way, temperature=temperature, seed=setting.seed)
            made = {"weights": weights, "sampler": way.sampler, "steps": way.steps, "batch": way.batch}
            key = replace(
                setting.key(name), **made, temperature=temperature, noise=way.variance(run), bend=way.bend(run)
            )
            tasks.append(Task(key, config.calls, lambda config=config: draw(config)))
    return tasks


def measure(task: Task, setting: Setting) -> FrontierRow:
    """Draws the texts of a row and measures them."""
    began = time.monotonic()
    samples, texts = task.draw()
    seconds = time.monotonic() - began
    others, real = setting.reference
    row, own = quality(samples, setting.judge, texts), diversity(texts, setting.judge.retokenizer)
    judged: dict[str, Any] = {}
    if setting.causal is None:
        vectors = ngram_vectors(samples)
    else:
        scores = setting.causal.score(samples, vectors=True)
        assert scores.vectors is not None
        vectors, figure = scores.vectors, figures(samples, scores, setting.causal)
        judged = {
            "judge_bits": figure.bits_per_char,
            "judge_bits_stderr": figure.bits_per_char_stderr,
            "judge_gen_ppl": figure.gen_ppl,
            "judge_gen_ppl_stderr": figure.gen_ppl_stderr,
            "judge_token_entropy": figure.diversity.token_entropy.mean,
        }
    near = divergence(vectors, others, seed=setting.seed)
    return FrontierRow(
        **{f.name: getattr(task.key, f.name) for f in fields(RowKey)},
        calls=task.calls,
        seconds=seconds,
        forward_bits=row.forward_bits,
        forward_bits_stderr=row.forward_stderr,
        reverse_bits=row.reverse_bits,
        token_entropy=own.token_entropy.mean,
        token_entropy_stderr=own.token_entropy.stderr,
        distinct_1=own.distinct_1.mean,
        distinct_2=own.distinct_2.mean,
        distinct_3=own.distinct_3.mean,
        repetition_rate=own.repetition_rate.mean,
        compression_ratio=own.compression_ratio.mean,
        valid_word_rate=row.valid_word_rate,
        divergence=near.area,
        divergence_stderr=near.stderr,
        flattered="; ".join(flattered(own, real)),
        **judged,
    )


def trace(
    tasks: Sequence[Task], setting: Setting, file: Path, *, report: Callable[[str, bool], None] = lambda name, new: None
) -> list[FrontierRow]:
    """The rows of the tasks, in their order; those in the CSV file already are taken from it, the others added to it.

    Args:
        tasks: Rows wanted.
        setting: See there.
        file: Made if it does not exist; written after every row, so that nothing is lost.
        report: Told the name of every row that is done, and whether it is new.
    """
    kept = read_rows(file)
    found = {row.key: row for row in kept}
    rows = []
    for task in tasks:
        row = found.get(key_of(task.key))
        new = row is None
        if row is None:
            row = found[key_of(task.key)] = measure(task, setting)
            kept.append(row)
            write_rows(file, kept)
        rows.append(replace(row, series=task.key.series))
        report(name_of(row), new)
    return rows
