"""How much noise should a map add between its jumps, where should it go back to, and what should temperature do?

Samples of several maps over the variance of renoising (1 is eq. (13), which keeps the law of the path), the bend of
its grid (times at (i / N)^bend of the clock), and temperature, of the first noise alone or of the logits as well.
Figures as in docs/log.md, entropy and distinct-2 of short samples joined, hence beside held-out text of the same form.
"""

import argparse
import itertools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import in_parallel, record

from catmaps.evaluation.collect import build_judge, judge_length
from catmaps.evaluation.quality import draw_chunks, evenly, quality
from catmaps.flow.flow_map import FlowMap
from catmaps.generation import SamplingConfig, generate_texts
from catmaps.model import Run, load_run
from catmaps.training.train import cache_folder, find_shards

FIGURES = ("forward_bits", "reverse_bits", "token_entropy", "distinct_2", "valid_word_rate")


class How(NamedTuple):
    """What a row has of its own."""

    calls: int
    noise: float
    bend: float | None
    """None: that of the noise, as it is sampled."""
    temperature: float
    divides: bool
    """Whether temperature divides the logits as well."""


class Job(NamedTuple):
    run: Path
    how: How
    num: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Varied(SamplingConfig):
    """Renoising on another grid, or with divided logits."""

    how: How

    def bend(self, run: Run) -> float:
        return super().bend(run) if self.how.bend is None else self.how.bend

    def flow_map(self, *given: Any) -> FlowMap:
        chosen = super().flow_map(*given)
        return replace(chosen, temperature=self.temperature) if self.how.divides else chosen


def draw(job: Job) -> list[str]:
    how = job.how
    options = {"steps": how.calls, "noise": how.noise, "temperature": how.temperature, "seed": job.seed}
    return generate_texts(load_run(job.run), job.num, Varied(sampler="renoise", how=how, **options))


def rows(path: Path, jobs: list[Job], drawn: list[list[str]]) -> list[dict[str, Any]]:
    """Figures of one run's jobs, reverse bits from equally many characters, and of held-out text."""
    run = load_run(path)
    judge = build_judge(find_shards(run.config), run.tokenizer, cache_folder())
    length = judge_length(run, judge)
    real = draw_chunks(judge.drawn, length, jobs[0].num, np.random.default_rng(jobs[0].seed))
    judge = evenly(judge, [*drawn, real])
    found = [
        {"run": path.name, **job.how._asdict(), **asdict(quality(texts, judge))}
        for job, texts in zip(jobs, drawn, strict=True)
    ]
    return [*found, {"run": path.name, **dict.fromkeys(How._fields), **asdict(quality(real, judge))}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maps", type=Path, nargs="+")
    parser.add_argument("--calls", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--noise", type=float, nargs="+", default=[1.0, 0.7, 0.5, 0.25])
    parser.add_argument("--bends", type=float, nargs="+", default=[None], help="default: that of the noise")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0])
    parser.add_argument("--divide", action="store_true", help="below 1 also rows whose logits are divided by it")
    parser.add_argument("--num", type=int, default=256, help="samples per row")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default="renoising", help="of the record")
    options = parser.parse_args()
    ways = [
        How(*way)
        for way in itertools.product(
            options.calls, options.noise, options.bends, options.temperatures, [False, True][: 1 + options.divide]
        )
        if way[3] != 1 or not way[4]  # at temperature 1 the two are the same
    ]
    jobs = [Job(path, how, options.num, options.seed) for path in options.maps for how in ways]
    drawn = in_parallel(draw, jobs, options.workers)
    each, everything = len(ways), []
    for i, path in enumerate(options.maps):
        part = slice(i * each, (i + 1) * each)
        everything += rows(path, jobs[part], drawn[part])
    for row in everything:
        figures = "  ".join(f"{name} {row[name]:.3f}" for name in FIGURES)
        how = "  ".join(f"{name} {row[name]}" for name in How._fields) if row["calls"] else "held-out text"
        print(f"{row['run']:16} {how}  {figures}")
    print(record(options.name, {"num": options.num, "seed": options.seed, "rows": everything}))


if __name__ == "__main__":
    main()
