"""What happens around the steps: metrics as JSONL and to a tracker, a progress line, validation."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from jaxtyping import Int
from olmo_core.distributed.utils import all_gather_object, broadcast_object, get_rank, get_world_size
from olmo_core.train.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from catmaps.config import Config
from catmaps.errors import UserError
from catmaps.model import EVENTS, METRICS
from catmaps.training.module import FlowTrainModule
from catmaps.training.parallelize import let_go
from catmaps.training.tracking import TRACKERS, Tracker


def _module(callback: Callback) -> FlowTrainModule:
    module = callback.trainer.train_module
    assert isinstance(module, FlowTrainModule)
    return module


def record(folder: Path, step: int, event: str, **what: str | float | int | None) -> None:
    """A line of events.jsonl: what happened besides steps."""
    with (folder / EVENTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": round(time.time(), 2), "step": step, "event": event, **what}) + "\n")


def _rows(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but for a half one that a killed process left at the end; UserError for others."""
    lines, rows = file.read_text(encoding="utf-8", errors="replace").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"]), "seconds": row["seconds"], "cpu_seconds": row["cpu_seconds"]})
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise UserError(f"{file} is damaged in line {number}; remove that line, or the file") from error
    return rows


def _summary(rows: list[dict[str, float]], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return sum(values) if name == "skipped" else sum(values) / len(values)


@dataclass
class TrackingCallback(Callback):
    """Hands the rows of metrics.jsonl to the run's tracker, if it has one; in the first process alone.

    No fault of a tracker ends a training: it is told on stderr and in events.jsonl, and the training goes on without.
    """

    config: Config = field(default_factory=Config)
    folder: Path = field(default_factory=Path)
    _tracker: Tracker | None = None
    _failed: bool = False

    def pre_train(self) -> None:
        to = self.config.tracking.to
        if to != "none" and get_rank() == 0:
            with self._going_on():
                self._tracker = TRACKERS[to](self.config, self.folder, self.step)

    def write(self, step: int, row: dict[str, float | int]) -> None:
        """Repeats a row of metrics.jsonl."""
        if self._tracker is not None:
            with self._going_on():
                self._tracker.write(step, {name: value for name, value in row.items() if name != "step"})

    def on_error(self, exc: BaseException) -> None:
        del exc
        self._failed = True

    def close(self) -> None:
        if self._tracker is not None:
            with self._going_on():
                self._tracker.close(self._failed)
        self._tracker = None

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """A tracker may fail in any way, of which none is worth a training."""
        try:
            yield
        except Exception as error:
            self._tracker = None
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            sys.stderr.write(f"catmaps: tracking by {self.config.tracking.to} ended, training goes on: {what}\n")
            record(self.folder, self.step, "tracking ended", error=what)


@dataclass
class MetricsCallback(Callback):
    """Appends to metrics.jsonl, every `log_every` steps, the means since the last line. Shows progress."""

    folder: Path = field(default_factory=Path)
    bounded: set[int] = field(default_factory=set)
    """Steps whose likelihood bound is on record."""
    tracking: TrackingCallback = field(default_factory=TrackingCallback)
    _pending: list[dict[str, float]] = field(default_factory=list)
    _began: float = 0.0
    _before: float = 0.0
    _began_cpu: float = 0.0
    _before_cpu: float = 0.0
    _progress: Any = None
    _task: Any = None

    def pre_train(self) -> None:
        self._began, self._began_cpu = time.monotonic(), time.process_time()
        if get_rank() == 0:
            self._forget_what_was_undone()
        self.bounded = broadcast_object(self.bounded)
        if get_rank() != 0:
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
        )
        self._progress = Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(
            self.folder.name, total=_module(self).config.training.steps, completed=self.step, note=""
        )
        self._progress.start()

    def _forget_what_was_undone(self) -> None:
        """A resumed run repeats the steps after its last checkpoint: their old lines go."""
        file = self.folder / METRICS
        if not file.exists():
            return
        kept = [row for row in _rows(file) if row["step"] <= self.step]
        self.bounded = {row["step"] for row in kept if "nelbo_bits_per_char" in row}
        self._before = max((row["seconds"] for row in kept), default=0.0)
        self._before_cpu = max((row["cpu_seconds"] for row in kept), default=0.0)
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        config = _module(self).config
        tokens = step * config.training.batch * config.data.length
        seconds = self._before + time.monotonic() - self._began
        cpu = self._before_cpu + time.process_time() - self._began_cpu
        row = {"step": step, "tokens": tokens, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), **values}
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.tracking.write(step, row)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        own = {name: value for name, value in metrics.items() if "/" not in name}
        if get_rank() != 0 or "loss" not in own:
            return
        if "skipped" in own:
            norm = own["gradient_norm"]
            record(self.folder, step, "skipped", gradient_norm=norm if math.isfinite(norm) else None)
            own = {"skipped": 1.0}
        self._pending.append(own)
        training = _module(self).config.training
        if step % training.log_every == 0 or step in (1, training.steps):
            self.write(step, {name: _summary(self._pending, name) for name in sorted(set().union(*self._pending))})
            if self._progress is not None:
                taken = any("loss" in row for row in self._pending)
                note = f"loss {_summary(self._pending, 'loss'):.4f}" if taken else "skipped"
                self._progress.update(self._task, completed=step, note=note)
            self._pending = []

    def state_dict(self) -> dict[str, Any]:
        return {"pending": self._pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict.get("pending", [])

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


@dataclass
class ValidationCallback(Callback):
    """Every so many steps the likelihood bound of the moving average on validation text; also of weights that a run
    begins with."""

    tokens: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    every: int = 0
    characters_per_token: float = 1.0
    metrics: MetricsCallback = field(default_factory=MetricsCallback)

    def pre_train(self) -> None:
        if self.every and self.step == 0 and _module(self).config.start is not None:
            self.evaluate()

    def post_train_batch(self) -> None:
        if self.every and self.step % self.every == 0:
            self.evaluate()

    def post_train(self) -> None:
        if self.every:
            self.evaluate()

    def evaluate(self) -> None:
        """Writes bits per character and its standard error over texts to metrics.jsonl (process 0).

        Processes that share a network all call it, with the same texts and the same random numbers.
        """
        module = _module(self)
        if (get_rank() != 0 and not module.sharded) or len(self.tokens) < 2 or self.step in self.metrics.bounded:
            return
        self.metrics.bounded.add(self.step)
        mean, stderr = validation_bound(module, self.tokens)
        let_go(module.average)
        if get_rank() == 0:
            scale = 1 / (math.log(2) * self.characters_per_token)
            self.metrics.write(self.step, {"nelbo_bits_per_char": mean * scale, "nelbo_stderr": stderr * scale})


SLOW = 1.5
"""A process whose passes take this many times the median of all is a straggler, if by SLOWER seconds a step."""
SLOWER = 0.05


@dataclass
class StragglerCallback(Callback):
    """Every `log_every` steps: compares how long processes were busy, and puts one that holds up the others on record.

    Processes that share a network wait for each other within a pass; among them nobody stands out.
    """

    folder: Path = field(default_factory=Path)
    _busy: list[float] = field(default_factory=list)

    def post_train_batch(self) -> None:
        module = _module(self)
        self._busy.append(module.busy)
        if get_world_size() == 1 or self.step % module.config.training.log_every:
            return
        seconds = all_gather_object(sum(self._busy) / len(self._busy))
        self._busy = []
        slowest, usual = max(seconds), median_low(seconds)
        if get_rank() == 0 and slowest > max(SLOW * usual, usual + SLOWER):
            process = seconds.index(slowest)
            record(self.folder, self.step, "straggler", process=process, seconds=slowest, median=usual)


def validation_bound(module: FlowTrainModule, tokens: Int[Tensor, "n l"]) -> tuple[float, float]:
    """Mean and standard error over texts of the family's bound, nats per token, with fixed random numbers."""
    device = module.network.log_prior.device
    bound = module.objective.bound(module.average, module.law, torch.Generator(device).manual_seed(0))
    nats = torch.cat([bound(part.to(device)).nats for part in tokens.split(module.config.training.micro_batch)])
    per_token = nats / tokens.shape[1]
    return per_token.mean().item(), (per_token.std() / math.sqrt(len(per_token))).item()
