"""What goes wrong in long trainings, and what then happens: defined in docs/scale.md."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from processes import run
from tiny_runs import LENGTH, Job, began, losses, rows, saved, state, tiny, train_on_record, weights

import catmaps
from catmaps import cli
from catmaps.config import OptimiserConfig, ParallelConfig
from catmaps.errors import UserError
from catmaps.model import CONFIG, EVENTS, METRICS
from catmaps.training.train import BEGUN, START_LAW, restart, start, train

pytest.importorskip("olmo_core")
from catmaps.training.guard import LEAST, WINDOW, Guard
from catmaps.training.module import FlowTrainModule


def events(folder: Path) -> list[dict[str, Any]]:
    file = folder / EVENTS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def spoiled(*steps: int, value: float = float("nan"), rank: int = 0) -> Any:
    """`train_batch` whose gradient, on one process, is spoiled at some steps."""
    train_batch = FlowTrainModule.train_batch

    def spoiling(module: FlowTrainModule, batch: dict[str, Any], dry_run: bool = False) -> None:
        from olmo_core.distributed.utils import get_rank

        train_batch(module, batch, dry_run)
        if not dry_run and module.trainer.global_step in steps and get_rank() == rank:
            gradient = next(p.grad for p in module.network.parameters() if p.grad is not None)
            gradient.fill_(value)

    return patch.object(FlowTrainModule, "train_batch", spoiling)


def test_a_step_that_is_not_finite_is_skipped_and_reported(tmp_path: Path, shards: Path) -> None:
    folder = began(tiny(shards, steps=8), tmp_path / "run")
    with spoiled(5):
        train(folder, stop_after=4)
        before = state(folder, 4)
        train(folder, stop_after=5)
        after = state(folder, 5)
        assert train(folder).complete
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert moved == ["guard.refused"]
    assert [(e["step"], e["event"]) for e in events(folder)] == [(4, "resumed"), (5, "skipped"), (5, "resumed")]
    assert events(folder)[1]["gradient_norm"] is None
    assert rows(folder)[4] == {"step": 5, "tokens": 5 * 16 * LENGTH, "skipped": 1.0}
    assert np.isfinite(losses(folder)).all()
    assert len(losses(folder)) == 7
    whole = began(tiny(shards, steps=8), tmp_path / "whole")
    with spoiled(5):
        assert train(whole).complete
    assert saved(whole) == saved(folder)  # resumed between, to the bit


def test_lines_count_the_steps_skipped(tmp_path: Path, shards: Path) -> None:
    config = tiny(shards, steps=8)
    config = replace(config, training=replace(config.training, log_every=4))
    folder = began(config, tmp_path / "run")
    with spoiled(2, 4):
        train(folder)
    assert [(row["step"], row.get("skipped", 0)) for row in rows(folder)] == [(1, 0), (4, 2), (8, 0)]


def test_a_run_ends_after_too_many_skipped_in_a_row(tmp_path: Path, shards: Path) -> None:
    config = replace(tiny(shards), optimiser=OptimiserConfig(name="adamw", warmup=4, patience=3))
    folder = began(config, tmp_path / "run")
    with (
        spoiled(3, 4, 7, 8, 9),
        pytest.raises(UserError, match="not finite at step 9, after 2 more that were skipped: start again with small"),
    ):
        train(folder)


def test_the_guard_tells_spikes_from_its_window() -> None:
    generator = torch.Generator().manual_seed(0)
    guard = Guard(deviations=4.0, patience=3)
    norms = (1 + 0.1 * torch.randn(300, generator=generator)).tolist()
    assert not guard.refuses(50.0, 0)  # nothing is known yet
    guard = Guard(deviations=4.0, patience=3)
    assert not any(guard.refuses(norm, i) for i, norm in enumerate(norms))
    known = torch.tensor(norms[-WINDOW:], dtype=torch.float64)
    limit = (known.mean() + 4 * known.std()).item()
    twin = Guard(deviations=4.0, patience=3)
    twin.load_state_dict(guard.state_dict())
    for judge in (guard, twin):
        assert judge.refuses(limit * 1.001, 301)
        assert not judge.refuses(limit * 0.999, 302)
        assert judge.refuses(float("inf"), 303)
        assert judge.refuses(float("nan"), 304)
        with pytest.raises(UserError, match=r"norm 9 exceeds \S+ at step 305, after 2 more"):
            judge.refuses(9.0, 305)
    off = Guard(deviations=0.0, patience=1)
    assert not any(off.refuses(10.0**i, i) for i in range(LEAST + 3))
    with pytest.raises(UserError, match="not finite at step 9: start"):
        off.refuses(float("nan"), 9)


def skip_and_straggle(spiky: Job, slow: Job) -> None:
    """Process 1 spoils step 3 of one run, and is slow in another."""
    with spoiled(3, rank=1):
        train_on_record(spiky)
    train_batch = FlowTrainModule.train_batch

    def slowly(module: FlowTrainModule, batch: dict[str, Any], dry_run: bool = False) -> None:
        loss = module.objective.batch

        def sleeping(*args: Any) -> Any:
            time.sleep(0.3 * int(os.environ["RANK"]))
            return loss(*args)

        with patch.object(module.objective, "batch", sleeping):
            train_batch(module, batch, dry_run)

    with patch.object(FlowTrainModule, "train_batch", slowly):
        train_on_record(slow)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    shared = replace(tiny(shards, steps=5), parallel=ParallelConfig(strategy="fsdp"))
    slow = tiny(shards, steps=4)
    slow = replace(slow, training=replace(slow.training, log_every=2))
    run(skip_and_straggle, 2, Job(began(shared, folder / "spiky")), Job(began(slow, folder / "slow")))
    return folder


def test_processes_agree_on_what_is_skipped(pair: Path, tmp_path: Path, shards: Path) -> None:
    assert [(e["step"], e["event"]) for e in events(pair / "spiky")] == [(3, "skipped")]
    alone = began(tiny(shards, steps=5), tmp_path / "alone")
    with spoiled(3):
        train(alone)
    np.testing.assert_allclose(losses(pair / "spiky"), losses(alone), rtol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*map(tensors, (pair / "spiky", alone)), strict=True))


def tensors(folder: Path) -> list[torch.Tensor]:
    return [value for _, value in sorted(weights(folder).items())]


def test_a_straggler_is_named(pair: Path) -> None:
    found = events(pair / "slow")
    assert [(e["step"], e["event"], e["process"]) for e in found] == [(2, "straggler", 1), (4, "straggler", 1)]
    assert all(e["seconds"] > 0.3 > e["median"] for e in found)


def options(shards: Path, **more: object) -> list[str]:
    settings = {
        "data.shards": shards,
        "data.length": LENGTH,
        "network.width": 16,
        "network.blocks": 1,
        "network.heads": 2,
        "training.steps": 30,
        "training.batch": 16,
        "training.precision": "fp32",
        "training.compile": False,
        "training.threads": 1,
        "training.log-every": 1,
        "training.save-every": 3,
        "training.evaluate-every": 0,
        "optimiser.name": "adamw",
    } | more
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def command(*args: str) -> list[str]:
    """`catmaps ...` on two processes of a torchrun that starts them again once."""
    code = Path(__file__).parents[1] / "dying.py"
    launch = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1"]
    return [sys.executable, "-m", "torch.distributed.run", *launch, str(code), *args]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(catmaps.__file__).parents[1]), **more}


def test_torchrun_goes_on_by_itself_after_a_kill(tmp_path: Path, shards: Path) -> None:
    """Process 1 is killed in step 8; a checkpoint is written every 3."""
    folder = tmp_path / "run"
    args = ["train", "tiny", "--out", str(folder), *options(shards)]
    ended = subprocess.run(
        command(*args), env=environment(CATMAPS_TEST_KILL="1:8"), capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr[-9000:]
    resumed = [(e["step"], e["processes"]) for e in events(folder) if e["event"] == "resumed"]
    assert resumed in ([(3, 2)], [(6, 2)])  # that of step 6 may not have been complete
    assert cli.main(["train", "tiny", "--out", str(tmp_path / "whole"), *options(shards)]) == 0
    np.testing.assert_allclose(losses(folder), losses(tmp_path / "whole"), rtol=1e-5)


def test_a_restart_takes_up_the_same_run_and_no_other(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = tmp_path / "run", tiny(shards)
    assert restart(config, folder) == config
    train(folder, stop_after=3)
    assert restart(config, folder) == config
    other = replace(config, network=replace(config.network, blocks=2))
    content = (folder / CONFIG).read_bytes()
    with pytest.raises(UserError, match=r"was begun with network\.blocks 1, not 2"):
        restart(other, folder)
    assert (folder / CONFIG).read_bytes() == content
    out = str(tmp_path / "cli")
    for steps in (30, 30):  # started, and started again when it is complete
        assert (
            cli.main(["train", "tiny", "--out", out, "--restart", *options(shards, **{"training.steps": steps})]) == 0
        )
    capsys.readouterr()
    assert cli.main(["train", "tiny", "--out", out, *options(shards)]) == 2
    assert "exists and is not empty; continue it with --resume" in capsys.readouterr().err


def test_a_folder_that_was_being_made_is_made_anew(tmp_path: Path, shards: Path) -> None:
    folder, config = tmp_path / "run", tiny(shards)
    start(config, folder)
    assert not (folder / BEGUN).exists()
    (folder / CONFIG).unlink()
    with pytest.raises(UserError, match="exists and is not empty"):
        restart(config, folder)  # files without a mark are somebody's own
    (folder / BEGUN).touch()
    (folder / START_LAW).write_bytes(b"half")
    restart(config, folder)
    assert train(folder).complete


def stand_still(job: Job) -> None:
    """Process 1 stops in step 3, for good; process 0 then gives up, and ends it."""
    other = job.folder / "other"
    if os.environ["RANK"] == "1":
        other.write_text(str(os.getpid()))
    train_batch = FlowTrainModule.train_batch

    def stopping(module: FlowTrainModule, batch: dict[str, Any], dry_run: bool = False) -> None:
        if module.trainer.global_step == 3 and os.environ["RANK"] == "1":
            time.sleep(60)
            os._exit(0)
        train_batch(module, batch, dry_run)

    with patch.object(FlowTrainModule, "train_batch", stopping):
        try:
            train(job.folder)
        except UserError as error:
            (job.folder / "error").write_text(str(error))
            os.kill(int(other.read_text()), signal.SIGKILL)


def test_nobody_waits_for_ever(tmp_path: Path, shards: Path) -> None:
    config = replace(tiny(shards), parallel=ParallelConfig(timeout=5))
    folder = began(config, tmp_path / "run")
    with pytest.raises(Exception, match="SIGKILL"):
        run(stand_still, 2, Job(folder), seconds=120)
    assert "another process of the run was lost or stood still" in (folder / "error").read_text()
    assert "--resume" in (folder / "error").read_text()
    assert not (folder / METRICS).exists() or len(rows(folder)) <= 3
