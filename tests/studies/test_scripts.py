"""Formulas of the scripts in studies/, which have no other home."""

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from oracle import seeded
from tiny_runs import distilled, state, tiny, trained

from catmaps.config import Config
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import interpolate
from catmaps.flow.losses import psd
from catmaps.flow.objective import ObjectiveConfig
from catmaps.flow.times import Law, Pair, uniform, warp
from catmaps.model import build_network, read_config
from catmaps.network.denoiser import FlowNetwork, NetworkConfig, uniform_log_prior
from catmaps.tiles import MovingReadout, Readout
from catmaps.training.module import FlowTrainModule
from catmaps.training.objectives import FlowObjective

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


def _network(build: Callable[..., FlowNetwork], seed: int = 0) -> FlowNetwork:
    """Of which nothing is zero."""
    torch.manual_seed(seed)
    network = build(NetworkConfig(width=16, blocks=1, heads=2), uniform_log_prior(5))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=seeded(p.numel())))
    return network


@of("conditioning")
@pytest.mark.parametrize("arm", ["clock-snr", "clock", "snr", "t", "nothing"])
def test_time_features_of_an_arm_see_what_its_name_says(script: ModuleType, arm: str) -> None:
    whole, own = script.features("clock-snr", 5), script.features(arm, 5)
    assert own.size == whole.size
    t = torch.tensor([[0.1, 0.4, 0.7]])
    values, rates = own.tangent(t, torch.ones_like(t))
    clock = torch.tensor([i % 2 == 0 for i in range(own.size)])  # tau stands before log-SNR, then waves of the one
    clock[2:] = (torch.arange(own.size - 2) // 8) % 2 == 0
    moves = (values[:, 0] != values[:, 1])[0]
    assert bool(moves[clock].all()) == bool(rates[0, 0, clock].any()) == (arm not in ("snr", "nothing"))
    assert bool(moves[~clock].all()) == bool(rates[0, 0, ~clock].any()) == (arm in ("clock-snr", "snr"))
    if arm == "t":
        assert values[0, :, 0].tolist() == pytest.approx(t[0].tolist())


@of("conditioning")
def test_an_estimate_enters_where_there_is_one(script: ModuleType) -> None:
    """Without it the network is the plain one; two looks depend on the state alone, a warm one on the last call."""
    plain = _network(script.builder("clock-snr"))
    own: Any = _network(script.builder("self-conditioned"))
    own.load_state_dict(plain.state_dict(), strict=False)
    tokens = torch.randint(5, (2, 6), generator=seeded(1))
    noise = torch.randn(2, 6, 5, generator=seeded(2))
    t, later = torch.full((2, 1), 0.3), torch.full((2, 1), 0.5)
    start = torch.zeros(2, 1)
    states = {float(time[0, 0]): interpolate(tokens, noise, time) for time in (start, t, later)}

    def logits(network: FlowNetwork, time: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return FlowMap(network).logits(states[float(time[0, 0])], time, time)

    own.passes = 1
    assert torch.equal(logits(own, t), logits(plain, t))
    own.passes = 2
    twice = logits(own, t)
    assert not torch.allclose(twice, logits(plain, t), atol=1e-3)
    logits(own, later)
    assert torch.equal(logits(own, t), twice)
    own.passes = "warm"
    assert torch.equal(logits(own, start), logits(plain, start))
    warm = logits(own, t)
    assert torch.allclose(own.estimate, warm.softmax(-1))
    assert not torch.allclose(warm, logits(plain, t), atol=1e-3)
    again = logits(own, t)  # its own answer is now the estimate: the second look of two
    assert not torch.equal(again, warm)
    assert torch.equal(logits(own, start), logits(plain, start))  # new texts begin without


@of("conditioning")
def test_an_estimate_learns_but_not_through_what_it_is_made_of(script: ModuleType) -> None:
    network: Any = _network(script.builder("self-conditioned"))
    noise, t = torch.randn(2, 6, 5, generator=seeded(2)), torch.full((2, 1), 0.3)
    state, seen = interpolate(torch.zeros(2, 6, dtype=torch.long), noise, t), set()
    for _ in range(12):
        network.zero_grad()
        FlowMap(network).logits(state, t, t).square().sum().backward()
        assert network.estimates.weight.grad is None or network.estimates.weight.grad.any()
        assert network.estimate is None or not network.estimate.requires_grad
        seen.add(network.estimate is None)
    assert seen == {True, False}


@of("gradients")
def test_what_opposes_is_taken_off_and_nothing_else(script: ModuleType) -> None:
    one, other = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    kept, cosine = script.without_opposition(one, other)
    assert kept is one
    assert cosine == pytest.approx(5**-0.5)
    left, cosine = script.without_opposition(one, -3 * other)
    assert left.tolist() == [0.0, 2.0, 0.0]
    assert cosine == pytest.approx(-(5**-0.5))
    assert script.without_opposition(one, torch.zeros(3))[0] is one


@of("gradients")
def test_adaptive_weights_are_those_of_their_formula(script: ModuleType) -> None:
    """Level under a floor that drowns distances; else a position's loss counts by its distance to the target."""
    network = _network(build_network)
    flow_map, noise = FlowMap(network), torch.randn(4, 6, 5, generator=seeded(3))
    times = Pair(*(torch.full((4, 1), time) for time in (0.2, 0.4, 0.7)))
    state = interpolate(torch.zeros(4, 6, dtype=torch.long), noise, times.s)
    weight = torch.full((4, 6), 1 / 24)
    weight[0] = 0.0  # does not count towards the mean either
    plain = psd(flow_map, flow_map, state, times, weight)
    level = script.adaptive_psd(1e9)(flow_map, flow_map, state, times, weight)
    assert level.total.item() == pytest.approx(plain.total.item(), rel=1e-5)
    adaptive = script.adaptive_psd(1e-6)(flow_map, flow_map, state, times, weight)
    assert torch.allclose(adaptive.values, plain.values, atol=1e-6)
    with torch.no_grad():
        second = flow_map.jump(flow_map.jump(state, times.s, times.u), times.u, times.t)
        long = flow_map.jump(state, times.s, times.t)
        # X_{u,t} o X_{s,u} - X_{s,t} = gamma (target - mu)
        distance = (second.x - long.x).norm(dim=-1) * (1 - 0.2) / (0.7 - 0.2)
    factor = (1 / distance)[1:]
    expected = (plain.values[1:] * factor).sum() / factor.sum() * (18 / 24)
    assert adaptive.total.item() == pytest.approx(expected.item(), rel=1e-2)


@of("gradients")
def test_the_parts_of_an_objective_add_up(script: ModuleType) -> None:
    network, teacher = _network(build_network), _network(build_network, seed=1)
    config = Config(objective=ObjectiveConfig(off_diagonal=0.5, boundary=0.3))
    whole = FlowObjective(config, network, teacher)
    tokens = torch.randint(5, (16, 6), generator=seeded(1))

    def gradients(objective: Any) -> list[torch.Tensor]:
        network.zero_grad()
        batch = objective.batch(warp(5), 16, 6, (0, 1))
        batch.loss(tokens, torch.arange(16)).total.backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()]

    sums = zip(gradients(script.Part(whole, True)), gradients(script.Part(whole, False)), strict=True)
    for a, (b, c) in zip(gradients(whole), sums, strict=True):
        assert torch.allclose(a, b + c, atol=1e-6)
        assert not torch.equal(a, b) or not a.any()


@of("clock_width")
def test_laws_lie_apart_by_closed_forms(script: ModuleType) -> None:
    """p(t) = 2t beside uniform t: half of int |2t - 1| dt = 1/4, and int 4t^2 dt - 1 = 1/3."""
    rising = Law.from_cdf(torch.square)
    moved, variance = script.apart(rising, uniform())
    assert (moved, variance) == pytest.approx((1 / 4, 1 / 3), rel=1e-4)
    assert script.apart(rising, rising) == pytest.approx((0, 0), abs=1e-9)
    pairs = script.mean_apart([uniform(), rising], [uniform(), rising])  # 1 beside 1 as well
    assert pairs.moved == pytest.approx((1 / 4 + 1 / 4 + 0) / 3, rel=1e-4)


@of("gradients")
def test_two_passes_train_as_one_where_nothing_opposes(
    script: ModuleType, base_run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = distilled(base_run, tiny(shards, steps=4))
    plain = state(trained(config, tmp_path / "plain"), 4)
    monkeypatch.setattr(FlowTrainModule, "train_batch", script.operated_batch)
    monkeypatch.setattr(script, "without_opposition", lambda gradient, other: (gradient, 1.0))
    whole = state(trained(config, tmp_path / "parts"), 4)
    assert all(torch.allclose(plain[name], tensor, atol=1e-6) for name, tensor in whole.items())
    monkeypatch.undo()
    monkeypatch.setattr(FlowTrainModule, "train_batch", script.operated_batch)
    cut = state(trained(config, tmp_path / "cut"), 4)
    assert not all(torch.allclose(plain[name], tensor, atol=1e-6) for name, tensor in cut.items())
    assert len(script.cosines) == 8
    assert min(script.cosines[4:]) < 0


@of("clock_source")
def test_the_entropy_of_a_source_is_that_of_its_texts(script: ModuleType) -> None:
    """Against the law of all texts of three tokens, and against drawn ones."""
    source = script.Source.drawn(3, 2, seed=1)
    prior, within = source.log_prior.double().exp(), source.within.repeat(3)
    assert prior.sum().item() == pytest.approx(1)
    assert source.unigram_entropy == pytest.approx(torch.special.entr(prior).sum().item())
    step = source.transition.repeat_interleave(2, 0).repeat_interleave(2, 1) * within  # token to token
    assert torch.allclose(prior @ step, prior, atol=1e-6)  # stationary
    joint = prior[:, None, None] * step[:, :, None] * step[None]
    assert source.entropy(3) == pytest.approx(torch.special.entr(joint).sum().item() / 3, rel=1e-6)
    texts = source.texts(50_000, 3, seeded(0))
    counts = torch.zeros(6, 6, 6, dtype=torch.float64).index_put_(
        tuple(texts.unbind(1)), torch.ones(1, dtype=torch.float64), accumulate=True
    )
    error = (joint * (1 - joint) / len(texts)).sqrt()
    assert ((counts / len(texts) - joint).abs() < 5 * error + 1e-9).all()


@of("gradients")
def test_published_constants_weigh_the_divergence_twice(script: ModuleType) -> None:
    """4 KL + 2 r where the corrected loss is 2 KL + 2 r: they agree where the map is its target."""
    z, rate, other = (torch.randn(3, 4, 5, generator=seeded(i)) for i in range(3))
    factor = torch.rand(3, 4, generator=seeded(4))
    now = MovingReadout(Readout(z), Readout(rate))
    kl = torch.nn.functional.kl_div(z.log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    corrected, published = (loss(now, Readout(other), factor) for loss in (script.CORRECTED, script.published))
    assert torch.allclose(published - corrected, 2 * kl, atol=1e-5)
    same = Readout(z)
    assert torch.allclose(script.published(now, same, factor), script.CORRECTED(now, same, factor), atol=1e-5)
