"""Trains and measures an arm with a seed in its folder; what is done is not repeated, what was stopped goes on."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from catmaps.config import Config, to_json
from catmaps.errors import UserError
from catmaps.evaluation.collect import read_metrics
from catmaps.model import CHECKPOINTS, CONFIG, METRICS, Run, compile_blocks, load_run
from catmaps.studies.measures import Measured, measured
from catmaps.studies.results import RESULT, Line, begin_line, lacking, write_json
from catmaps.studies.study import Job, Study

WARM, TIMED = 8, 16
"""Steps of a pilot: not counted, as compilation and first touches fall into them; and counted."""
PILOT = "pilot.json"


class Stopped(Exception):
    """A signal ended a training, which has saved."""


def pilot(study: Study, job: Job, out: Path) -> None:
    """Times a few steps of an arm and writes out/ARM.pilot.json: CPU seconds of a step, after warm-up."""
    from catmaps.training.train import start

    folder = out / f".{job.arm.name}.pilot"
    shutil.rmtree(folder, ignore_errors=True)
    config = study.config(job, WARM + TIMED)
    quiet = replace(config.training, evaluate_every=0, log_every=1, save_every=WARM + TIMED + 1)
    start(replace(config, training=quiet), folder)
    _train(folder)
    rows = {row["step"]: row["cpu_seconds"] for row in _metrics(folder) if "loss" in row}
    seconds = max(1e-4, (rows[WARM + TIMED] - rows[WARM]) / TIMED)
    write_json({"cpu_seconds_per_step": seconds, "steps_timed": TIMED}, out / f"{job.arm.name}.{PILOT}")
    shutil.rmtree(folder)


def complete(study: Study, job: Job, out: Path, steps: int) -> None:
    """Trains to the end and takes every measure that is lacking; result.json in the run's folder is the line so far."""
    folder = out / job.name
    line = begun(study, job, folder, steps)
    if not (_latest(folder) == steps and _on_record(folder, steps)):
        _train(folder)
    run = load_run(folder)
    rows = read_metrics(run)
    line |= {
        "complete": True,
        "parameters": sum(run.network.num_parameters()),
        **{name: max(row[name] for row in rows) for name in ("seconds", "cpu_seconds", "tokens")},
    }
    compiled = run.config.training.compile and (run.baseline is None or not run.baseline.sequential)
    if compiled and lacking(study, line):
        compile_blocks(run.network)
    for name, options in lacking(study, line):
        line["measures"][name] = _measure(run, name, options, job.seed)
        write_json(line, folder / RESULT)
    line["measures"] = {name: line["measures"][name] for name, _ in study.measures}
    write_json(line, folder / RESULT)


def rung(study: Study, job: Job, out: Path, steps: int, share: float) -> None:
    """Trains a rung: what a run of this share of the steps would be at its end, and its first measure.

    The run itself, whose rate falls at the end of all steps, is carried on up to where the rate of the shorter run
    would begin to fall. A copy of it then ends as the shorter run, to the bit, and is measured and removed.
    """
    from catmaps.training.train import restart

    folder, branch = out / job.name, out / f".{job.name}.rung-{share:g}"
    line = begun(study, job, folder, steps)
    short = rung_steps(steps, share)
    stop = stable_steps(study.config(job, short))
    latest = _latest(folder)
    if latest < stop:
        _train(folder, stop)
        latest = stop
    if not (branch / CONFIG).exists():
        if latest == stop > 0:
            clone(folder, branch, stop, short)
        else:  # the run has gone past: from the start then, which is the same, if longer
            restart(study.config(job, short), branch)
    _train(branch)
    name, options = study.measures[0]
    first = _measure(load_run(branch), name, options, job.seed)
    line["rungs"][f"{share:g}"] = {"steps": short, "measure": name, **first}
    write_json(line, folder / RESULT)
    shutil.rmtree(branch)


def rung_steps(steps: int, share: float) -> int:
    return max(1, round(share * steps))


def stable_steps(config: Config) -> int:
    """Steps of a run before its rate begins to fall (`training.optim.rate`)."""
    return math.floor(config.training.steps * (1 - config.optimiser.decay))


def clone(folder: Path, branch: Path, step: int, steps: int) -> None:
    """Copies a stopped run, with its checkpoint of `step` alone, as one of `steps` steps; whole or not at all."""
    from catmaps.model import read_config

    config, draft = read_config(folder), branch.with_name(branch.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    other = shutil.ignore_patterns(CHECKPOINTS, RESULT)
    shutil.copytree(folder, draft, ignore=other)
    shutil.copytree(folder / CHECKPOINTS / f"step{step}", draft / CHECKPOINTS / f"step{step}")
    shorter = replace(config, training=replace(config.training, steps=steps))
    (draft / CONFIG).write_text(to_json(shorter), encoding="utf-8")
    draft.rename(branch)


def begun(study: Study, job: Job, folder: Path, steps: int) -> Line:
    """The run's folder, made if need be, and its line so far."""
    from catmaps.training.train import restart

    restart(study.config(job, steps), folder)
    file = folder / RESULT
    line = json.loads(file.read_text(encoding="utf-8")) if file.exists() else begin_line(study, job, steps)
    line.pop("failed", None)
    return line


def _measure(run: Run, name: str, options: dict[str, Any], seed: int) -> dict[str, Any]:
    return {"options": options, **_plain(measured(run, name, options, seed))}


def _plain(found: Measured) -> dict[str, Any]:
    """As JSON, which has no NaN: null."""

    def number(value: float) -> float | None:
        return float(f"{value:.6g}") if math.isfinite(value) else None

    for name, figure in found.figures.items():
        if not math.isfinite(figure.value):
            raise UserError(f"{name} is {figure.value}")
    figures = {
        name: {"value": float(figure.value), "stderr": number(figure.stderr), "better": figure.better}
        for name, figure in found.figures.items()
    }
    curves = {
        name: {"x": curve.x, "y": curve.y, "points": [[number(x), number(y)] for x, y in curve.points]}
        for name, curve in found.curves.items()
    }
    return {"figures": figures, "curves": curves}


def _train(folder: Path, stop_after: int | None = None) -> None:
    from catmaps.training.train import train

    outcome = train(folder, stop_after=stop_after)
    if outcome.step < (stop_after or outcome.steps):
        raise Stopped(f"{folder} stopped at step {outcome.step}")


def _latest(folder: Path) -> int:
    """Step of the last complete checkpoint; 0: none."""
    from catmaps.training.checkpoints import complete

    return max((step for step, _ in complete(folder / CHECKPOINTS)), default=0)


def _metrics(folder: Path) -> list[dict[str, Any]]:
    file = folder / METRICS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _on_record(folder: Path, steps: int) -> bool:
    """Whether the last step's loss, and its validation if there is any, have been written."""
    from catmaps.model import read_config

    last = [row for row in _metrics(folder) if row["step"] == steps]
    validated = read_config(folder).training.evaluate_every == 0 or any("nelbo_bits_per_char" in row for row in last)
    return validated and any("loss" in row for row in last)
