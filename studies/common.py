"""What all studies share: trainings in parallel one-core processes, and records that say where figures come from."""

import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from catmaps.allocator import keep_freed_memory
from catmaps.studies.results import machine

RESULTS = Path(__file__).parent / "results"
T = TypeVar("T")
R = TypeVar("R")
BEGAN_ON = machine()  # now, not when a record is written: code may have changed since, or another study left its own


def record(name: str, figures: dict[str, Any]) -> Path:
    """Writes results/NAME.json with the command, the machine and the date."""
    RESULTS.mkdir(exist_ok=True)
    command = " ".join(["python", f"studies/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    head = {"command": command, "date": time.strftime("%Y-%m-%d"), "machine": BEGAN_ON}
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps({**head, **figures}, indent=1) + "\n", encoding="utf-8")
    return file


def paired(own: Mapping[int, float], beside: Mapping[int, float]) -> tuple[float, float, float]:
    """Figures by seed beside another arm's: (mean, mean of the seeds' differences, its standard error)."""
    gaps = [value - beside[seed] for seed, value in own.items()]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    return statistics.mean(own.values()), statistics.mean(gaps), error


def _as_a_command() -> None:
    """One thread, the allocator of the commands, and no warnings of libraries."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch|olmo_core")
    torch.set_num_threads(1)
    keep_freed_memory()


def in_parallel(work: Callable[[T], R], jobs: Iterable[T], workers: int) -> list[R]:
    """Does jobs in processes of one thread each, in order."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_as_a_command) as pool:
        return list(pool.map(work, jobs))
