"""Checkpoints: written beside the training, whole or not at all, checked when they are read, kept by a policy.

A checkpoint is a folder stepN of the engine's distributed format, which any number of processes reads. Its file
.metadata.json is written last, after the sizes and hashes of all others (sums.json): a folder without it is what a
killed process left behind, is never read, and goes when the next checkpoint is complete.
"""

import hashlib
import json
import re
import shutil
import threading
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from olmo_core.aliases import PathOrStr
from olmo_core.distributed.utils import all_gather_object, broadcast_object, get_rank, get_world_size, is_distributed
from olmo_core.train import checkpoint as engine
from olmo_core.train.callbacks import CheckpointerCallback
from olmo_core.train.checkpoint import CheckpointMetadata
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from catmaps.config import Config
from catmaps.errors import UserError
from catmaps.model import CHECKPOINTS, CLOCK, MODEL, write_law, write_tensors
from catmaps.training.module import FlowTrainModule
from catmaps.training.parallelize import whole

SUMS, FINISHED = "sums.json", engine.Checkpointer.METADATA_FNAME
BLOCK = 2**22


class Checkpointer(engine.Checkpointer):
    """The engine's, which also writes sums.json, and says when a checkpoint in the background is complete."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.finished = threading.Event()
        self.failed: OSError | None = None

    def _save_metadata(self, dir: PathOrStr, metadata: CheckpointMetadata) -> None:
        """The engine's last act for a checkpoint, in whichever thread; where writing failed there is nothing to end."""
        try:
            folder = Path(dir)
            if get_rank() == 0 and (folder / "model_and_optim" / ".metadata").exists():
                sums = {name: _sum(folder / name) for name in _files(folder)}
                self.write_file(dir, SUMS, json.dumps(sums, indent=1))
                super()._save_metadata(dir, metadata)
        except OSError as error:
            self.failed = error
        finally:
            self.finished.set()


def _files(folder: Path) -> list[str]:
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in files if name not in (SUMS, FINISHED))


def _sum(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def complete(folder: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a folder by step, the earliest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), path) for path in folder.iterdir() if (m := re.fullmatch(r"step(\d+)", path.name))]
    return sorted((step, path) for step, path in found if (path / FINISHED).exists())


def verify_latest(folder: Path) -> int | None:
    """Reads the last complete checkpoint's files against their hashes; processes share the work and agree.

    Returns:
        Its step; None if there is no checkpoint.

    Raises:
        UserError: A file is missing or damaged; names it.
    """
    found = broadcast_object(complete(folder))
    if not found:
        return None
    (step, path), before = found[-1], [earlier for earlier, _ in found[:-1]]
    problems = [p for p in all_gather_object(_problem(path, get_rank(), get_world_size())) if p is not None]
    if problems:
        then = f"the run then goes on from step {before[-1]}" if before else "the run then begins anew"
        raise UserError(f"{problems[0]}; copy {path} again, or remove it: {then}")
    return step


def _problem(path: Path, share: int, shares: int) -> str | None:
    """What is wrong with one process's share of a checkpoint's files; those of earlier versions have no sums."""
    file = path / SUMS
    if not file.exists():
        return None
    try:
        sums = json.loads(file.read_bytes())
        known = [(str(name), sums[name]["bytes"], sums[name]["sha256"]) for name in sorted(sums)]
    except (ValueError, KeyError, TypeError):
        return f"{file} is damaged"
    for name, size, digest in known[share::shares]:
        if not (path / name).is_file():
            return f"{path / name} is missing"
        if (path / name).stat().st_size != size:
            return f"{path / name} has {(path / name).stat().st_size} bytes instead of {size}"
        if _sum(path / name)["sha256"] != digest:
            return f"{path / name} is damaged (its hash is not that of {SUMS})"
    return None


class CheckpointCallback(CheckpointerCallback):
    """Every `save_every` steps and at the end: exports the average, and writes a checkpoint in the background.

    One is complete before the next begins. The last `keep` stay, and those of steps divisible by `keep_every`.

    Args:
        folder: Of the run.
        config: Of the run.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        super().__init__(save_interval=config.training.save_every)
        self.folder, self.training, self.timeout = folder, config.training, config.parallel.timeout
        self._pending: Future[None] | None = None
        self._path = folder

    def pre_train(self) -> None:
        if is_distributed() and self.checkpointer.process_group is None:
            # Collectives of the background must not mix with those of training.
            group = dist.new_group(timeout=timedelta(seconds=self.timeout), backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self.checkpointer.process_group = group
        self._retire()

    def post_train_batch(self) -> None:
        if self._pending is not None and self._pending.done():
            self._wait()
        if self.step % self.training.save_every == 0:
            self._save()

    def post_train(self) -> None:
        if self.step > self._latest_checkpoint_step:
            self._save()
        self._wait()

    def _save(self) -> None:
        self._wait()
        module = self.trainer.train_module
        assert isinstance(module, FlowTrainModule)
        self.trainer._log_metrics()  # what callbacks save depends on it
        self.trainer._join_bookkeeping_ops()
        checkpointer = self._own()
        checkpointer.finished.clear()
        self._path = self.folder / CHECKPOINTS / checkpointer.checkpoint_dirname(self.step)
        try:
            export(module, self.folder)
            state: Any = self.trainer.state_dict()
            self._pending = checkpointer.save_async(str(self._path), module, state)
        except (OSError, RuntimeError) as error:  # torch's writers raise the latter
            raise self._unwritten(str(error)) from error
        self._latest_checkpoint_step = self.step

    def _wait(self) -> None:
        """Until the checkpoint in the background is complete.

        Raises:
            UserError: It could not be written, on any process.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except (Exception, CheckpointException) as error:  # of the background, in the engine's or torch's wrapping
            raise self._unwritten(str(error)) from error
        checkpointer = self._own()
        checkpointer.finished.wait()
        if checkpointer.failed is not None:
            raise self._unwritten(str(checkpointer.failed))
        self._retire()

    def _own(self) -> Checkpointer:
        assert isinstance(self.checkpointer, Checkpointer)
        return self.checkpointer

    def _unwritten(self, reason: str) -> UserError:
        reason = next((line for line in reversed(reason.splitlines()) if "Error" in line), reason).strip()
        return UserError(
            f"cannot write {self._path} ({reason}); mend that and continue with --resume {self.folder}: "
            "the checkpoint before is whole"
        )

    def _retire(self) -> None:
        """Removes what the policy does not keep, and what killed processes left."""
        if get_rank() != 0:
            return
        folder = self.folder / CHECKPOINTS
        found = complete(folder)
        for step, path in found[: -self.training.keep]:
            every = self.training.keep_every
            if not (every and step % every == 0):
                (path / FINISHED).unlink()  # first: from now on it is no checkpoint
        kept = {path for _, path in complete(folder)}
        for path in folder.glob("step*"):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)


def export(module: FlowTrainModule, folder: Path) -> None:
    """The moving average and the law of time as safetensors, in the run's folder; every process must call it."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in module.average.state_dict().items():
        value = whole(tensor)
        if get_rank() == 0:
            tensors[name] = value.cpu()
    if get_rank() == 0:
        write_tensors(tensors, folder / MODEL)
        write_law(module.law, folder / CLOCK)
