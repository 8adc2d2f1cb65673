"""Power laws over compute: what is fitted, how sure it is, and what the report makes of it."""

import math
from pathlib import Path

import numpy as np
import pytest
from tiny_studies import described, written

from catmaps.studies.fits import FLOPS_PER_PARAMETER, common_compute, fits, power_law, table
from catmaps.studies.ranking import rank
from catmaps.studies.report import write_report
from catmaps.studies.results import begin_line, read_results, update_results
from catmaps.studies.study import Job, Study

WIDTHS, RATES = (16, 32, 64), {"adamw": 0.001, "muon": 0.01}
PARAMETERS = {16: 5_000, 32: 15_000, 64: 50_000}


def test_an_exact_law_is_found() -> None:
    x = [1e12, 1e13, 1e14, 1e14]
    law = power_law(x, [3 * c**-0.07 for c in x])
    assert law is not None
    assert law.exponent == pytest.approx(0.07)
    assert law.stderr == pytest.approx(0, abs=1e-9)
    assert law.at(1e15)[0] == pytest.approx(3 * 1e15**-0.07)


def test_two_sizes_or_figures_without_logarithm_have_no_law() -> None:
    assert power_law([1e12, 1e13, 1e13], [2.0, 1.9, 1.8]) is None
    assert power_law([1e12, 1e13, 1e14], [2.0, 0.0, 1.8]) is None


def test_errors_are_those_of_repeated_fits() -> None:
    rng, x = np.random.default_rng(0), [1e12, 1e12, 1e13, 1e13, 1e14, 1e14]
    noise = rng.normal(0, 0.02, (2000, len(x)))
    laws = [power_law(x, [c**-0.05 * math.exp(e) for c, e in zip(x, row, strict=True)]) for row in noise]
    exponents = np.array([law.exponent for law in laws if law is not None])
    assert np.mean([law.stderr**2 for law in laws if law is not None]) == pytest.approx(exponents.var(), rel=0.1)
    heights = np.log([law.at(1e15)[0] for law in laws if law is not None])
    assert np.mean([law.at(1e15)[1] ** 2 for law in laws if law is not None]) == pytest.approx(heights.var(), rel=0.1)


def grown(folder: Path) -> Study:
    """Three widths by two optimisers, two seeds; muon's figure is 0.9 of adamw's at any compute."""
    grid = {"network.width": list(WIDTHS), "optimiser.name": list(RATES)}
    values = described(folder, arms=None, grid=grid, baseline={"optimiser.name": "adamw"})
    study = written(folder / "tried", values | {"budget": {"tokens_per_parameter": 10}})
    for arm in study.arms:
        for seed in study.seeds:
            parameters = PARAMETERS[arm.overrides["network.width"]]
            compute = FLOPS_PER_PARAMETER * parameters * 10 * parameters
            value = compute**-0.06 * (0.9 if arm.overrides["optimiser.name"] == "muon" else 1) * (1 + 0.001 * seed)
            line = begin_line(study, Job(arm, seed), 20)
            line |= {"complete": True, "tokens": 10 * parameters, "seconds": 3.0, "cpu_seconds": 2.5}
            figure = {"value": value, "stderr": 0.01, "better": "lower"}
            found = {"nelbo": {"options": {"windows": 8}, "figures": {"nelbo": figure}, "curves": {}}}
            update_results(study, folder, line | {"parameters": parameters, "measures": found})
    return study


def test_arms_that_differ_in_their_network_share_a_law(tmp_path: Path) -> None:
    study = grown(tmp_path)
    lines = read_results(study)
    laws = fits(rank(study, lines, "nelbo"), lines)
    assert {fit.name: fit.is_baseline for fit in laws} == {"name adamw": True, "name muon": False}
    assert [fit.law.exponent for fit in laws] == pytest.approx([0.06, 0.06])
    assert common_compute(laws) == pytest.approx(60 * 5_000 * 50_000)
    rows = {row[0]: row for row in table(laws)[1]}
    assert rows["name adamw"][4] == ""
    assert rows["name muon"][4].startswith("0.900 (")
    page = write_report(study).file.read_text()
    assert "## Over compute" in page
    assert "plot-nelbo-over-compute.png" in page
    assert "10 tokens per parameter" in page


def test_steps_grow_with_the_network(tmp_path: Path) -> None:
    study = grown(tmp_path)
    steps = [study.steps(arm) for arm in study.arms if arm.overrides["optimiser.name"] == "muon"]
    assert 8 < (steps[2] or 0) / (steps[0] or 1) < 16
