"""Do all four distillation losses improve 4-call samples over the undistilled base, from one base, at equal steps?"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from common import in_parallel, record
from few_steps import Job, rows
from rich.console import Console

from catmaps.evaluation.collect import build_judge, read_metrics
from catmaps.evaluation.quality import quality_table
from catmaps.model import load_run, read_config
from catmaps.presets import distill_quickstart
from catmaps.training.train import cache_folder, find_shards, start, train

LOSSES = ("psd", "lsd", "esd", "ecld")


def distil(job: tuple[Path, Path, str, int, int]) -> float:
    """(base, out, loss, steps, seed) -> minutes."""
    base, out, loss, steps, seed = job
    config = distill_quickstart(read_config(base))
    config = replace(
        config,
        base=str(base),
        preset="losses",
        objective=replace(config.objective, loss=loss),
        training=replace(config.training, steps=steps, seed=seed, threads=1),
    )
    start(config, out)
    train(out)
    return max(row["seconds"] for row in read_metrics(load_run(out))) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/losses"))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folders = {loss: options.out / loss for loss in LOSSES}
    jobs = [(options.base, folder, loss, options.steps, options.seed) for loss, folder in folders.items()]
    minutes = dict(zip(LOSSES, in_parallel(distil, jobs, options.workers), strict=True))
    run = load_run(options.base)
    judge = build_judge(find_shards(run.config), run.tokenizer, cache_folder())
    draws: dict[str, Job] = {
        f"{loss}, 4 calls of {sampler}": Job(folder, 4, sampler, options.samples, 64)
        for sampler in ("renoise", "flow_map")
        for loss, folder in folders.items()
    }
    draws["base, 4 Euler steps"] = Job(options.base, 4, "euler", options.samples, 64)
    draws["base, 4 calls of renoise"] = Job(options.base, 4, "renoise", options.samples, 64)
    measured = rows(draws, judge, options.workers)
    Console(width=150).print(quality_table(measured))
    figures = {
        "rows": {name: asdict(row) for name, row in measured.items()},
        "minutes": minutes,
        "steps": options.steps,
        "seed": options.seed,
    }
    print(record("losses", figures))


if __name__ == "__main__":
    main()
