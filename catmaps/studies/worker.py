"""One task of a study in a process of one thread: `python -m catmaps.studies.worker TASK`, as `running` starts it."""

import json
import os
import signal
import sys
import threading
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from catmaps.allocator import keep_freed_memory
from catmaps.errors import UserError

STOPPED, REFUSED = 143, 2
"""Exit statuses: a signal came, and all is saved; a UserError, whose line is the last on stderr."""


@dataclass(frozen=True)
class Task:
    """What a process is to do with an arm."""

    kind: Literal["pilot", "rung", "complete"]
    folder: str
    """Of study.json."""
    out: str
    """Of the runs."""
    arm: str
    seed: int
    steps: int = 0
    share: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}" if self.kind != "pilot" else f"{self.arm}.pilot"

    @property
    def log(self) -> Path:
        return Path(self.out) / f"{self.name}.log"

    def command(self) -> list[str]:
        return [sys.executable, "-m", "catmaps.studies.worker", json.dumps(asdict(self))]


def work(task: Task) -> None:
    """Does it; one process at a time has an arm.

    Raises:
        UserError: The arm failed, or another process has it.
    """
    from catmaps.studies import arms
    from catmaps.studies.study import Job, read_study

    study, out = read_study(Path(task.folder)), Path(task.out)
    job = Job(study.arm(task.arm), task.seed)
    try:
        with FileLock(out / f".{task.name}.lock", timeout=0):
            if task.kind == "pilot":
                arms.pilot(study, job, out)
            elif task.kind == "rung":
                arms.rung(study, job, out, task.steps, task.share)
            else:
                arms.complete(study, job, out, task.steps)
    except Timeout as error:
        raise UserError(f"{task.name} is being trained by another process") from error


def _end_with(parent: int) -> None:
    """A parent that was killed takes its children along, as if they had been asked to stop."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def main(argv: list[str]) -> int:
    values: dict[str, Any] = json.loads(argv[1])
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch|olmo_core")
    keep_freed_memory()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()

    import torch

    from catmaps.studies.arms import Stopped

    torch.set_num_threads(1)
    try:
        work(Task(**values))
    except Stopped as stopped:
        sys.stderr.write(f"catmaps: {stopped}\n")
        return STOPPED
    except UserError as error:
        sys.stderr.write(f"catmaps: {' '.join(str(error).split())}\n")
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
