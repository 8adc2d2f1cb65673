"""Formulas of the scripts in studies/, which have no other home."""

import importlib
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from oracle import seeded

from catmaps.flow.times import uniform, warp
from catmaps.model import build_network, read_config
from catmaps.network.denoiser import NetworkConfig, uniform_log_prior

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(STUDIES)
    return importlib.import_module(request.param)


def of(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("script", [name], indirect=True)


@of("gradient_noise")
def test_the_noise_of_a_gradient_is_the_trace_of_its_covariance(script: ModuleType) -> None:
    scales = torch.tensor([0.5, 1.0, 3.0])
    vectors = 7 + scales * torch.randn(20_000, 3, generator=seeded(0))
    assert script.trace(vectors).mean().item() == pytest.approx(scales.square().sum().item(), rel=0.03)
    few = [script.trace(some).mean().item() for some in vectors.split(4)]  # unbiased, however few the batches
    assert sum(few) / len(few) == pytest.approx(scales.square().sum().item(), rel=0.03)


@of("gradient_noise")
def test_every_law_has_one_objective(script: ModuleType) -> None:
    """The mean of weighted gradients does not depend on the law from which times are drawn."""
    torch.manual_seed(0)
    network = build_network(NetworkConfig(width=16, blocks=1, heads=2), uniform_log_prior(5))
    tokens = torch.randint(2, (128 * script.BATCH, 4), generator=seeded(1))  # far from what it expects
    wanted = warp(5)
    own = script.draws(network, tokens, wanted, wanted, seeded(2))
    assert own.largest == pytest.approx(1, rel=1e-6)
    others = script.draws(network, tokens, uniform(), wanted, seeded(3)).gradients
    way = own.gradients.mean(0)
    along, beside = (vectors @ way / way.norm() for vectors in (own.gradients, others))
    error = math.sqrt((along.var() / len(along) + beside.var() / len(beside)).item())
    assert abs((along.mean() - beside.mean()).item()) < 4 * error
    assert error < 0.02 * along.mean().item()


@of("coordinates")
def test_the_slope_of_a_power_is_its_exponent(script: ModuleType) -> None:
    widths = [32, 64, 128, 256]
    assert script.slope(widths, [3 * w**-0.5 for w in widths]) == pytest.approx(-0.5)


@of("stages")
def test_arms_are_compared_seed_by_seed(script: ModuleType) -> None:
    figures = {"frozen": [1.0, 2.0, 6.0], "joint": [1.5, 2.5, 7.1]}
    rows = [
        {"arm": arm, "seed": seed, "figures": {"nelbo": value}}
        for arm, values in figures.items()
        for seed, value in enumerate(values)
    ]
    mean, gap, error = script.differences(rows, "joint", "nelbo")
    assert mean == pytest.approx(3.7)
    assert gap == pytest.approx(0.7)
    assert error == pytest.approx(0.2)  # of 0.5, 0.5, 1.1


@of("stages")
def test_arms_have_the_teachers_of_their_names(script: ModuleType, base_run: Path) -> None:
    made = {arm: script.configure(script.Job(arm, 1, Path("out"), base_run)) for arm in script.FROM_BASE}
    made |= {arm: script.configure(script.Job(arm, 1, Path("out"), None)) for arm in (*script.JOINT, "base")}
    assert {arm for arm, config in made.items() if config.base is not None} == {"frozen", "average-jumps"}
    assert {arm for arm, config in made.items() if config.start is not None} == {"data", "average"}
    assert {arm for arm, config in made.items() if config.average_teaches} == {
        "average-jumps",
        "average",
        "joint-average",
    }
    assert made["base"].objective.off_diagonal == 0
    mixtures = {replace(config.objective, jumps="map") for arm, config in made.items() if arm != "base"}
    assert len(mixtures) == 1


@of("gains")
def test_a_base_is_copied_with_another_gain(script: ModuleType, base_run: Path, tmp_path: Path) -> None:
    other = script.with_gain(base_run, tmp_path / "other", 7.0)
    assert read_config(other) == read_config(base_run)
    assert script.slopes(base_run) == pytest.approx({"in": 2.5, "out": 2.5}, rel=1e-4)
    assert script.slopes(other) == pytest.approx({"in": 7.0, "out": 7.0}, rel=1e-4)
