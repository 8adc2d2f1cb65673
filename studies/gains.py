"""How much of its own noise should a map see at first? The off-diagonal gain's start at (0, 1), from one base.

A base never uses lambda(s, t) off the diagonal: its weights hold the start, which is written anew here for every arm.
"""

import argparse
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from common import in_parallel, record
from safetensors.torch import load_file, save_file

from catmaps.flow.evidence import Evidence
from catmaps.model import MODEL, load_run, read_config
from catmaps.network.denoiser import FlowNetwork
from catmaps.presets import distill_quickstart
from catmaps.studies.measures import few_step
from catmaps.training.train import start, train

CALLS = (1, 4)


class Job(NamedTuple):
    base: Path
    out: Path
    gain: float
    seed: int
    steps: int


def with_gain(base: Path, out: Path, gain: float) -> Path:
    """A copy of a base whose map will begin with lambda(0, 1) = `gain`, inside and outside."""
    out.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.is_file():
            shutil.copy(file, out / file.name)
    weights = load_file(base / MODEL)
    fresh = Evidence(load_run(base).clock, gain).state_dict()
    own = {name for name in weights if name.endswith(("gain_in.bias", "gain_out.bias"))}
    assert len(own) == 2
    weights |= {name: fresh[name[name.index("gain_") :]].clone() for name in own}
    save_file(weights, out / MODEL)
    return out


def slopes(folder: Path) -> dict[str, float]:
    """lambda(0, 1) of a map's input and of its output skip."""
    network = load_run(folder).network
    assert isinstance(network, FlowNetwork)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    return {"in": network.gain_in(zero, one).item(), "out": network.gain_out(zero, one).item()}


def one(job: Job) -> dict[str, float]:
    config = distill_quickstart(read_config(job.base))
    training = replace(
        config.training, steps=job.steps, seed=job.seed, threads=1, compile=False, evaluate_every=0, save_every=10**6
    )
    if not (job.out / "config.json").exists():
        base = with_gain(job.base, job.out.with_name(f"base-{job.out.name}"), job.gain)
        start(replace(config, base=str(base), preset="gains", training=training), job.out)
    train(job.out)
    figures = few_step(load_run(job.out), seed=job.seed, calls=CALLS, samples=512).figures
    return {name: figure.value for name, figure in figures.items()} | {
        f"gain {side}": value for side, value in slopes(job.out).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/gains"))
    parser.add_argument("--gains", type=float, nargs="+", default=[0.5, 2.5, 10.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    jobs = [
        Job(options.base, options.out / f"gain{gain:g}-{seed}", gain, seed, options.steps)
        for gain in options.gains
        for seed in options.seeds
    ]
    measured = in_parallel(one, jobs, options.workers)
    rows = [
        {"gain": job.gain, "seed": job.seed, "figures": figures} for job, figures in zip(jobs, measured, strict=True)
    ]
    for gain in options.gains:
        of_gain = [figures for job, figures in zip(jobs, measured, strict=True) if job.gain == gain]
        for name in of_gain[0]:
            values = [figures[name] for figures in of_gain]
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            print(f"lambda(0, 1) = {gain:g} at first: {name:18} {statistics.mean(values):.3f} +- {spread:.3f}")
    print(record("gains", {"steps": options.steps, "rows": rows}))


if __name__ == "__main__":
    main()
