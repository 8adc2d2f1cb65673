"""A run that is stopped and resumed is the run that was never stopped, to the bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import began, distilled, losses, make_shards, rows, saved, state, tiny, tiny_kind, trained

import catmaps
from catmaps import cli
from catmaps.errors import UserError
from catmaps.model import CHECKPOINTS, CLOCK, METRICS, read_config
from catmaps.training.train import START_LAW, train, with_steps


def assert_the_same(folder: Path, whole: Path, step: int = 20) -> None:
    """Bit-equal: weights, their average, moments and clock of the last checkpoint; files for others; metrics."""
    ours, theirs = state(folder, step), state(whole, step)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert {name.split(".")[0] for name in ours} == {"model", "average", "optim", "clock", "guard", "moments"}
    assert saved(folder) == saved(whole)
    assert rows(folder) == rows(whole)


@pytest.mark.parametrize("kind", ["muon", "psd", "average"])
def test_ten_and_ten_steps_are_twenty(kind: str, tmp_path: Path, shards: Path, base_run: Path) -> None:
    config = tiny_kind(kind, shards, base_run)
    halves = began(config, tmp_path / "halves")
    stopped = train(halves, stop_after=10)
    assert (stopped.step, stopped.complete) == (10, False)
    assert [row["step"] for row in rows(halves)] == list(range(1, 11))
    early = saved(halves)
    assert train(halves).complete
    assert_the_same(halves, trained(config, tmp_path / "whole"))
    assert saved(halves) != early


def test_a_run_may_be_given_another_number_of_steps(tmp_path: Path, shards: Path) -> None:
    """Before the decay of either begins they are one run: 40 steps stopped at 10 and made 20 are 20 from the start."""
    longer = began(tiny(shards, steps=40), tmp_path / "run")
    train(longer, stop_after=10)
    assert with_steps(read_config(longer), longer, 20) == read_config(longer) == tiny(shards)
    assert train(longer).complete
    assert_the_same(longer, trained(tiny(shards), tmp_path / "whole"))
    with pytest.raises(UserError, match="has made 20 steps already"):
        with_steps(read_config(longer), longer, 19)


@pytest.mark.parametrize("kind", ["muon", "psd", "average"])
def test_ten_and_ten_steps_are_twenty_on_two_processes(kind: str, two_processes: Path) -> None:
    assert_the_same(two_processes / f"halves-{kind}", two_processes / kind)


def test_a_signal_to_one_process_stops_both_and_one_goes_on(tmp_path: Path, two_processes: Path) -> None:
    folder = shutil.copytree(two_processes / "signalled", tmp_path / "run")
    assert [(folder / f"ended-{rank}").read_text() for rank in (0, 1)] == ["5 SIGTERM received"] * 2
    assert train(folder).complete
    np.testing.assert_allclose(losses(folder), losses(two_processes / "base"), rtol=1e-5)


def test_the_law_of_time_is_resumed_once_it_has_moved(tmp_path: Path, shards: Path) -> None:
    config = tiny(shards, steps=56)
    config = replace(config, training=replace(config.training, batch=32, micro_batch=32))  # all bins soon have visits
    halves = began(config, tmp_path / "halves")
    assert train(halves, stop_after=52).step == 52
    assert train(halves).complete
    assert_the_same(halves, trained(config, tmp_path / "whole"), 56)
    assert (halves / CLOCK).read_bytes() != (halves / START_LAW).read_bytes()


def test_means_over_steps_are_resumed_in_their_middle(tmp_path: Path, shards: Path) -> None:
    config = tiny(shards)
    config = replace(config, training=replace(config.training, log_every=4))
    halves = began(config, tmp_path / "halves")
    train(halves, stop_after=10)
    train(halves)
    assert rows(halves) == rows(trained(config, tmp_path / "whole"))
    assert [row["step"] for row in rows(halves)] == [1, 4, 8, 12, 16, 20]


def test_lines_after_the_last_checkpoint_are_dropped(tmp_path: Path, shards: Path) -> None:
    config = tiny(shards)
    config = replace(config, training=replace(config.training, save_every=5, evaluate_every=4))
    killed = began(config, tmp_path / "killed")
    train(killed, stop_after=12)
    assert [row["step"] for row in rows(killed) if "loss" not in row] == [4, 8, 12]
    # As if it had been killed in step 13, before it could save: the last checkpoint is that of step 10.
    shutil.rmtree(killed / CHECKPOINTS / "step12")
    with (killed / METRICS).open("a") as file:
        file.write('{"step": 13, "tok')
    assert train(killed).complete
    assert_the_same(killed, trained(config, tmp_path / "whole"))
    steps = [row["step"] for row in rows(killed) if "loss" in row]
    assert steps == list(range(1, 21))
    bounds = [row["step"] for row in rows(killed) if "nelbo_bits_per_char" in row]
    assert bounds == [4, 8, 12, 16, 20]


def test_a_complete_run_is_left_as_it_is(tmp_path: Path, base_run: Path) -> None:
    folder = shutil.copytree(base_run, tmp_path / "run")
    before = rows(folder), saved(folder)
    outcome = train(folder)
    assert (outcome.step, outcome.complete, outcome.stopped_by) == (20, True, None)
    assert (rows(folder), saved(folder)) == before


def test_a_distillation_is_resumed_without_its_base(tmp_path: Path, shards: Path, base_run: Path) -> None:
    base = shutil.copytree(base_run, tmp_path / "base")
    folder = began(distilled(base, tiny(shards)), tmp_path / "map")
    train(folder, stop_after=10)
    shutil.rmtree(base)
    moved = folder.rename(tmp_path / "moved")
    assert train(moved).complete
    whole = trained(distilled(base_run, tiny(shards)), tmp_path / "whole")
    assert rows(moved) == rows(whole)


def test_other_data_under_the_same_path_is_refused(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards")
    folder = began(tiny(shards), tmp_path / "run")
    train(folder, stop_after=3)
    (shards / "train-00000.bin").unlink()
    with pytest.raises(UserError, match=r"train-00000\.bin is missing"):
        train(folder)


def test_sigterm_saves_and_resume_completes(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    options = {
        "data.shards": shards,
        "data.length": 16,
        "network.width": 16,
        "network.blocks": 1,
        "training.steps": 300,
        "training.batch": 16,
        "training.precision": "fp32",
        "training.compile": False,
        "training.threads": 1,
        "training.log-every": 1,
        "training.evaluate-every": 0,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    code = "import sys; from catmaps.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "train", "tiny", "--out", str(folder), "--json", *flags]
    environment = {**os.environ, "PYTHONPATH": str(Path(catmaps.__file__).parents[1])}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        while process.poll() is None and not (folder / METRICS).exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, err
    result = json.loads(out)
    step = result["step"]
    assert (result["complete"], result["steps"]) == (False, 300)
    assert 1 <= step < 300
    assert (folder / CHECKPOINTS / f"step{step}").is_dir()
    assert rows(folder)[-1]["step"] == step
    assert f"stopped at step {step} of 300, saved" in err

    assert cli.main(["train", "--resume", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["complete"] is True
    assert [row["step"] for row in rows(folder)] == list(range(1, 301))
