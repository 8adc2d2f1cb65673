"""How much noise should a map add between its jumps? Samples of several maps over the variance of renoising.

1 is eq. (13), which keeps the law of the path. Figures as in docs/log.md, entropy and distinct-2 of short samples
joined, hence beside held-out text of the same form.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import in_parallel, record

from catmaps.evaluation.collect import build_judge, judge_length
from catmaps.evaluation.quality import draw_chunks, evenly, quality
from catmaps.generation import SamplingConfig, generate_texts
from catmaps.model import load_run
from catmaps.training.train import cache_folder, find_shards

FIGURES = ("forward_bits", "reverse_bits", "token_entropy", "distinct_2", "valid_word_rate")


class Job(NamedTuple):
    run: Path
    calls: int
    noise: float
    num: int
    seed: int


def draw(job: Job) -> list[str]:
    config = SamplingConfig(sampler="renoise", steps=job.calls, noise=job.noise, seed=job.seed)
    return generate_texts(load_run(job.run), job.num, config)


def rows(path: Path, jobs: list[Job], drawn: list[list[str]]) -> list[dict[str, Any]]:
    """Figures of one run's jobs, reverse bits from equally many characters, and of held-out text."""
    run = load_run(path)
    judge = build_judge(find_shards(run.config), run.tokenizer, cache_folder())
    length = judge_length(run, judge)
    real = draw_chunks(judge.drawn, length, jobs[0].num, np.random.default_rng(jobs[0].seed))
    judge = evenly(judge, [*drawn, real])
    found = [
        {"run": path.name, "calls": job.calls, "noise": job.noise, **asdict(quality(texts, judge))}
        for job, texts in zip(jobs, drawn, strict=True)
    ]
    return [*found, {"run": path.name, "calls": 0, "noise": None, **asdict(quality(real, judge))}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maps", type=Path, nargs="+")
    parser.add_argument("--calls", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--noise", type=float, nargs="+", default=[1.0, 0.7, 0.5, 0.25])
    parser.add_argument("--num", type=int, default=256, help="samples per row")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default="renoising", help="of the record")
    options = parser.parse_args()
    jobs = [
        Job(path, calls, noise, options.num, options.seed)
        for path in options.maps
        for calls in options.calls
        for noise in options.noise
    ]
    drawn = in_parallel(draw, jobs, options.workers)
    each, everything = len(jobs) // len(options.maps), []
    for i, path in enumerate(options.maps):
        part = slice(i * each, (i + 1) * each)
        everything += rows(path, jobs[part], drawn[part])
    for row in everything:
        figures = "  ".join(f"{name} {row[name]:.3f}" for name in FIGURES)
        print(f"{row['run']:16} {row['calls']} calls  noise {row['noise']}  {figures}")
    print(record(options.name, {"num": options.num, "seed": options.seed, "rows": everything}))


if __name__ == "__main__":
    main()
