"""The report: its table, its page, its plots; and the command as a user calls it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import LENGTH, rows
from tiny_studies import described, written

from catmaps.cli import main
from catmaps.errors import UserError
from catmaps.model import CHECKPOINTS, EVENTS, METRICS
from catmaps.studies.ranking import rank
from catmaps.studies.report import write_report
from catmaps.studies.results import RESULTS, begin_line, read_results, update_results
from catmaps.studies.study import Job, Study
from catmaps.studies.sweeps import numeric_field, series_of

pytest.importorskip("matplotlib")
RATES, WIDTHS = (0.001, 0.003, 0.01), (16, 32)


def swept(folder: Path, **changes: Any) -> Study:
    """Rates by widths, with made figures: the best rate of width 16 is 0.003, of width 32 0.001."""
    grid = {"network.width": list(WIDTHS), "optimiser.lr": list(RATES)}
    values = described(folder, arms=None, grid=grid, baseline={"optimiser.lr": 0.003}, **changes)
    study = written(folder / "tried", values)
    for i, arm in enumerate(study.arms):
        for seed in study.seeds:
            value = (2.5, 2.4, 2.7, 2.1, 2.3, 2.9)[i] + 0.01 * seed + 0.001 * seed * i
            figure = {"value": value, "stderr": 0.01, "better": "lower"}
            bits = {"value": 1 + value, "stderr": None, "better": "neither"}
            curve = {"x": "tokens", "y": "bits", "points": [[1000.0, value + 1], [20_000.0, value]]}
            line = begin_line(study, Job(arm, seed), 20)
            line |= {"complete": True, "tokens": 5120, "seconds": 3.0, "cpu_seconds": 2.5, "parameters": 12_345}
            line["measures"] = {
                "nelbo": {"options": {"windows": 8}, "figures": {"nelbo": figure}, "curves": {}},
                "curve": {"options": {}, "figures": {"odd": bits}, "curves": {"validation": curve}},
            }
            update_results(study, folder, line)
    return study


def test_a_sweep_is_plotted_over_its_field_by_the_others(tmp_path: Path) -> None:
    study = swept(tmp_path)
    assert numeric_field(study.arms) == "optimiser.lr"
    series = series_of(rank(study, read_results(study), "nelbo"), "optimiser.lr")
    assert {name: [point.x for point in points] for name, points in series.items()} == {
        "width 16": list(RATES),
        "width 32": list(RATES),
    }
    assert tuple(series["width 32"][0]) == pytest.approx((0.001, 2.1065, 0.0065, 2))


def test_a_field_that_is_not_everywhere_a_number_has_no_line(tmp_path: Path) -> None:
    arms = {"a": {"optimiser.lr": 0.1}, "b": {"clock.adaptive": True, "optimiser.lr": 0.1}, "c": {"clock.law": "warp"}}
    assert numeric_field(written(tmp_path, described(tmp_path, arms=arms, baseline="a")).arms) is None


def test_the_page_has_what_was_found(tmp_path: Path) -> None:
    study = swept(tmp_path)
    report = write_report(study)
    page = report.file.read_text()
    for plot in report.plots:
        assert Path(plot).read_bytes().startswith(b"\x89PNG")
        assert Path(plot).name in page
    names = {Path(plot).name for plot in report.plots}
    assert names == {
        "plot-nelbo-ranked.png",
        "plot-nelbo-over-optimiser-lr.png",
        "plot-odd-over-optimiser-lr.png",
        "plot-validation.png",
    }
    assert "| 1 | width32-lr0.001 | 2.1065 |" in page
    assert "Ranked by nelbo (lower is better)" in page
    assert "odd (no way is better)" in page
    assert "0.01M | 20 | 0.0M | 0.0 |" in page
    ranking = {row["arm"]: row for row in report.ranking["nelbo"]}
    assert ranking["width32-lr0.01"]["baseline"] == "width32-lr0.003"
    assert ranking["width32-lr0.01"]["verdict"] == "worse"
    before = [Path(plot).read_bytes() for plot in report.plots]
    assert [Path(plot).read_bytes() for plot in write_report(study).plots] == before


def test_dropped_and_failed_arms_are_on_the_page(tmp_path: Path) -> None:
    study = swept(tmp_path)
    lines = read_results(study)
    rungs = {"0.5": {"steps": 10, "figures": {"nelbo": {"value": 9.5, "stderr": None, "better": "lower"}}}}
    base = {"measures": {}, "complete": False}
    update_results(study, tmp_path, lines["width16-lr0.01", 0] | base | {"dropped": 0.5, "rungs": rungs})
    update_results(study, tmp_path, lines["width16-lr0.01", 1] | base | {"failed": "it was | odd"})
    page = write_report(study).file.read_text()
    assert "| width16-lr0.01 | 0 | 0.5 | 10 | nelbo 9.5000 |" in page
    assert "| width16-lr0.01 | 1 | it was \\| odd |" in page
    assert "10 of 12 trained to the end" in page


def test_nothing_to_report_and_damage(tmp_path: Path) -> None:
    study = written(tmp_path / "tried", described(tmp_path))
    with pytest.raises(UserError, match="no figures yet"):
        write_report(study)
    (study.folder / RESULTS).write_text("{\n")
    with pytest.raises(UserError, match="damaged in line 1"):
        write_report(study)


def test_the_command_says_what_it_wants(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["study"]) == 2
    assert "which study command?" in capsys.readouterr().err
    assert main(["study", "run", str(tmp_path)]) == 2
    assert "there is no" in capsys.readouterr().err
    swept(tmp_path)
    assert main(["study", "report", str(tmp_path / "tried"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ranking"]["nelbo"][0]["arm"] == "width32-lr0.001"


def test_a_study_is_stopped_and_goes_on(tmp_path: Path, shards: Path) -> None:
    pytest.importorskip("olmo_core")
    from catmaps.training.checkpoints import complete

    steps = 400
    study = written(tmp_path / "tried", described(shards, budget={"tokens": steps * 16 * LENGTH}, seeds=[0]))
    out = tmp_path / "runs"
    folder = out / "fast-0"
    command = [sys.executable, "-m", "catmaps", "study", "run", str(study.folder), "--out", str(out), "--arms", "fast"]
    command += ["--json"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
    while not (folder / METRICS).exists() and first.poll() is None:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    printed, _ = first.communicate(timeout=300)
    assert first.returncode == 143
    assert json.loads(printed)["complete"] is False
    assert 0 < max(step for step, _ in complete(folder / CHECKPOINTS)) < steps
    second = subprocess.run(command, capture_output=True, env=environment, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["trained"] == ["fast-0"]
    assert "resumed" in (folder / EVENTS).read_text()
    assert read_results(study)["fast", 0]["steps"] == max(row["step"] for row in rows(folder)) == steps
