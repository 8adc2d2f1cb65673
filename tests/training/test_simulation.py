"""Shards, collectives and bytes of a step, on a process group without others, are those of the plan."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import catmaps
from catmaps.config import TrainingConfig
from catmaps.errors import UserError
from catmaps.presets import DISTILLATIONS, small

pytest.importorskip("olmo_core")
from catmaps.training.planner import Cluster, plan
from catmaps.training.simulation import compare, simulate

LOSSES = ["base", "psd", "average", "lsd", "lsd_kl", "esd", "ecld"]


@pytest.mark.parametrize(("loss", "shard"), [*((loss, 8) for loss in LOSSES), ("base", 2), ("psd", 4)])
def test_a_step_sends_what_is_planned(loss: Any, shard: int) -> None:
    config = replace(small(), network=replace(small().network, width=64, blocks=3))
    config = replace(config, training=TrainingConfig(batch=8 * 24, micro_batch=8), preset="test")
    if loss != "base":
        config = replace(DISTILLATIONS["distill"](config), base="base", training=config.training)
        changes = {"jumps": loss} if loss == "average" else {"loss": loss}
        config = replace(config, objective=replace(config.objective, **changes))
    done = simulate(config, 512, 8, shard)
    made = plan(config, 512, Cluster(gpus=8, shard=shard))
    assert made.passes == 3
    assert (done.shard, done.passes) == (shard, 2)
    rows = {row.name: row for row in compare(done, made)}
    for name in ("gathers a step", "scatters a step", "all-reductions a step"):
        assert rows[name].planned == rows[name].simulated
    for row in rows.values():
        assert row.simulated == pytest.approx(row.planned, rel=0.02), row  # padding weighs more in so small a network


def test_what_is_not_shared_is_not_simulated() -> None:
    with pytest.raises(UserError, match="at least 2 devices that share a copy, not 1 of 8"):
        simulate(small(), 27, 8, 1)


def test_the_command_says_whether_they_agree() -> None:
    args = ["plan", "tiny", "--gpus", "4", "--gpu", "cpu", "--simulate", "--json", "--vocabulary", "4096"]
    code = "import sys; from catmaps.cli import main; sys.exit(main())"
    env = {"PYTHONPATH": str(Path(catmaps.__file__).parents[1]), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    simulation = json.loads(done.stdout)["simulation"]
    assert simulation["agrees"]
    assert {row["name"] for row in simulation["compared"]} >= {"gathers a step", "bytes scattered"}
    assert "planned" in done.stderr
    assert "not as planned" not in done.stderr
