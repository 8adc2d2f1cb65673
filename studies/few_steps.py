"""Is a flow map in a few calls as good as its base in many Euler steps?

Rows: the map at 1, 2, 4, 8 calls, the base at 4 and more steps, and texts of known worth (i.i.d. letters, Markov
chains, which must fail, and held-out text, which must pass). Measures, docs/log.md: forward order-6 bits, reverse
order-4 bits of held-out text under a model of the samples, both on samples of the trained length; token entropy and
word distinct-2 beside held-out text, on texts of 1,024 characters, which a model writes block by block.
"""

import argparse
import json
import math
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import in_parallel, record
from rich.console import Console

from catmaps.evaluation.causal_judge import load_causal_judge
from catmaps.evaluation.collect import build_judge, judge_length, long_texts
from catmaps.evaluation.fetch_judge import resolve
from catmaps.evaluation.judge import Judge
from catmaps.evaluation.judged import JudgeFigures, judge_texts
from catmaps.evaluation.quality import (
    HELDOUT,
    Bars,
    Quality,
    control_rows,
    draw_chunks,
    evenly,
    quality,
    quality_table,
    verdict,
)
from catmaps.flow.samplers import few_step_variance
from catmaps.generation import SamplingConfig, generate_texts
from catmaps.model import Run, compile_blocks, load_run
from catmaps.training.train import cache_folder, find_shards


class Job(NamedTuple):
    """A row of the table: what is drawn, and how much of it."""

    run: Path
    steps: int
    sampler: str
    num: int
    num_texts: int
    seed: int = 0
    temperature: float = 1.0
    noise: float | None = None
    draws: Path | None = None

    @property
    def kept(self) -> Path | None:
        """Where its texts are kept."""
        how = f"{self.sampler}{'' if self.noise is None else self.noise}-{self.steps}-{self.temperature}"
        name = f"{self.run.name}-{how}-{self.num}-{self.num_texts}-{self.seed}"
        return None if self.draws is None else self.draws / f"{name}.json"


@cache
def _ready(path: Path) -> Run:
    run = load_run(path)
    compile_blocks(run.network)
    return run


def draw(job: Job) -> tuple[list[str], list[str]]:
    """Samples of the trained length, long texts; those that are kept are not drawn again."""
    if job.kept is not None and job.kept.exists():
        samples, texts = json.loads(job.kept.read_text())
        return samples, texts
    drawn = _draw(job)
    if job.kept is not None:
        job.kept.parent.mkdir(parents=True, exist_ok=True)
        job.kept.write_text(json.dumps(drawn))
    return drawn


def _draw(job: Job) -> tuple[list[str], list[str]]:
    run = _ready(job.run)
    how = {"steps": job.steps, "sampler": job.sampler, "temperature": job.temperature, "noise": job.noise}
    config = SamplingConfig(**how, seed=job.seed, batch=128)
    judge = build_judge(find_shards(run.config), run.tokenizer, cache_folder())
    return generate_texts(run, job.num, config), long_texts(run, judge, config, job.num_texts)


def drawn_rows(jobs: dict[str, Job], workers: int) -> dict[str, tuple[list[str], list[str]]]:
    """Texts by name; every job is dealt to all workers in equal parts."""
    parts = [
        job._replace(
            num=math.ceil(job.num / workers),
            num_texts=math.ceil(job.num_texts / workers),
            seed=job.seed + 1000 * worker,
        )
        for job in jobs.values()
        for worker in range(workers)
    ]
    drawn, found = in_parallel(draw, parts, workers), {}
    for i, name in enumerate(jobs):
        own = drawn[i * workers : (i + 1) * workers]
        found[name] = ([text for part in own for text in part[0]], [text for part in own for text in part[1]])
    return found


def rows(jobs: dict[str, Job], judge: Judge, workers: int) -> dict[str, Quality]:
    """Quality by name."""
    return qualities(drawn_rows(jobs, workers), judge)


def qualities(drawn: dict[str, tuple[list[str], list[str]]], judge: Judge) -> dict[str, Quality]:
    """Quality by name, reverse bits from equally many characters."""
    judge = evenly(judge, (samples for samples, _ in drawn.values()))
    return {name: quality(samples, judge, texts) for name, (samples, texts) in drawn.items()}


def causal_bits(sets: dict[str, list[str]], name: str) -> dict[str, JudgeFigures]:
    """Figures of samples under a causal judge, by name."""
    causal = load_causal_judge(resolve(name, cache_folder()), precision="bfloat16", alias=name)
    return {row: judge_texts(samples, causal) for row, samples in sets.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("map", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--characters", type=int, default=1_000_000, help="of samples per row")
    parser.add_argument("--texts", type=int, default=128, help="long texts per row")
    parser.add_argument("--base-texts", type=int, help="of the base; without it as many")
    parser.add_argument("--workers", type=int, default=2, help="one-core processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base-steps", type=int, nargs="+", default=[4, 64], help="the last is the map's measure")
    parser.add_argument("--draws", type=Path, help="folder where texts are kept: those found there are not drawn again")
    parser.add_argument("--only-draw", action="store_true", help="measure nothing; for --draws on another machine")
    parser.add_argument("--judge", help="also bits under a causal judge, as in `catmaps judge`")
    parser.add_argument("--judge-texts", type=int, help="samples per row for it; without it all")
    parser.add_argument("--name", default="few_steps", help="of the record")
    options = parser.parse_args()
    run = load_run(options.map)
    judge = build_judge(find_shards(run.config), run.tokenizer, cache_folder())
    length = judge_length(run, judge)
    num = math.ceil(options.characters / length / options.workers) * options.workers
    common = {"num": num, "num_texts": options.texts, "seed": options.seed, "draws": options.draws}
    own = Job(options.map, 4, "renoise", **common, noise=few_step_variance(4))
    base_job = own._replace(
        run=options.base, sampler="euler", noise=None, num_texts=options.base_texts or options.texts
    )
    jobs = {
        **{f"map, {n} calls": own._replace(steps=n, noise=few_step_variance(n)) for n in (1, 2, 4, 8)},
        **{f"map, {n} calls at temperature 0.8": own._replace(steps=n, temperature=0.8) for n in (1, 4)},
        "map, 4 calls with all of the noise": own._replace(noise=1.0),
        "map, 4 calls of flow_map": own._replace(sampler="flow_map", noise=None),
        **{f"base, {n} Euler steps": base_job._replace(steps=n) for n in options.base_steps},
    }
    drawn = drawn_rows(jobs, options.workers)
    if options.only_draw:
        return
    measured, rng = qualities(drawn, judge), np.random.default_rng(options.seed)
    judge = evenly(judge, (), min(row.reverse_chars for row in measured.values()))
    controls = control_rows(judge, length, num, rng, options.texts)
    everything = {**measured, **controls}
    base, reference = measured[f"base, {options.base_steps[-1]} Euler steps"], controls[HELDOUT]
    Console(width=150).print(quality_table(everything, reference))
    verdicts = {}
    for name, row in everything.items():
        most = 1.15 if name.startswith("map, 1 calls") else 1.0
        bars = Bars(forward=most, reverse=most, diversity=0.01)
        verdicts[name] = verdict(row, base, reference, bars)
        print(f"{name:36} {'passes' if verdicts[name].passed else 'fails'}  {verdicts[name]}")
    figures = {
        "rows": {name: asdict(row) for name, row in everything.items()},
        "verdicts": {name: asdict(v) | {"passed": v.passed} for name, v in verdicts.items()},
        "seed": options.seed,
    }
    if options.judge is not None:
        sets = {name: samples for name, (samples, _) in drawn.items()}
        sets[HELDOUT] = draw_chunks(judge.drawn, length, num, rng)
        found = causal_bits({name: some[: options.judge_texts] for name, some in sets.items()}, options.judge)
        for name, row in found.items():
            print(f"{name:36} {row}")
        figures["judged"] = {name: row.as_dict() for name, row in found.items()}
    print(record(options.name, figures))


if __name__ == "__main__":
    main()
