"""Studies of seconds, on the shards and networks of tiny_runs; their tasks are done in the calling process."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tiny_runs import LENGTH

from catmaps.errors import UserError
from catmaps.studies import running, worker
from catmaps.studies.study import Study, read_study
from catmaps.studies.worker import REFUSED, Task

SMALL = {
    "data.length": LENGTH,
    "network.width": 16,
    "network.blocks": 1,
    "network.heads": 2,
    "network.conditioning": 8,
    "optimiser.name": "adamw",
    "optimiser.warmup": 4,
    "training.batch": 16,
    "training.micro_batch": 16,
    "training.precision": "fp32",
    "training.compile": False,
    "training.log_every": 1,
    "training.evaluate_every": 10,
    "training.evaluate_sequences": 8,
    "training.save_every": 100,
}
STEPS = 20


def described(shards: Path, **changes: Any) -> dict[str, Any]:
    """A study.json: two rates, two seeds, 20 steps. A change to None leaves a field out."""
    values: dict[str, Any] = {
        "name": "tried",
        "question": "Which rate?",
        "preset": "tiny",
        "common": SMALL | {"data.shards": str(shards)},
        "arms": {"slow": {"optimiser.lr": 0.0003}, "fast": {"optimiser.lr": 0.01}},
        "seeds": [0, 1],
        "budget": {"tokens": STEPS * 16 * LENGTH},
        "baseline": "slow",
        "measures": [{"name": "nelbo", "windows": 8}, "curve", "bins"],
    }
    return {name: value for name, value in (values | changes).items() if value is not None}


def written(folder: Path, values: dict[str, Any]) -> Study:
    folder.mkdir(exist_ok=True)
    (folder / "study.json").write_text(json.dumps(values))
    study = read_study(folder)
    study.check()
    return study


@contextmanager
def in_this_process(done: list[Task] | None = None) -> Iterator[None]:
    """`run_study` without processes of its own; `done` gets its tasks."""

    def one_by_one(tasks: Sequence[Task], workers: int, ended: Callable[[Task, int], None]) -> None:
        del workers
        for task in tasks:
            if done is not None:
                done.append(task)
            try:
                worker.work(task)
                ended(task, 0)
            except UserError as error:
                task.log.write_text(f"catmaps: {error}\n")
                ended(task, REFUSED)

    with patch.object(running, "in_processes", one_by_one):
        yield
