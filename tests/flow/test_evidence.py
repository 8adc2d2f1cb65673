"""What time and state tell on their own: Bayes' rule by enumeration, tangents by torch.func.jvp."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from catmaps.flow import times
from catmaps.flow.evidence import (
    GAIN_CLAMP,
    Evidence,
    OffDiagonalGain,
    TimeFeatures,
    bayes_gain,
    bayes_gain_tangent,
)
from catmaps.flow.interpolant import interpolate

# The first use of torch.func.jvp in a process makes torch load its own scripted decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

F64 = torch.float64


def jvp(f: Callable[..., Tensor], x: tuple[Tensor, ...], dx: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The oracle: f and its derivative along dx."""
    value, rate = torch.func.jvp(f, x, dx)[:2]
    return value, rate


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in fp64 with every parameter drawn anew, so that no part is silent."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        parameter.data.normal_(generator=generator)
    return module


def gain_of(seed: int) -> OffDiagonalGain:
    gain = randomised(OffDiagonalGain(), seed)
    assert isinstance(gain, OffDiagonalGain)
    return gain


def ordered_times(seed: int = 0, shape: tuple[int, int] = (4, 6)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s, t = torch.rand(2, *shape, generator=generator, dtype=F64).sort(0).values
    return s, t


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.8, 0.95])
def test_bayes_gain_gives_the_exact_posterior_of_a_lone_noisy_token(t: float) -> None:
    generator = torch.Generator().manual_seed(7)
    prior = torch.rand(6, generator=generator, dtype=F64).softmax(-1)
    tokens = torch.randint(6, (20, 1), generator=generator)
    times_ = torch.full((20, 1), t, dtype=F64)
    x = interpolate(tokens, torch.randn(20, 1, 6, generator=generator, dtype=F64), times_).x
    # Enumerate: prior_k times the density of x around each token's own mean t e_k, variance (1 - t)^2.
    distance = (x[..., None, :] - t * torch.eye(6, dtype=F64)).square().sum(-1)
    exact = (prior.log() - distance / (2 * (1 - t) ** 2)).softmax(-1)
    ours = (prior.log() + bayes_gain(times_)[..., None] * x).softmax(-1)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-13)


def test_bayes_gain_is_constant_beyond_its_clamp() -> None:
    t = torch.tensor([GAIN_CLAMP, 0.97, 1.0], dtype=F64)
    assert torch.equal(bayes_gain(t), torch.full((3,), bayes_gain(t[:1]).item(), dtype=F64))
    assert bayes_gain(t)[0].item() == pytest.approx(0.95 / 0.05**2)
    assert torch.equal(bayes_gain_tangent(t[1:], torch.ones(2, dtype=F64)), torch.zeros(2, dtype=F64))


def test_bayes_gain_tangent_is_its_derivative() -> None:
    t = torch.linspace(0, 1, 101, dtype=F64)[torch.arange(101) != 95]
    dt = torch.linspace(-1, 2, 100, dtype=F64)
    _, expected = jvp(bayes_gain, (t,), (dt,))
    torch.testing.assert_close(bayes_gain_tangent(t, dt), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_gain_is_bayes_on_the_diagonal_whatever_was_learned(seed: int) -> None:
    s, _ = ordered_times(seed)
    assert torch.equal(gain_of(seed)(s, s), bayes_gain(s))


@pytest.mark.parametrize("seed", range(3))
def test_gain_never_falls_below_bayes(seed: int) -> None:
    s, t = ordered_times(seed)
    assert bool((gain_of(seed)(s, t) > bayes_gain(s)).all())


@pytest.mark.parametrize("initial", [2.5, 1.0])
def test_gain_at_the_start(initial: float) -> None:
    gain = OffDiagonalGain(initial).double()
    zero, one = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)
    assert gain(zero, one).item() == pytest.approx(initial, abs=1e-6)
    s = torch.tensor([[0.0, 0.3, 0.8]], dtype=F64)
    slope = (gain(s, s + 1e-4) - bayes_gain(s)) / 1e-4
    torch.testing.assert_close(slope, torch.full_like(s, 0.5), rtol=0, atol=1e-3)


def test_gain_is_repeatably_reset() -> None:
    gain = gain_of(0)
    gain.reset_parameters()
    one = torch.ones(1, 1, dtype=F64)
    assert gain(0 * one, one).item() == pytest.approx(2.5, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_gain_tangent_is_its_derivative(seed: int) -> None:
    gain, (s, t) = gain_of(seed), ordered_times(seed)
    ds, dt = torch.randn(2, *s.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    expected = jvp(lambda s, t: gain(s, t), (s, t), (ds, dt))
    torch.testing.assert_close(gain.tangent(s, t, ds, dt), expected, rtol=1e-11, atol=1e-12)


def test_gain_of_one_start_and_many_ends_broadcasts() -> None:
    gain, (s, t) = gain_of(1), ordered_times(1)
    s, t = s[:, :1] * 0.1, 0.1 + 0.9 * t
    torch.testing.assert_close(gain(s, t), gain(s.expand_as(t), t), rtol=0, atol=0)
    ones = torch.ones_like(t)
    wide = gain.tangent(s.expand_as(t), t, ones, ones)
    torch.testing.assert_close(gain.tangent(s, t, ones[:, :1], ones), wide, rtol=0, atol=0)


def features(name: str = "warp") -> TimeFeatures:
    return TimeFeatures(times.warp(27) if name == "warp" else times.uniform())


@pytest.mark.parametrize("name", ["warp", "uniform"])
def test_features_are_clock_log_snr_and_their_waves(name: str) -> None:
    phi, t = features(name).double(), torch.linspace(0, 1, 41, dtype=F64)[None]
    value = phi(t)
    assert value.shape == (1, 41, phi.size)
    clock = times.warp(27) if name == "warp" else times.uniform()
    torch.testing.assert_close(value[..., 0], clock.cdf(t), rtol=0, atol=1e-6)
    log_snr = 2 * torch.log(t / (1 - t))
    torch.testing.assert_close(value[..., 1], log_snr.clamp(-8, 8) / 8, rtol=1e-9, atol=1e-9)
    wave = math.pi * torch.arange(1, 9, dtype=F64)
    for i in (0, 1):
        phase = value[..., i, None] * wave
        torch.testing.assert_close(value[..., 2 + 8 * i : 10 + 8 * i], phase.sin(), rtol=0, atol=1e-5)
        torch.testing.assert_close(value[..., 18 + 8 * i : 26 + 8 * i], phase.cos(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["warp", "uniform"])
def test_features_tangent_is_their_derivative(name: str) -> None:
    phi, generator = features(name).double(), torch.Generator().manual_seed(1)
    # Past both ends of the log-SNR clamp (t = 0.018 and 0.982) as well as inside.
    t = torch.cat([torch.rand(3, 20, generator=generator, dtype=F64), torch.tensor([[0.01, 0.99]] * 3)], 1)
    dt = torch.randn(t.shape, generator=generator, dtype=F64)
    expected = jvp(lambda t: phi(t), (t,), (dt,))
    torch.testing.assert_close(phi.tangent(t, dt), expected, rtol=1e-11, atol=1e-11)


def test_features_are_finite_and_tame_at_both_ends() -> None:
    phi, t = features(), torch.tensor([[0.0, 1e-9, 1e-6, 0.5, 1 - 1e-6, 1.0]])
    value, rate = phi.tangent(t, torch.ones_like(t))
    assert bool(torch.isfinite(value).all() and torch.isfinite(rate).all())
    assert value.abs().max().item() <= 1
    # At most 4 periods over the clock, of slope up to 4.1; log-SNR / 8 moves at most 14 per unit of t.
    assert rate.abs().max().item() < 8 * math.pi * 15


def test_features_condition_a_loaded_network_as_it_was_trained() -> None:
    trained, other = features(), TimeFeatures(times.mixture([(1.0, times.logit_normal())]))
    t = torch.linspace(0, 1, 9)[None]
    assert not torch.equal(trained(t), other(t))
    other.load_state_dict(trained.state_dict())
    assert torch.equal(trained(t), other(t))


def test_evidence_holds_two_separate_gains_and_the_features() -> None:
    evidence = Evidence(times.uniform(), initial_gain=1.5)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    for gain in (evidence.gain_in, evidence.gain_out):
        assert gain(zero, one).item() == pytest.approx(1.5, abs=1e-6)
    assert evidence.gain_in is not evidence.gain_out
    assert evidence.features(one).shape == (1, 1, evidence.features.size)
