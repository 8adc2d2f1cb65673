"""The table's statistics, against scipy and by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tiny_studies import described, written

from catmaps.studies.measures import Figure
from catmaps.studies.ranking import difference, rank
from catmaps.studies.study import Study

VALUES = {
    "base": [2.40, 2.44, 2.41, 2.47],
    "good": [2.30, 2.33, 2.32, 2.36],
    "noisy": [2.10, 2.90, 2.20, 2.60],
    "bad": [2.60, 2.65, 2.59, 2.68],
}


def study_of(folder: Path, **changes: Any) -> Study:
    arms = {name: {"optimiser.lr": 0.001 * (i + 1)} for i, name in enumerate(VALUES)}
    return written(folder, described(folder, arms=arms, baseline="base", seeds=[0, 1, 2, 3], **changes))


def lines_of(values: dict[str, list[float]], better: str = "lower", stderr: float | None = None) -> Any:
    def line(value: float) -> dict[str, Any]:
        figure = {"value": value, "stderr": stderr, "better": better}
        return {"measures": {"m": {"figures": {"f": figure}, "curves": {}}}}

    return {(name, seed): line(value) for name, row in values.items() for seed, value in enumerate(row)}


def test_differences_are_those_of_the_paired_test(tmp_path: Path) -> None:
    rows = {row.arm.name: row for row in rank(study_of(tmp_path), lines_of(VALUES), "f")}
    raw = {name: stats.ttest_rel(VALUES[name], VALUES["base"]) for name in ("good", "noisy", "bad")}
    # Holm: the smallest of three times 3, the next times 2, the last as it is; never below one before it.
    order = sorted(raw, key=lambda name: raw[name].pvalue)
    running = 0.0
    for factor, name in zip((3, 2, 1), order, strict=True):
        running = max(running, min(1.0, factor * raw[name].pvalue))
        found = rows[name].difference
        assert found is not None
        assert found.p == pytest.approx(running)
        assert found.mean / found.stderr == pytest.approx(raw[name].statistic)
        assert found.mean == pytest.approx(np.mean(VALUES[name]) - np.mean(VALUES["base"]))
    assert rows["bad"].spread == pytest.approx(np.std(VALUES["bad"], ddof=1))
    assert rows["bad"].error == pytest.approx(stats.sem(VALUES["bad"]))
    verdicts = {name: row.verdict for name, row in rows.items()}
    assert verdicts == {"base": "baseline", "good": "better", "noisy": "not told apart", "bad": "worse"}


def test_the_order_is_by_what_is_better(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    names = {
        way: [row.arm.name for row in rank(study, lines_of(VALUES, way), "f")] for way in ("lower", "higher", "neither")
    }
    assert names["lower"] == ["good", "base", "noisy", "bad"]
    assert names["higher"] == names["lower"][::-1]
    assert names["neither"] == list(VALUES)
    assert rank(study, lines_of(VALUES, "higher"), "f")[0].verdict == "better"


def test_only_common_seeds_are_compared(tmp_path: Path) -> None:
    lines = lines_of(VALUES)
    for key in (("good", 0), ("base", 1), ("noisy", 2), ("noisy", 3)):
        del lines[key]
    del lines["noisy", 0]
    rows = {row.arm.name: row for row in rank(study_of(tmp_path), lines, "f")}
    assert rows["good"].difference is not None
    assert rows["good"].difference.seeds == 2
    assert rows["noisy"].verdict == "nothing to compare with"
    assert {"f": rank(study_of(tmp_path), {}, "f")} == {"f": []}


def test_one_seed_has_the_error_of_measuring_alone(tmp_path: Path) -> None:
    one = {name: row[:1] for name, row in VALUES.items()}
    rows = {row.arm.name: row for row in rank(study_of(tmp_path), lines_of(one, stderr=0.06), "f")}
    found = rows["bad"].difference
    assert found is not None
    assert found.stderr == pytest.approx(0.06 * math.sqrt(2))
    assert found.p == pytest.approx(2 * 2 * stats.norm.sf(0.2 / found.stderr), rel=1e-6)
    assert math.isnan(rows["bad"].spread)
    assert rows["bad"].error == 0.06
    assert rows["bad"].verdict == "worse on this seed"
    assert rows["good"].verdict == "not told apart"
    unknown = {row.arm.name: row.verdict for row in rank(study_of(tmp_path), lines_of(one), "f")}
    assert set(unknown.values()) == {"baseline", "not told apart"}


def test_equal_runs_are_not_told_apart() -> None:
    same = {seed: Figure(2.0, 0.0) for seed in (0, 1)}
    for seeds in ((0, 1), (0,)):
        found = difference({s: same[s] for s in seeds}, same)
        assert found is not None
        assert (found.mean, found.p) == (0.0, 1.0)
