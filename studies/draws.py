"""Do mirrored noise and the pilot's law for many draws make the likelihood bound sharper?

`nelbo` lets neighbouring cells of its stratified draws share their noise with opposite signs, and `pilot` finds a law
of time for the number of draws that follow. Every pair of choices estimates the same integral for the same windows,
again and again; what counts is the variance between repeats, as a share of that without either.
"""

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from bounds import BATCH, rows
from common import in_parallel, record
from torch import Tensor

from catmaps.flow.likelihood import path_draws, pilot
from catmaps.flow.times import Law
from catmaps.model import Run, compile_blocks, load_run


class Job(NamedTuple):
    """A worker's share: its windows, and how often."""

    path: Path
    index: int
    workers: int
    windows: int
    repeats: int
    draws: int
    seed: int


def integral(run: Run, tokens: Tensor, law: Law, draws: int, mirrored: bool, generator: torch.Generator) -> Tensor:
    """The path's integral, nats by window: the mean of one draw in each of `draws` cells."""
    shape, total = (*tokens.shape, run.tokenizer.vocab_size), torch.zeros(len(tokens), dtype=torch.float64)
    noise = torch.zeros(())
    for i in range(draws):
        noise = -noise if mirrored and i % 2 else torch.randn(shape, generator=generator)
        place = (i + torch.rand(len(tokens), generator=generator, dtype=torch.float64)) / draws
        total += path_draws(run.flow_map, tokens, place, law, noise).sum(1)
    return total / draws


def one(job: Job) -> dict[str, Tensor]:
    """For every pair of choices the integral, (repeats, windows)."""
    run, generator = load_run(job.path), torch.Generator().manual_seed(job.seed + job.index)
    compile_blocks(run.network)
    valid, same = rows(run, "valid", BATCH, job.seed), torch.Generator().manual_seed(job.seed)
    laws = {
        name: pilot(run.flow_map, valid, run.clock, num_samples=n, generator=same)
        for name, n in (("pilot for one draw", 1), ("pilot for all draws", job.draws))
    }
    laws["clock"] = run.clock
    tokens = rows(run, "test", job.windows, job.seed)[job.index :: job.workers]
    arms: dict[str, list[Tensor]] = {}
    for _ in range(job.repeats):
        for name, law in laws.items():
            for mirrored in (False, True):
                parts = [integral(run, part, law, job.draws, mirrored, generator) for part in tokens.split(BATCH)]
                arms.setdefault(f"{name}, {'mirrored' if mirrored else 'plain'}", []).append(torch.cat(parts))
    return {name: torch.stack(values) for name, values in arms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--windows", type=int, default=128, help="of the test split; a multiple of 32 for each worker")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="one-core processes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    shared = (options.workers, options.windows, options.repeats, options.draws, options.seed)
    parts = in_parallel(one, [Job(options.run, i, *shared) for i in range(options.workers)], options.workers)
    variances = {name: torch.cat([part[name] for part in parts], 1).var(0) for name in parts[0]}
    reference, table = variances["pilot for one draw, plain"], {}
    for name, variance in variances.items():
        share = (variance.mean() / reference.mean()).item()
        # Over windows, numerator and denominator together.
        error = ((variance - share * reference).std() / math.sqrt(len(variance)) / reference.mean()).item()
        table[name] = {"variance_share": share, "stderr": error, "sd_nats": variance.mean().sqrt().item()}
        print(f"{name:32} variance {share:.3f} ± {error:.3f} of the plain one's")
    figures = {"windows": options.windows, "repeats": options.repeats, "draws": options.draws, "arms": table}
    print(record("draws", {**figures, "seed": options.seed, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
