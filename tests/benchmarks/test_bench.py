"""Benchmarks measure what they say: all cases run, the dense reference is a flow map, ratios are those of the rows."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from catmaps.benchmarks import dense
from catmaps.benchmarks.case import Case, measure
from catmaps.benchmarks.plot import plot, series
from catmaps.benchmarks.profile import profile
from catmaps.benchmarks.suites import OFFICIAL, SUITES, Ratio, Suite, official_ratio
from catmaps.cli import main

SMALL = Case(
    work="base", vocabulary=40, length=8, batch=2, width=16, blocks=1, heads=2, compile=False, threads=1, repeats=2
)
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@pytest.mark.parametrize("input", ["belief", "linear"])
@pytest.mark.parametrize("work", ["base", "soft", "anchor", "psd", "lsd", "lsd_kl", "esd", "ecld", "sample", "score"])
def test_every_work_is_measured(work: str, input: str) -> None:
    row = measure(replace(SMALL, work=work, input=input))
    assert len(row["seconds"]) == 2
    assert min(row["seconds"]) > 0
    assert row["tokens"] == 16
    assert row["idle_bytes"] > 2**20


@pytest.mark.parametrize("work", ["base", "ecld", "sample", "score"])
def test_the_reference_is_measured(work: str) -> None:
    assert min(measure(replace(SMALL, work=work, code="dense", precision="fp32"))["seconds"]) > 0


def test_the_reference_learns_and_its_map_is_a_map() -> None:
    torch.manual_seed(0)
    network = dense.DenseNetwork(12, 32, 1, 2)
    tokens = torch.arange(12).repeat(8, 1)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = dense.base_loss(network, tokens)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert dense.ecld_loss(network, tokens).item() >= 0
    assert dense.sample(network, 3, 12, 4).shape == (3, 12)


def test_flops_of_a_base_step_are_three_forward_passes() -> None:
    case = replace(SMALL, work="base", input="linear")
    trunk = 24 * 16**2 + 4 * 8 * 16
    assert case.flops == 3 * 16 * (trunk + 2 * 40 * 16)
    assert replace(case, input="belief").flops == 3 * 16 * (trunk + 4 * 40 * 16)


@pytest.mark.parametrize("name", SUITES)
def test_ratios_find_their_rows(name: str) -> None:
    suite = SUITES[name]()
    assert isinstance(suite, Suite)
    rows = {n: {"seconds": [1.0, 2.0, 9.0], "peak_bytes": 10, "peak_share": 0.5} for n in suite.cases}
    for ratio in suite.ratios(rows):
        assert ratio.value == (0.5 if "peak" in ratio.name and "memory" not in ratio.name else 1.0)
    assert Ratio("a", 2.0, 3.0, at_least=False).met
    assert not Ratio("a", 2.0, 3.0).met


def test_official_figures_are_scaled_by_the_machine() -> None:
    case = Case(work="base", code="dense")
    row = {name: getattr(case, name) for name in ("work", "vocabulary", "length", "batch", "width", "blocks")}
    row |= {"tokens_per_second": OFFICIAL["base"], "machine_peak": {"fp32": 100e9}}
    assert official_ratio(row) == pytest.approx(2)
    assert official_ratio(row | {"length": 64}) is None


def test_mistakes_cost_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--suite", "speed"]) == 2
    assert "no suite speed; there are step" in capsys.readouterr().err
    assert main(["bench", "--rounds", "0"]) == 2
    assert main(["bench", "--repeats", "0"]) == 2


def test_profiles_sort_all_of_the_time_into_kinds_of_work() -> None:
    seconds = profile(replace(SMALL, work="base", input="linear"))
    assert {"products of width V", "products of blocks", "AdamW"} <= set(seconds)
    assert min(seconds.values()) >= 0
    assert list(seconds.values()) == sorted(seconds.values(), reverse=True)


def test_a_plot_has_a_line_for_rows_that_differ_by_its_axis_alone(tmp_path: Path) -> None:
    figures = {"tokens_per_second": 10.0, "peak_bytes": 2**20}
    cases = {**SUITES["width"]().cases, "dense": Case(work="base", code="dense")}
    rows = {name: asdict(case) | figures for name, case in cases.items()}
    assert {name: [row["width"] for row in group] for name, group in series(rows, "width").items()} == {
        "base, belief, V = 27": [128, 256, 512, 1024]
    }
    lengths = {name: asdict(case) | figures for name, case in SUITES["length"]().cases.items()}
    assert [row["batch"] for row in series(lengths, "length")["base, belief, V = 27"]] == [64, 32, 16, 8, 4]
    for axis, some in (("width", rows), ("length", lengths)):
        plot(some, axis, "a plot", tmp_path / f"{axis}.png")
        assert (tmp_path / f"{axis}.png").stat().st_size > 1000
    assert main(["bench", "--suite", "step", "--plot", "step.png"]) == 2
