"""What is done is not repeated, what was stopped goes on, what has changed is refused; rungs are shorter runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tiny_runs import LENGTH, losses, saved, trained
from tiny_studies import STEPS, described, in_this_process, written

from catmaps.errors import UserError
from catmaps.model import load_run, read_config
from catmaps.studies import arms, measures
from catmaps.studies.measures import Figure, Measured
from catmaps.studies.results import RESULTS, read_results
from catmaps.studies.running import Runner, run_study
from catmaps.studies.study import Job, Study
from catmaps.studies.worker import Task

pytest.importorskip("olmo_core")

from catmaps.training.train import train


def ran(study: Study, out: Path, **options: Any) -> list[str]:
    """Names of the tasks that a run of the study did."""
    done: list[Task] = []
    with in_this_process(done):
        run_study(study, out, say=lambda line: None, **options)
    return [f"{task.kind} {task.arm}-{task.seed}" for task in done]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> tuple[Study, Path]:
    """A study that has been run, and its runs. Not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    study = written(folder / "tried", described(shards))
    assert len(ran(study, folder / "runs")) == 4
    return study, folder / "runs"


def test_a_line_has_figures_and_where_they_come_from(whole: tuple[Study, Path]) -> None:
    study, out = whole
    lines = read_results(study)
    assert list(lines) == [("slow", 0), ("slow", 1), ("fast", 0), ("fast", 1)]
    line = lines["fast", 1]
    assert line["complete"]
    assert line["overrides"]["optimiser.lr"] == 0.01
    assert (line["steps"], line["tokens"]) == (STEPS, STEPS * 16 * LENGTH)
    assert line["machine"]["torch"] == torch.__version__
    assert line["cpu_seconds"] > 0
    run = load_run(out / "fast-1")
    assert line["measures"]["nelbo"]["figures"]["nelbo"]["value"] == pytest.approx(
        measures.nelbo(run, seed=1, windows=8).figures["nelbo"].value
    )
    curve = line["measures"]["curve"]["curves"]["validation"]
    assert [x for x, _ in curve["points"]] == [10 * 16 * LENGTH, STEPS * 16 * LENGTH]
    assert len(line["measures"]["bins"]["curves"]["loss over the clock"]["points"]) == 16


def test_an_arm_is_the_run_that_its_configuration_makes(whole: tuple[Study, Path], tmp_path: Path) -> None:
    study, out = whole
    alone = trained(study.config(Job(study.arm("fast"), 1), STEPS), tmp_path / "alone")
    assert saved(alone) == saved(out / "fast-1")
    assert losses(alone).tolist() == losses(out / "fast-1").tolist()


def test_nothing_is_done_twice(whole: tuple[Study, Path], tmp_path: Path) -> None:
    study, out = whole
    before = (study.folder / RESULTS).read_bytes()
    assert ran(study, out) == []
    assert ran(study, tmp_path / "elsewhere") == []  # results.jsonl is enough
    assert (study.folder / RESULTS).read_bytes() == before


def copied(whole: tuple[Study, Path], folder: Path, change: Callable[[dict[str, Any]], None]) -> Study:
    """The study with its results and another study.json."""
    study, _ = whole
    values = json.loads(study.file.read_text())
    change(values)
    new = written(folder / "tried", values)
    (new.folder / RESULTS).write_bytes((study.folder / RESULTS).read_bytes())
    return new


def test_more_arms_and_seeds_are_only_added(whole: tuple[Study, Path], tmp_path: Path) -> None:
    study = copied(whole, tmp_path, lambda v: v["arms"].update(middle={"optimiser.lr": 0.001}))
    assert ran(study, tmp_path / "runs", seeds=(1,)) == ["complete middle-1"]
    assert list(read_results(study)) == [("slow", 0), ("slow", 1), ("fast", 0), ("fast", 1), ("middle", 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["arms"]["fast"].update({"optimiser.lr": 0.5}), r"fast-0 .* optimiser.lr 0.01, .* says 0.5"),
        (lambda v: v["common"].pop("network.width"), "network.width 16, .* says null"),
        (lambda v: v.update(budget={"tokens": 999}), "budget"),
    ],
)
def test_a_changed_study_is_refused(
    whole: tuple[Study, Path], tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    study = copied(whole, tmp_path, change)
    with pytest.raises(UserError, match=message):
        ran(study, tmp_path / "runs")


def test_a_changed_run_without_a_line_is_refused_too(shards: Path, tmp_path: Path) -> None:
    values = described(shards)
    study = written(tmp_path / "tried", values)
    arms.begun(study, Job(study.arm("fast"), 0), tmp_path / "fast-0", STEPS)
    values["common"]["optimiser.clip"] = 0.5
    with pytest.raises(UserError, match=r"fast-0 .* optimiser.clip 1.0, .* says 0.5"):
        ran(written(tmp_path / "tried", values), tmp_path)


def test_a_new_measure_is_taken_without_training(whole: tuple[Study, Path]) -> None:
    study, out = whole
    line = json.loads((out / "slow-0" / "result.json").read_text())
    assert line["measures"]["nelbo"]["options"] == {"windows": 8}

    def length(run: Any, *, seed: int) -> Measured:
        return Measured({"length": Figure(float(run.config.data.length + seed), better="higher")})

    values = json.loads(study.file.read_text()) | {"measures": [{"name": "nelbo", "windows": 4}, "length"]}
    with (
        patch.dict(measures.MEASURES, length=length),
        patch("catmaps.training.train.train", side_effect=AssertionError("trained again")),
    ):
        new = written(study.folder.with_name("measured"), values)
        assert ran(new, out, arms=("slow",), seeds=(1,)) == ["complete slow-1"]
    found = read_results(new)["slow", 1]["measures"]
    assert list(found) == ["nelbo", "length"]
    assert found["nelbo"]["options"] == {"windows": 4}
    assert found["length"]["figures"]["length"] == {"value": 17, "stderr": None, "better": "higher"}


def test_a_stopped_arm_goes_on(shards: Path, tmp_path: Path, whole: tuple[Study, Path]) -> None:
    study, out = written(tmp_path / "tried", described(shards)), tmp_path / "runs"
    job = Job(study.arm("fast"), 1)
    arms.begun(study, job, out / job.name, STEPS)
    train(out / job.name, stop_after=7)
    ran(study, out, arms=("fast",), seeds=(1,))
    assert saved(out / job.name) == saved(whole[1] / job.name)
    assert losses(out / job.name).tolist() == losses(whole[1] / job.name).tolist()


def test_an_arm_that_fails_is_told_and_the_others_go_on(shards: Path, tmp_path: Path) -> None:
    values = described(shards, seeds=[0])
    values["arms"]["fast"] = {"data.length": 100_000}  # longer than all there is
    study, said = written(tmp_path / "tried", values), list[str]()
    with in_this_process():
        progress = run_study(study, tmp_path / "runs", arms=("fast", "slow"), say=said.append)
    assert (progress.trained, progress.failed) == (["slow-0"], ["fast-0"])
    assert "shorter than one batch" in read_results(study)["fast", 0]["failed"]
    assert "fast-0 failed" in said[0]


def test_no_such_arm_or_seed(whole: tuple[Study, Path], tmp_path: Path) -> None:
    for options, message in (({"arms": ("quick",)}, "no arm quick"), ({"seeds": (7,)}, "no seed 7; there are 0, 1")):
        with pytest.raises(UserError, match=message):
            ran(whole[0], tmp_path, **options)


def test_cpu_minutes_become_steps_by_a_pilot_once(shards: Path, tmp_path: Path) -> None:
    study, out = (
        written(tmp_path / "tried", described(shards, seeds=[0], budget={"cpu_minutes": 0.005})),
        tmp_path / "r",
    )
    assert ran(study, out) == ["pilot slow-0", "pilot fast-0", "complete slow-0", "complete fast-0"]
    seconds = json.loads((out / "fast.pilot.json").read_text())["cpu_seconds_per_step"]
    steps = read_config(out / "fast-0").training.steps
    assert steps == max(1, round(60 * 0.005 / seconds))
    assert read_results(study)["fast", 0]["steps"] == steps
    (out / "fast.pilot.json").unlink()
    assert Runner(study, out, 1, print).steps(study.arm("fast")) == steps  # from results.jsonl
    assert ran(study, out) == []


def halved(shards: Path, folder: Path) -> Study:
    arms = {f"lr{i}": {"optimiser.lr": rate} for i, rate in enumerate((1e-5, 1e-2, 1e-4, 3e-3))}
    halving = {"keep": 0.5, "rungs": [0.5, 1.0]}
    return written(folder, described(shards, arms=arms, baseline="lr2", seeds=[0], halving=halving))


def test_halving_drops_the_worse_and_keeps_the_baseline(shards: Path, tmp_path: Path) -> None:
    study = halved(shards, tmp_path / "tried")
    tasks = ran(study, tmp_path / "runs")
    assert tasks[:4] == [f"rung lr{i}-0" for i in range(4)]
    assert tasks[4:] == ["complete lr1-0", "complete lr2-0", "complete lr3-0"]
    lines = read_results(study)
    assert lines["lr0", 0]["dropped"] == 0.5
    assert not lines["lr0", 0].get("complete")
    assert lines["lr0", 0]["rungs"]["0.5"]["steps"] == STEPS // 2
    assert ran(study, tmp_path / "runs") == []
    assert ran(study, tmp_path / "elsewhere") == []
    with pytest.raises(UserError, match="halving compares all arms"):
        ran(study, tmp_path / "runs", seeds=(0,))


def test_a_rung_is_the_shorter_run_and_leaves_the_longer_alone(shards: Path, tmp_path: Path) -> None:
    study, out = halved(shards, tmp_path / "tried"), tmp_path / "runs"
    out.mkdir()
    job, ends = Job(study.arm("lr1"), 0), dict[str, Any]()

    def keep(run: Any, *args: Any) -> Measured:
        ends.update(saved=saved(run.path), losses=losses(run.path).tolist())
        return Measured({"nelbo": Figure(1.0)})

    with patch.object(arms, "measured", keep):
        arms.rung(study, job, out, STEPS, 0.5)
    short = trained(study.config(job, STEPS // 2), tmp_path / "short")
    assert ends == {"saved": saved(short), "losses": losses(short).tolist()}
    assert not list(out.glob(".*rung*"))
    arms.complete(study, job, out, STEPS)
    long = trained(study.config(job, STEPS), tmp_path / "long")
    assert saved(out / job.name) == saved(long)
    assert losses(out / job.name).tolist() == losses(long).tolist()
    # A run that has gone past the rung is measured there all the same.
    ends.clear()
    with patch.object(arms, "measured", keep):
        arms.rung(study, job, out, STEPS, 0.5)
    assert ends == {"saved": saved(short), "losses": losses(short).tolist()}
