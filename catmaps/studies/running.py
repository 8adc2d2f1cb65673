"""Runs a study: what is missing, in one-thread processes; results.jsonl is up to date after every arm."""

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catmaps.config import flat
from catmaps.errors import UserError
from catmaps.model import CONFIG, read_config
from catmaps.studies.results import (
    RESULT,
    Line,
    begin_line,
    changed,
    lacking,
    must_agree,
    read_results,
    update_results,
    write_json,
)
from catmaps.studies.study import Arm, Job, Study
from catmaps.studies.worker import REFUSED, Task

POLL = 0.1  # seconds between two looks at the processes


class Interrupted(Exception):
    """SIGINT or SIGTERM came; trainings have saved. Its argument is the exit status."""


@dataclass
class Progress:
    """What a call of `run_study` did."""

    trained: list[str]
    failed: list[str]
    """Arms with a seed that did not end well, or are waiting for what did not."""
    done_before: int


def run_study(
    study: Study,
    out: Path,
    *,
    workers: int = 2,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    say: Callable[[str], None] = print,
) -> Progress:
    """Trains and measures what is missing of a study.

    Args:
        study: What is asked for.
        out: Folder of the runs, made if need be.
        workers: Processes, of one thread each.
        arms, seeds: Only these; none: all.
        say: Told of every arm that ends.

    Raises:
        UserError: What was trained is not what study.json says, or no such arm or seed.
        Interrupted: A signal came.
    """
    study.check()
    chosen = [study.arm(name) for name in arms] or list(study.arms)
    if odd := [seed for seed in seeds if seed not in study.seeds]:
        raise UserError(f"{study.file} has no seed {odd[0]}; there are {', '.join(map(str, study.seeds))}")
    if study.halving is not None and (arms or seeds):
        raise UserError("halving compares all arms: leave out --arms and --seeds")
    out.mkdir(parents=True, exist_ok=True)
    runner = Runner(study, out, workers, say)
    runner.check()
    with _signals():
        runner.pilot(chosen)
        runner.check()
        jobs = [Job(arm, seed) for seed in seeds or study.seeds for arm in chosen]
        if study.halving is not None:
            survivors = runner.halve()
            jobs = [job for job in jobs if job.arm in survivors]
        runner.complete(jobs)
    return runner.progress


class Runner:
    """A study on its way. Lines are those of results.jsonl, or of a run's result.json, which is newer."""

    def __init__(self, study: Study, out: Path, workers: int, say: Callable[[str], None]) -> None:
        self.study, self.out, self.workers, self.say = study, out, workers, say
        self.jobs = [Job(arm, seed) for arm in study.arms for seed in study.seeds]
        self.progress = Progress([], [], 0)

    def line(self, job: Job) -> Line | None:
        file = self.out / job.name / RESULT
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        return read_results(self.study).get((job.arm.name, job.seed))

    def check(self) -> None:
        """UserError if a line or a run is not what study.json says."""
        for job in self.jobs:
            for line in (self.line(job), read_results(self.study).get((job.arm.name, job.seed))):
                if line is not None:
                    must_agree(self.study, job, line)
            folder, steps = self.out / job.name, self.steps(job.arm)
            if steps is None or not (folder / CONFIG).is_file():
                continue
            own, begun = flat(self.study.config(job, steps)), flat(read_config(folder))
            for name in own:
                if own[name] != begun[name]:
                    raise changed(self.study, job, name, begun[name], own[name])

    def steps(self, arm: Arm) -> int | None:
        """Steps of an arm's trainings; None while its pilot is wanting."""
        if (steps := self.study.steps(arm)) is not None:
            return steps
        file = self.out / f"{arm.name}.pilot.json"
        if file.exists():
            seconds = json.loads(file.read_text(encoding="utf-8"))["cpu_seconds_per_step"]
            return max(1, round(60 * self.study.budget["cpu_minutes"] / seconds))
        lines = (read_results(self.study).get((arm.name, seed)) for seed in self.study.seeds)
        return next((line["steps"] for line in lines if line is not None), None)

    def pilot(self, arms: Sequence[Arm]) -> None:
        """Where the budget is in CPU minutes: times a few steps of every arm, which fixes its steps for good."""
        wanting = [arm for arm in arms if self.steps(arm) is None]
        tasks = [self._task("pilot", Job(arm, self.study.seeds[0])) for arm in wanting]

        def ended(task: Task, status: int) -> None:
            if status:
                raise UserError(f"the pilot of {task.arm} failed: {_last_line(task.log)}")
            self.say(f"{task.arm}: {self.steps(self.study.arm(task.arm))} steps, by its pilot")

        in_processes(tasks, self.workers, ended)

    def complete(self, jobs: Sequence[Job]) -> None:
        """Trains to the end and measures."""
        tasks = []
        for job in jobs:
            line = self.line(job)
            if line is not None and line.get("complete") and not lacking(self.study, line):
                update_results(self.study, self.out, line)
                self.progress.done_before += 1
            else:
                tasks.append(self._task("complete", job))
        in_processes(tasks, self.workers, self._ended)

    def halve(self) -> list[Arm]:
        """Trains rung after rung and returns the arms that go on to the end."""
        halving, alive = self.study.halving, list(self.study.arms)
        assert halving is not None
        for share in halving.rungs[:-1]:
            jobs = [Job(arm, seed) for seed in self.study.seeds for arm in alive]
            wanting = [job for job in jobs if f"{share:g}" not in (self.line(job) or {"rungs": {}})["rungs"]]
            in_processes([self._task("rung", job, share) for job in wanting], self.workers, self._ended)
            better = self._better(alive, share, halving.keep)
            for job in (job for job in jobs if job.arm not in better):
                if (line := self.line(job)) is not None:
                    update_results(self.study, self.out, {**line, "dropped": share})
            if dropped := [arm.name for arm in alive if arm not in better]:
                self.say(f"at {share:g} of the budget: {', '.join(dropped)} dropped")
            alive = better
        return alive

    def _better(self, arms: Sequence[Arm], share: float, keep: float) -> list[Arm]:
        """The better share of every group of arms with a common baseline, and the baseline; failed arms come last."""
        groups: dict[str, list[Arm]] = {}
        for arm in arms:
            groups.setdefault(self.study.baseline_of(arm).name, []).append(arm)
        kept = set()
        for baseline, group in groups.items():
            ranked = sorted(group, key=lambda arm: self._at_rung(arm, share))
            kept |= {baseline, *(arm.name for arm in ranked[: max(1, math.ceil(keep * len(ranked)))])}
        return [arm for arm in arms if arm.name in kept]

    def _at_rung(self, arm: Arm, share: float) -> float:
        """The first figure's mean over seeds, lower being better; infinite if a seed has none."""
        values = []
        for seed in self.study.seeds:
            rung = (self.line(Job(arm, seed)) or {"rungs": {}})["rungs"].get(f"{share:g}")
            if rung is None or not rung["figures"]:
                return math.inf
            figure = next(iter(rung["figures"].values()))
            values.append(-figure["value"] if figure["better"] == "higher" else figure["value"])
        return sum(values) / len(values)

    def _task(self, kind: Any, job: Job, share: float = 1.0) -> Task:
        where = str(self.study.folder), str(self.out)
        return Task(kind, *where, job.arm.name, job.seed, self.steps(job.arm) or 0, share)

    def _ended(self, task: Task, status: int) -> None:
        """Enters a finished, or failed, training in results.jsonl."""
        job = Job(self.study.arm(task.arm), task.seed)
        line = self.line(job) or begin_line(self.study, job, task.steps)
        if status:
            reason = _last_line(task.log) if status > 0 else f"its process was killed by signal {-status}"
            self.progress.failed.append(job.name)
            self.say(f"{job.name} failed: {reason}" + ("" if status == REFUSED else f" ({task.log})"))
            line = {**line, "failed": reason, "complete": False}
            if (folder := self.out / job.name).is_dir():
                write_json(line, folder / RESULT)
        else:
            self.progress.trained.append(job.name)
            self.say(f"{job.name}: {_told(task, line)}")
        update_results(self.study, self.out, line)


def _told(task: Task, line: Line) -> str:
    at_rung = task.kind == "rung"
    shown = line["rungs"][f"{task.share:g}"] if at_rung else next(iter(line["measures"].values()))
    first = next(((name, figure["value"]) for name, figure in shown["figures"].items()), None)
    figure = "measured" if first is None else f"{first[0]} {first[1]:.4f}"
    return f"{figure} at {task.share:g} of the budget" if at_rung else f"{figure} in {line['seconds'] / 60:.1f} minutes"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("catmaps: ")[:300] if lines else "it left no word"


def in_processes(tasks: Sequence[Task], workers: int, ended: Callable[[Task, int], None]) -> None:
    """Does tasks in processes of one thread, so many at a time; `ended` is told of each, with its exit status.

    Whatever ends this early asks the processes to stop and waits until they have saved.
    """
    waiting, running = list(tasks), dict[subprocess.Popen[bytes], Task]()
    one = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                task = waiting.pop(0)
                with task.log.open("wb") as log:  # a session of its own: Ctrl-C reaches it through us alone
                    process = subprocess.Popen(
                        task.command(), stdout=log, stderr=log, env=os.environ | one, start_new_session=True
                    )
                running[process] = task
            for process in [process for process in running if process.poll() is not None]:
                ended(running.pop(process), process.returncode)
            time.sleep(POLL)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


@contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM become `Interrupted`."""

    def stop(number: int, frame: Any) -> None:
        del frame
        raise Interrupted(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
