"""Two stages or one, and who teaches? A map from a finished base against one trained with its base, at equal CPU time.

Arms: from a base of `--base` CPU minutes, `--map` minutes of
  frozen          the frozen base as teacher of the diagonal, the map's own jumps as PSD's targets: `catmaps distill`
  average-jumps   the same with the jumps of the moving average
  data            text as target of the diagonal, no frozen base
  average         the same with anchors and jumps of the moving average
and from nothing, for all of the minutes, at the base's rates,
  joint           diagonal and jumps together, the map its own teacher
  joint-average   the same with the moving average as teacher.
With `--from RUN` the first four alone, all from that base.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from common import in_parallel, paired, record

from catmaps.config import Config, OptimiserConfig, TrainingConfig
from catmaps.evaluation.collect import read_metrics
from catmaps.flow.objective import ObjectiveConfig
from catmaps.model import load_run, read_config
from catmaps.network.denoiser import NetworkConfig
from catmaps.presets import distill_quickstart
from catmaps.studies.measures import few_step, nelbo
from catmaps.training.train import start, train

FROM_BASE = ("frozen", "average-jumps", "data", "average")
JOINT = ("joint", "joint-average")
WARM, TIMED = 10, 40
"""Steps of a pilot that are not timed, and that are."""
CALLS = (1, 4, 8)


class Job(NamedTuple):
    """A training: an arm, or "base"; `base` is the folder that it begins with."""

    arm: str
    seed: int
    out: Path
    base: Path | None
    steps: int = WARM + TIMED


def base_config(seed: int) -> Config:
    return Config(
        preset="stages",
        network=NetworkConfig(width=128, blocks=4, heads=4, neighbours=3),
        optimiser=OptimiserConfig(warmup=40, ema=0.99),
        training=TrainingConfig(
            batch=32, micro_batch=32, seed=seed, threads=1, compile=False, evaluate_every=0, save_every=10**6
        ),
    )


def configure(job: Job) -> Config:
    config = base_config(job.seed)
    mixture = distill_quickstart(config).objective
    if "average" in job.arm:
        mixture = replace(mixture, jumps="average")
    if job.arm in FROM_BASE:
        config = replace(distill_quickstart(read_config(_begun(job))), objective=mixture)
        frozen = job.arm in ("frozen", "average-jumps")
        config = replace(config, base=str(job.base) if frozen else None, start=None if frozen else str(job.base))
    objective = ObjectiveConfig() if job.arm == "base" else mixture
    training = replace(base_config(job.seed).training, steps=job.steps)  # also where a base was trained otherwise
    return replace(config, objective=objective, training=training)


def _begun(job: Job) -> Path:
    assert job.base is not None
    return job.base


def fit(job: Job) -> None:
    if not (job.out / "config.json").exists():
        start(configure(job), job.out)
    train(job.out)


def pilot(job: Job) -> float:
    """CPU seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        fit(job._replace(out=Path(folder) / "pilot"))
        spent = {row["step"]: row["cpu_seconds"] for row in read_metrics(load_run(Path(folder) / "pilot"))}
    return (spent[WARM + TIMED] - spent[WARM]) / TIMED


def measure(job: Job) -> dict[str, float]:
    run = load_run(job.out)
    figures = nelbo(run, seed=0).figures
    if job.arm != "base":
        figures = figures | few_step(run, seed=job.seed, calls=CALLS, samples=512).figures
    minutes = max(row["cpu_seconds"] for row in read_metrics(run)) / 60
    return {name: figure.value for name, figure in figures.items()} | {"cpu_minutes": minutes}


def differences(rows: Sequence[dict[str, Any]], arm: str, figure: str) -> tuple[float, float, float]:
    """(mean, mean difference to `frozen` by seeds, its standard error)."""
    values = {row["seed"]: row["figures"][figure] for row in rows if row["arm"] == arm}
    beside = {row["seed"]: row["figures"][figure] for row in rows if row["arm"] == "frozen"}
    return paired(values, beside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/stages"))
    parser.add_argument("--from", dest="run", type=Path, help="a base, in place of bases of --base minutes")
    parser.add_argument("--base", type=float, default=4.0, help="CPU minutes")
    parser.add_argument("--map", type=float, default=2.0, help="CPU minutes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default="stages", help="of the record")
    options = parser.parse_args()
    out, seeds, workers = options.out, options.seeds, options.workers
    base = {seed: options.run or out / f"base-{seed}" for seed in seeds}
    from_nothing = () if options.run else JOINT

    def steps(jobs: list[Job], minutes: float) -> dict[str, int]:
        seconds = in_parallel(pilot, jobs, workers)
        return {job.arm: round(minutes * 60 / cost) for job, cost in zip(jobs, seconds, strict=True)}

    many: dict[str, int] = {}
    jobs: list[Job] = []
    if options.run is None:
        many |= steps([Job("base", 0, out, None)] * workers, options.base)
        many |= steps([Job(arm, 0, out, None) for arm in JOINT], options.base + options.map)
        jobs += [Job(arm, seed, out / f"{arm}-{seed}", None, many[arm]) for arm in (*JOINT, "base") for seed in seeds]
        in_parallel(fit, jobs, workers)
    many |= steps([Job(arm, 0, out, base[seeds[0]]) for arm in FROM_BASE], options.map)
    later = [Job(arm, seed, out / f"{arm}-{seed}", base[seed], many[arm]) for arm in FROM_BASE for seed in seeds]
    in_parallel(fit, later, workers)
    jobs += later
    measured = in_parallel(measure, jobs, workers)
    rows = [
        {"arm": job.arm, "seed": job.seed, "steps": job.steps, "figures": figures}
        for job, figures in zip(jobs, measured, strict=True)
    ]
    names = ["nelbo", *(f"{way} bits @{n}" for n in CALLS for way in ("forward", "reverse"))]
    for arm in (*FROM_BASE, *from_nothing):
        print(f"{arm}, {many[arm]} steps")
        for name in names:
            mean, gap, error = differences(rows, arm, name)
            print(f"  {name:18} {mean:.3f}  {gap:+.3f} +- {error:.3f}")
    print(record(options.name, {"base_minutes": options.base, "map_minutes": options.map, "steps": many, "rows": rows}))


if __name__ == "__main__":
    main()
