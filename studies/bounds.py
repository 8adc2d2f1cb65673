"""How good are the likelihood bounds of a base, and what do they cost?

Three questions on the run's test split. How much less do one-draw estimates of the NELBO vary under the run's law of
time, the one `score` uses, or a pilot's, than under uniform t (bar: 0.4)? How near does the finite-step bound come in
few calls, and what does an optimised grid gain over the clock's (bars: within 3% at 16 calls, better at 4)? How long
does the test split take (bar: 100,000 characters to 0.01 bits/char in 2 minutes of 2 cores)?
"""

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from common import in_parallel, record
from torch import Tensor

from catmaps.flow.finite_step import best_grid, finite_step_bound, step_costs
from catmaps.flow.likelihood import Bound, capped_cross_entropy, nelbo, path_draws, pilot
from catmaps.flow.times import Law, grid, uniform
from catmaps.model import Run, compile_blocks, load_run
from catmaps.scores import ratio_stderr
from catmaps.scoring import likelihood_law
from catmaps.text.shards import sequences
from catmaps.training.train import find_shards

BATCH = 32  # the one shape that code is compiled for
DRAWS = {1: 2, 2: 8, 4: 6, 8: 4, 16: 3, 32: 2}  # of every step, by calls
CANDIDATES = 96


class Job(NamedTuple):
    """What a worker does: its share of the windows, `index` of `workers`."""

    path: Path
    index: int
    workers: int
    windows: int
    few: int
    seed: int


class Part(NamedTuple):
    """Nats by window, and standard errors where they are known."""

    spread: dict[str, Tensor]
    bounds: dict[str, Bound]
    whole: Bound
    grids: dict[int, list[float]]
    seconds: float
    cpu_seconds: float


def rows(run: Run, split: str, count: int, seed: int) -> Tensor:
    shards, length = find_shards(run.config), run.config.data.length
    return torch.from_numpy(sequences(shards, split, length, count=count, seed=seed))


def joined(bounds: list[Bound]) -> Bound:
    return Bound(*(torch.cat(values) for values in zip(*bounds, strict=True)))


def one_draw(run: Run, law: Law, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """One draw of the path's integral for every window, nats."""
    shape = (BATCH, tokens.shape[1], run.tokenizer.vocab_size)
    draws = []
    for part in tokens.split(BATCH):
        place = torch.rand(len(part), generator=generator, dtype=torch.float64)
        draws.append(path_draws(run.flow_map, part, place, law, torch.randn(shape, generator=generator)).sum(1))
    return torch.cat(draws)


def one(job: Job) -> Part:
    run, generator = load_run(job.path), torch.Generator().manual_seed(job.seed + job.index)
    compile_blocks(run.network)
    valid, same = rows(run, "valid", BATCH, job.seed), torch.Generator().manual_seed(job.seed)
    law = likelihood_law(run)
    nelbo(run.flow_map, valid, law, num_samples=2, generator=same)  # compiles
    whole = rows(run, "test", job.windows, job.seed)[job.index :: job.workers]
    began, cpu = time.monotonic(), time.process_time()
    scored = joined([nelbo(run.flow_map, part, law, num_samples=8, generator=generator) for part in whole.split(BATCH)])
    took, cpu = time.monotonic() - began, time.process_time() - cpu

    laws = {"uniform": uniform(), "clock": run.clock, "run": run.law, "score": law}
    laws["pilot"] = pilot(run.flow_map, valid, run.clock, num_samples=1, generator=same)
    some = whole[: len(whole) // BATCH * BATCH][: 8 * BATCH]
    spread = {name: one_draw(run, one_law, some, generator) for name, one_law in laws.items()}

    few = rows(run, "test", job.few, job.seed + 1)[job.index :: job.workers]
    candidates = grid(run.clock, CANDIDATES)
    costs = step_costs(run.flow_map, valid, candidates, generator=same)
    grids = {n: best_grid(costs, candidates, n) for n in DRAWS}
    bounds: dict[str, list[Bound]] = {}
    for part in few.split(BATCH):
        bounds.setdefault("nelbo", []).append(nelbo(run.flow_map, part, law, num_samples=64, generator=generator))
        loose = nelbo(run.flow_map, part, law, generator=generator, integrand=capped_cross_entropy)
        bounds.setdefault("cross-entropy", []).append(loose)
        for n, draws in DRAWS.items():
            for name, times in (("clock", grid(run.clock, n)), ("best", grids[n])):
                # The same noise for both grids, so that their difference is sharper than either.
                paired = torch.Generator().manual_seed(1000 * n + job.index)
                bound = finite_step_bound(run.flow_map, part, times, num_samples=draws, generator=paired)
                bounds.setdefault(f"{n} {name}", []).append(bound)
    return Part(
        spread,
        {name: joined(parts) for name, parts in bounds.items()},
        scored,
        {n: [round(t, 4) for t in times.tolist()] for n, times in grids.items()},
        took,
        cpu,
    )


def summary(bound: Bound, scale: float) -> dict[str, float]:
    """Bits per character: mean over windows, error from sampling, error over windows."""
    count, tokens = len(bound.nats), torch.ones(len(bound.nats), dtype=torch.float64)
    return {
        "bits_per_char": bound.nats.mean().item() * scale,
        "stderr_monte_carlo": bound.stderr.square().sum().sqrt().item() / count * scale,
        "stderr_windows": ratio_stderr(bound.nats, tokens) / count * scale,
    }


def finite_steps(bounds: dict[str, Bound], scale: float) -> list[dict[str, float | int | str]]:
    """One row per bound, with its excess over the NELBO of the same windows and that excess' error from sampling."""
    tight = summary(bounds["nelbo"], scale)
    table: list[dict[str, float | int | str]] = []
    for name, bound in bounds.items():
        row = summary(bound, scale)
        error = math.hypot(row["stderr_monte_carlo"], tight["stderr_monte_carlo"])
        excess = row["bits_per_char"] / tight["bits_per_char"] - 1
        own = {} if name == "nelbo" else {"excess": excess, "excess_stderr": error / tight["bits_per_char"]}
        table.append({"bound": name, **row, **own})
    return table


def gain(bounds: dict[str, Bound], calls: int, scale: float) -> dict[str, float]:
    """What the best grid takes off the clock's, bits per character, with the paired error over windows."""
    difference = (bounds[f"{calls} clock"].nats - bounds[f"{calls} best"].nats) * scale
    return {"bits_per_char": difference.mean().item(), "stderr": (difference.std() / math.sqrt(len(difference))).item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--windows", type=int, default=1664, help="of the test split, for the NELBO")
    parser.add_argument("--few", type=int, default=64, help="windows for the finite-step bound")
    parser.add_argument("--workers", type=int, default=2, help="one-core processes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    jobs = [
        Job(options.run, i, options.workers, options.windows, options.few, options.seed) for i in range(options.workers)
    ]
    parts = in_parallel(one, jobs, options.workers)
    scale = 1 / (load_run(options.run).config.data.length * math.log(2))  # 27 symbols: a token is a character
    spread = {name: torch.cat([part.spread[name] for part in parts]) for name in parts[0].spread}
    relative = {name: (draws.std() / draws.mean()).item() for name, draws in spread.items()}
    bounds = {name: joined([part.bounds[name] for part in parts]) for name in parts[0].bounds}
    whole = summary(joined([part.whole for part in parts]), scale)
    seconds = {"wall": max(p.seconds for p in parts), "cpu": sum(p.cpu_seconds for p in parts)}
    for name, value in relative.items():
        print(f"one draw, {name:8} relative s.d. {value:.3f}, {value / relative['uniform']:.2f} of uniform t's")
    table, gains = finite_steps(bounds, scale), {n: gain(bounds, n, scale) for n in DRAWS}
    for row in table:
        print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{v:14}" for k, v in row.items()))
    for n, row in gains.items():
        print(f"best grid at {n:2} calls: {row['bits_per_char']:.4f} ± {row['stderr']:.4f} bits/char below the clock's")
    characters = options.windows / scale / math.log(2)
    print(f"test split, {characters:.0f} characters, 8 draws: {whole}, {seconds['wall']:.0f} s")
    figures = {
        "one_draw_relative_sd": relative,
        "one_draw_windows": len(spread["run"]),
        "finite_step": table,
        "finite_step_windows": options.few,
        "draws_per_step": DRAWS,
        "grid_gain": gains,
        "grids": parts[0].grids,
        "test_split": {**whole, "characters": characters, "samples_per_window": 8, "seconds": seconds},
        "seed": options.seed,
        "seconds": time.monotonic() - began,
    }
    print(record("bounds", figures))


if __name__ == "__main__":
    main()
