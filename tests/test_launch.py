"""The recipes of launch/ start commands that the parser takes, for as many processes as divide the presets' batches."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from catmaps.commands.train import Start, read
from catmaps.presets import PRESETS

LAUNCH = Path(__file__).parents[1] / "launch"


def dry_run(script: str, *args: str, **env: str) -> list[str]:
    """The words of the command that would be run."""
    settings = {"PATH": os.environ["PATH"], "DRY_RUN": "1", **env}
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *args],
        env=settings,
        capture_output=True,
        text=True,
        cwd=LAUNCH.parent,
        check=True,
    )
    return shlex.split(done.stdout)


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


@pytest.mark.parametrize("preset", ["130m", "400m", "1.7b"])
def test_torchrun_on_several_machines(preset: str) -> None:
    args = ["train", preset, "--data.shards", "/data/my shards", "--out", "/runs/base"]
    command = dry_run("torchrun.sh", *args, NODES="16", GPUS="8", HOST="node0:29500")
    assert command[0] == "torchrun"
    assert (value(command, "--nnodes"), value(command, "--nproc-per-node")) == ("16", "8")
    assert value(command, "--rdzv-endpoint") == "node0:29500"
    assert int(value(command, "--max-restarts")) > 0
    name, *rest = command[command.index("catmaps", command.index("-m")) + 1 :]
    start = read(name, rest)
    assert isinstance(start, Start)
    assert start.restart
    assert (start.config.data.shards, start.out) == ("/data/my shards", Path("/runs/base"))
    assert PRESETS[preset]().training.batch % (16 * 8) == 0


def test_torchrun_on_one_machine() -> None:
    command = dry_run("torchrun.sh", "train", "small", GPUS="2")
    assert "--standalone" in command
    assert command[-4:] == ["catmaps", "train", "small", "--restart"]


def test_several_machines_need_a_host() -> None:
    with pytest.raises(subprocess.CalledProcessError) as raised:
        dry_run("torchrun.sh", "train", "small", NODES="2", GPUS="8")
    assert raised.value.returncode == 2
    assert "HOST must name a machine" in raised.value.stderr


def test_slurm(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = dry_run("slurm.sbatch", "train", "1.7b", "--out", "base", PATH=path, SLURM_GPUS_ON_NODE="8", **job)
    assert value(command, "--rdzv-endpoint") == "node7:21234"
    assert (value(command, "--nnodes"), value(command, "--rdzv-id")) == ("2", "41234")
    assert command[-5:] == ["train", "1.7b", "--out", "base", "--restart"]
