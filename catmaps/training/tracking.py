"""Metrics repeated to TensorBoard, Weights & Biases or Trackio, beside metrics.jsonl, which is always written.

`TrackingCallback` calls them, in the first process of a training alone.
"""

import contextlib
import importlib.util
import json
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from catmaps.config import Config, TrackingConfig, flat
from catmaps.errors import UserError

IDENTITY = "tracking.json"
"""In the run's folder: under which name a tracker knows it, so that a resumed run goes on with the same curves."""


@runtime_checkable
class Tracker(Protocol):
    """Where rows go."""

    def write(self, step: int, row: dict[str, float | int]) -> None:
        """Takes a row of metrics.jsonl."""
        ...

    def close(self, failed: bool) -> None:
        """Hands on what is left; `failed`: the training ended by an error."""
        ...


class TensorBoard:
    """Event files in RUN/tensorboard. Steps that a resumed run does again replace the old ones."""

    def __init__(self, config: Config, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        if not step:
            self._writer.add_text("config", json.dumps(flat(config), indent=2), 0)

    def write(self, step: int, row: dict[str, float | int]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        del failed
        self._writer.close()


class WandB:
    """A run of Weights & Biases, over `step`. Its environment variables hold: WANDB_MODE=offline, WANDB_ENTITY."""

    def __init__(self, config: Config, folder: Path, step: int) -> None:
        import wandb

        del step
        self._run = wandb.init(
            project=config.tracking.project,
            name=folder.name,
            id=identity(folder),
            resume="allow",
            dir=str(folder),
            config=flat(config),
            settings=wandb.Settings(console="off"),  # stdout belongs to --json
        )
        # Rows keep their own step: wandb's counter only rises, and a validation may come before an earlier step's row.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, row: dict[str, float | int]) -> None:
        self._run.log({**row, "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of Trackio, in its local database unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say otherwise."""

    def __init__(self, config: Config, folder: Path, step: int) -> None:
        import trackio

        del step
        with contextlib.redirect_stdout(sys.stderr):  # it prints, and stdout belongs to --json
            self._run = trackio.init(
                project=config.tracking.project,
                name=f"{folder.name}-{identity(folder)}",
                resume="allow",
                config=flat(config),
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def write(self, step: int, row: dict[str, float | int]) -> None:
        self._run.log(row, step=step)

    def close(self, failed: bool) -> None:
        import trackio

        del failed
        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()  # a run that is finished by itself is finished again, and on stdout, when Python ends


TRACKERS: dict[str, Callable[[Config, Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
"""By `tracking.to`, which is also the name of the package: (config, folder of the run, step it stands at)."""


def require(tracking: TrackingConfig) -> None:
    """Raises UserError if the tracker's package is not installed; it is not loaded yet."""
    if tracking.to != "none" and importlib.util.find_spec(tracking.to) is None:
        raise UserError(f"tracking.to {tracking.to} needs its package: pip install {tracking.to}, or 'catmaps[track]'")


def identity(folder: Path) -> str:
    """The run's name for trackers: made at its first start, read back when it is resumed."""
    file = folder / IDENTITY
    if not file.exists():
        file.write_text(json.dumps({"id": secrets.token_hex(4)}) + "\n", encoding="utf-8")
    return str(json.loads(file.read_text(encoding="utf-8"))["id"])
