"""Checkpoints are whole or not at all, written beside the training, kept by a policy, and loaded strictly."""

import errno
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tiny_runs import began, losses, rows, saved, state, tiny, tiny_kind, trained

from catmaps.config import Config
from catmaps.errors import UserError
from catmaps.model import CHECKPOINTS, CONFIG, MODEL
from catmaps.training.train import train

pytest.importorskip("olmo_core")
from olmo_core.distributed.checkpoint import filesystem

from catmaps.training.checkpoints import FINISHED, SUMS, complete, verify_latest
from catmaps.training.module import FlowTrainModule


def saving(shards: Path, **training: Any) -> Config:
    """12 steps, a checkpoint every 2."""
    config = tiny(shards, steps=12)
    return replace(config, training=replace(config.training, save_every=2, **training))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / CHECKPOINTS).iterdir() if path.name != "work")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return trained(saving(shards), tmp_path_factory.mktemp("runs") / "undisturbed")


def assert_the_same(folder: Path, other: Path) -> None:
    ours, theirs = state(folder, 12), state(other, 12)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert saved(folder) == saved(other)
    assert rows(folder) == rows(other)


def test_the_policy_keeps_the_last_and_some_for_good(tmp_path: Path, shards: Path) -> None:
    folder = began(saving(shards, keep=2, keep_every=4), tmp_path / "run")
    train(folder, stop_after=7)
    assert names(folder) == ["step4", "step6", "step7"]
    assert train(folder).complete
    assert names(folder) == ["step10", "step12", "step4", "step8"]
    assert [step for step, _ in complete(folder / CHECKPOINTS)] == [4, 8, 10, 12]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, shards: Path, undisturbed: Path) -> None:
    write, step = filesystem._write_items, FlowTrainModule.optim_step
    further, steps = threading.Event(), []

    def waiting(*args: Any) -> Any:
        if not further.wait(20):
            raise TimeoutError("training waits for the checkpoint")
        return write(*args)

    def counting(module: FlowTrainModule) -> None:
        step(module)
        steps.append(module.trainer.global_step)
        if len(steps) == 9:
            further.set()

    config = saving(shards)
    config = replace(config, training=replace(config.training, save_every=6))
    with patch.object(filesystem, "_write_items", waiting), patch.object(FlowTrainModule, "optim_step", counting):
        folder = trained(config, tmp_path / "run")
    # What is stored is the state of step 6, and not that of a later step, when it was written.
    early = began(config, tmp_path / "early")
    train(early, stop_after=6)
    ours, theirs = state(folder, 6), state(early, 6)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert saved(folder) == saved(undisturbed)


@pytest.mark.parametrize("left", ["no end", "only the beginning", "renamed too early"])
def test_what_a_killed_process_left_is_never_read(left: str, tmp_path: Path, shards: Path, undisturbed: Path) -> None:
    folder = began(saving(shards), tmp_path / "run")
    train(folder, stop_after=8)
    latest = folder / CHECKPOINTS / "step8"
    if left == "no end":
        (latest / FINISHED).unlink()
    elif left == "only the beginning":
        latest.rename(latest.with_name("step8-tmp"))
    else:
        shutil.rmtree(latest / "model_and_optim")
        (latest / FINISHED).unlink()
    assert verify_latest(folder / CHECKPOINTS) == 6
    assert train(folder).complete
    assert_the_same(folder, undisturbed)
    assert names(folder) == ["step10", "step12"]


def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path: Path, shards: Path, undisturbed: Path) -> None:
    folder, sync, calls = began(saving(shards), tmp_path / "run"), os.fdatasync, []

    def full(file: Any) -> None:
        calls.append(file)
        if (folder / CHECKPOINTS / "step6").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    with (
        patch.object(os, "fdatasync", full),
        pytest.raises(UserError, match=r"cannot write .*step6 \(OSError.*No space left on device\).* --resume"),
    ):
        train(folder)
    assert calls
    assert [step for step, _ in complete(folder / CHECKPOINTS)] == [2, 4]
    assert train(folder).complete
    assert_the_same(folder, undisturbed)


def test_a_full_disk_at_the_last_moment_is_no_checkpoint(tmp_path: Path, shards: Path) -> None:
    folder, write = began(saving(shards), tmp_path / "run"), Path.replace

    def full(path: Path, target: Any) -> Path:
        if Path(target).name == SUMS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, target)

    with patch.object(Path, "replace", full), pytest.raises(UserError, match=r"cannot write .*step2 .*No space left"):
        train(folder)
    assert complete(folder / CHECKPOINTS) == []
    assert train(folder).complete


def edited(folder: Path, part: str, name: str, value: Any) -> None:
    file = folder / CONFIG
    values = json.loads(file.read_text())
    values[part][name] = value
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("network", "width", 32, r"run/checkpoints/step12: model\.\S+ has shape .* instead of .*another configuration"),
        (
            "network",
            "blocks",
            2,
            r"run/checkpoints/step12 misses average\.trunk\.blocks\.1\.attention_out\.weight \(.* in all\)",
        ),
        ("optimiser", "name", "muon", r"run/checkpoints/step12 misses optim\.state\.\S+\.momentum_buffer"),
    ],
)
def test_loading_names_what_differs(
    part: str, name: str, value: Any, message: str, tmp_path: Path, undisturbed: Path
) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    edited(folder, part, name, value)
    before = contents(folder)
    with pytest.raises(UserError, match=message):
        train(folder)
    assert contents(folder) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_checkpoints_of_earlier_versions_have_no_sums(tmp_path: Path, shards: Path, base_run: Path) -> None:
    folder = began(tiny_kind("psd", shards, base_run), tmp_path / "run")
    train(folder, stop_after=5)
    (folder / CHECKPOINTS / "step5" / SUMS).unlink()
    assert train(folder).complete
    assert len(losses(folder)) == 20
    assert (folder / MODEL).exists()
