"""Laws of time against closed forms and an independent quadrature."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from catmaps.flow import times
from catmaps.flow.interpolant import interpolate
from catmaps.flow.noise import Noise
from catmaps.flow.times import Law

F64 = torch.float64


@cache
def law_of(name: str) -> Law:
    """Laws by name; each is tabulated once for the whole file."""
    makers = {
        "uniform": times.uniform,
        "logit_normal": times.logit_normal,
        "warp": lambda: times.mixture([(0.9, law_of("27")), (0.1, times.uniform())]),
        "adaptive": lambda: times.information_uniform(
            law_of("warp"), torch.linspace(0, 1, 64).square() * torch.linspace(1, 0, 64)
        ),
    }
    return makers[name]() if name in makers else times.decoding_error(int(name))


LAWS = ["uniform", "logit_normal", "27", "50257", "200000", "warp", "adaptive"]


def uniform_grid(n: int = 1001) -> Tensor:
    return torch.linspace(0, 1, n, dtype=F64)


def error_free_clock(vocab_size: int, t: Tensor) -> Tensor:
    """tau(t) by another route: the token loses to M, the largest of V - 1 normals, if M > z + u: E Phi(M - u).

    The density of M is (V - 1) phi Phi^(V - 2); composite Gauss-Legendre over m in [-9, 12].
    """
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(24))
    edges = torch.linspace(-9, 12, 61, dtype=F64)
    half = (edges[1] - edges[0]) / 2
    m = ((edges[:-1] + half)[:, None] + half * nodes).flatten()
    log_density = -m.square() / 2 + (vocab_size - 2) * torch.special.log_ndtr(m)
    weight = half * weights.repeat(60) * log_density.exp() * (vocab_size - 1) / math.sqrt(2 * math.pi)
    wrong = torch.special.ndtr(m - (t / (1 - t))[:, None]) @ weight
    return 1 - vocab_size / (vocab_size - 1) * wrong


def test_clock_of_two_symbols_is_a_normal_distribution_function() -> None:
    law = law_of("2")
    t = law.t[:-1]
    right = torch.special.ndtr(t / (1 - t) / math.sqrt(2))
    torch.testing.assert_close(law.cdf(t), 2 * right - 1, rtol=0, atol=3e-9)


@pytest.mark.parametrize("vocab_size", [3, 27, 50_257, 200_000])
def test_clock_agrees_with_an_independent_quadrature(vocab_size: int) -> None:
    law = law_of(str(vocab_size))
    at_nodes = law.t[5:-1:16]
    torch.testing.assert_close(law.cdf(at_nodes), error_free_clock(vocab_size, at_nodes), rtol=0, atol=3e-9)
    between = ((law.t[1:] + law.t[:-1]) / 2)[3:-1:8]
    torch.testing.assert_close(law.cdf(between), error_free_clock(vocab_size, between), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("vocab_size", "quantiles"),
    [
        (27, {0.01: 0.106, 0.1: 0.426, 0.5: 0.669, 0.9: 0.775, 0.99: 0.823}),
        (50_257, {0.001: 0.512, 0.01: 0.646, 0.1: 0.744, 0.5: 0.809, 0.9: 0.848, 0.99: 0.870}),
    ],
)
def test_known_quantiles_of_the_clock(vocab_size: int, quantiles: dict[float, float]) -> None:
    t = law_of(str(vocab_size)).quantile(torch.tensor(list(quantiles), dtype=F64))
    torch.testing.assert_close(t, torch.tensor(list(quantiles.values()), dtype=F64), rtol=0, atol=2e-3)


def test_clock_counts_decoding_errors_of_the_path() -> None:
    n, vocab_size = 20_000, 27
    tokens = torch.arange(n)[:, None] % vocab_size
    noise = Noise.of((0, 0), torch.arange(n), 1, vocab_size).x
    for t in (0.4, 0.67):
        x = interpolate(tokens, noise, torch.full((n, 1), t)).x
        wrong = (x.argmax(-1) != tokens).double().mean().item()
        tau = law_of("27").cdf(torch.tensor(t, dtype=F64)).item()
        assert 1 - vocab_size / (vocab_size - 1) * wrong == pytest.approx(tau, abs=5 * 0.52 / math.sqrt(n))


@pytest.mark.parametrize("name", LAWS)
def test_quantile_inverts_cdf(name: str) -> None:
    law, q = law_of(name), uniform_grid()
    torch.testing.assert_close(law.cdf(law.quantile(q)), q, rtol=0, atol=1e-12)
    # The other way round a flat stretch (slope 1e-9) loses digits, but never the order.
    t = law.quantile(law.cdf(uniform_grid()))
    torch.testing.assert_close(t, uniform_grid(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LAWS)
def test_density_is_the_derivative_of_cdf_and_integrates_to_one(name: str) -> None:
    law = law_of(name)
    width, middle = law.t.diff(), (law.t[1:] + law.t[:-1]) / 2
    density = law.density(middle)
    assert bool((density > 0).all())
    assert (density * width).sum().item() == pytest.approx(1, abs=1e-12)
    slope = (law.cdf(middle + width / 4) - law.cdf(middle - width / 4)) / (width / 2)
    torch.testing.assert_close(density, slope, rtol=1e-8, atol=1e-9)


def test_density_of_two_symbols_in_closed_form() -> None:
    law = law_of("2")
    t = (law.t[1:-2] + law.t[2:-1]) / 2
    u = t / (1 - t)
    expected = torch.exp(-u.square() / 4) / math.sqrt(math.pi) / (1 - t).square()
    torch.testing.assert_close(law.density(t), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAWS)
def test_laws_keep_dtype_shape_and_range(name: str) -> None:
    law = law_of(name)
    for dtype in (torch.float32, F64):
        q = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
        for out in (law.cdf(q), law.quantile(q), law.density(q)):
            assert (out.dtype, out.shape) == (dtype, q.shape)
        ends = torch.tensor([0.0, 1.0], dtype=dtype)
        assert torch.equal(law.cdf(ends), ends)
        assert torch.equal(law.quantile(ends), ends)


def test_mixture_adds_distribution_functions() -> None:
    a, b, t = law_of("27"), law_of("logit_normal"), law_of("27").t
    mixed = times.mixture([(3.0, a), (1.0, b)])
    torch.testing.assert_close(mixed.cdf(t), 0.75 * a.cdf(t) + 0.25 * b.cdf(t), rtol=0, atol=2e-9)
    torch.testing.assert_close(times.warp(27).cdf(t), 0.9 * a.cdf(t) + 0.1 * t, rtol=0, atol=2e-9)


@pytest.mark.parametrize(("mean", "std"), [(-0.4, 1.0), (-1.5, 0.8), (0.5, 0.3)])
def test_logit_normal_is_the_sigmoid_of_a_normal(mean: float, std: float) -> None:
    q = torch.linspace(0.001, 0.999, 999, dtype=F64)
    expected = torch.sigmoid(mean + std * torch.special.ndtri(q))
    torch.testing.assert_close(times.logit_normal(mean, std).quantile(q), expected, rtol=0, atol=1e-6)


def test_unusable_laws_are_refused() -> None:
    uniform = times.uniform()
    with pytest.raises(ValueError, match="std > 0"):
        times.logit_normal(0.0, 0.0)
    with pytest.raises(ValueError, match="at least 2"):
        times.decoding_error(1)
    for parts in ([], [(0.0, uniform)], [(1.0, uniform), (-0.5, uniform)]):
        with pytest.raises(ValueError, match="positive sum"):
            times.mixture(parts)
    t = torch.linspace(0, 1, 3, dtype=F64)
    for table in ([0.0, 0.5, 0.5], [0.0, 1.5, 1.0], [0.1, 0.5, 1.0], [0.0, 0.5, 0.9]):
        with pytest.raises(ValueError, match="rises strictly"):
            Law(t, torch.tensor(table, dtype=F64))
    with pytest.raises(ValueError, match="at least 1 step"):
        times.grid(uniform, 0)


@pytest.mark.parametrize("name", LAWS)
def test_midpoint_is_inside_and_halfway_on_the_clock(name: str) -> None:
    law, generator = law_of(name), torch.Generator().manual_seed(3)
    s, t = law.quantile(torch.rand(2, 2000, generator=generator)).sort(0).values
    t = torch.where(t > s, t, (s + 0.01).clamp_max(1))
    middle = law.midpoint(s, t)
    assert bool((s < middle).all() and (middle < t).all())
    wide = t - s > 1e-3
    halfway = (law.cdf(s.double()) + law.cdf(t.double())) / 2
    torch.testing.assert_close(law.cdf(middle.double())[wide], halfway[wide], rtol=0, atol=1e-5)
    assert torch.equal(law.midpoint(s, s), s)


def extreme_draws(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(gap, start, boundary) draws in [0, 1) with all corners of (gap, start) among them."""
    gap, start, boundary = torch.rand(3, n, generator=torch.Generator().manual_seed(4))
    last = 1 - 2**-24
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1e-7, 1 / 512, 0.5, last])] * 2)
    gap[: len(corners)], start[: len(corners)] = corners.unbind(-1)
    return gap, start, boundary


@pytest.mark.parametrize("name", LAWS)
def test_pairs_are_ordered_in_single_precision(name: str) -> None:
    gap, start, boundary = extreme_draws(50_000)
    s, u, t = times.pairs(law_of(name), gap, start, boundary, 0.1)
    assert s.shape == u.shape == t.shape == (50_000, 1)
    assert s.dtype == u.dtype == t.dtype == torch.float32
    assert bool((s >= 0).all() and (t <= 1).all())
    assert bool((s < u).all() and (u < t).all())


@pytest.mark.parametrize("name", ["uniform", "warp", "50257"])
def test_pairs_follow_the_law_of_gaps_and_starts(name: str) -> None:
    law = law_of(name)
    gap, start, boundary = torch.rand(3, 4000, generator=torch.Generator().manual_seed(5), dtype=F64)
    s, u, t = (time[:, 0] for time in times.pairs(law, gap, start, boundary, 0.25))
    whole = boundary < 0.25
    assert torch.equal((s == 0) & (t == 1), whole)
    gap = torch.where(whole, 1.0, gap.clamp_min(1 / 512))
    torch.testing.assert_close(law.cdf(t) - law.cdf(s), gap, rtol=0, atol=1e-9)
    torch.testing.assert_close(law.cdf(s)[~whole], (start * (1 - gap))[~whole], rtol=0, atol=1e-9)
    torch.testing.assert_close(law.cdf(u), (law.cdf(s) + law.cdf(t)) / 2, rtol=0, atol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_pairs_have_exactly_the_boundary_share_under_stratified_draws(share: float) -> None:
    generator = torch.Generator().manual_seed(6)
    gap, start, boundary = (times.stratified(64, generator) for _ in range(3))
    s, _, t = times.pairs(law_of("warp"), gap, start, boundary, share)
    assert int(((s == 0) & (t == 1)).sum()) == round(64 * share)
    s, _, t = times.pairs(law_of("warp"), gap, start, torch.zeros(64), 0.0)
    assert not ((s == 0) & (t == 1)).any()


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 1000])
def test_stratified_draws_fall_one_into_each_cell(batch: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    for dtype in (torch.float32, F64):
        q = times.stratified(batch, generator, dtype)
        assert q.dtype == dtype
        cells = (q.double() * batch).floor().long().sort().values
        assert torch.equal(cells, torch.arange(batch))


def test_stratified_draws_are_random_uniform_and_repeatable() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([times.stratified(8, generator) for _ in range(2000)])
    again = times.stratified(8, torch.Generator().manual_seed(0))
    assert torch.equal(draws[0], again)
    torch.testing.assert_close(draws.mean(0), torch.full((8,), 0.5), rtol=0, atol=5 * 0.29 / math.sqrt(2000))
    assert draws.argsort(-1).unique(dim=0).shape[0] > 1900  # out of 40,320 orders


def test_stratified_draws_stay_below_one_after_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(1 - 2**-53, dtype=F64))
    for dtype in (torch.float32, F64):
        assert times.stratified(1024, torch.Generator(), dtype).max().item() < 1


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("steps", [1, 4, 1024])
def test_grid_is_equally_spaced_on_the_clock(name: str, steps: int) -> None:
    law = law_of(name)
    t = times.grid(law, steps)
    assert t.shape == (steps + 1,)
    assert (t[0].item(), t[-1].item()) == (0.0, 1.0)
    assert bool((t.diff() > 0).all())
    torch.testing.assert_close(law.cdf(t.double()), uniform_grid(steps + 1), rtol=0, atol=1e-6)


def test_a_bend_below_one_moves_the_grid_late() -> None:
    law = law_of("warp")
    t = times.grid(law, 4, bend=1 / 3)
    assert (t[0].item(), t[-1].item()) == (0.0, 1.0)
    expected = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=F64) ** (1 / 3)
    torch.testing.assert_close(law.cdf(t.double()), expected, rtol=0, atol=1e-6)
    assert bool((t[1:-1] > times.grid(law, 4)[1:-1]).all())


@pytest.mark.parametrize("clock", ["uniform", "27", "warp"])
def test_information_uniform_levels_a_known_profile(clock: str) -> None:
    base = law_of(clock)
    information = torch.tensor([0.0, 0.1, 2.0, 5.0, 3.0, 1.0, 0.5, 0.0], dtype=F64)
    law = times.information_uniform(base, information, uniform_share=0.2)
    edges = base.quantile(uniform_grid(9))
    share = 0.8 * information / information.sum() + 0.2 / 8
    # The table has its own nodes: a bin's edge is met within one of its cells.
    cell = (base.density(edges) / (len(law.t) - 1)).max().item() * 8
    torch.testing.assert_close(law.cdf(edges).diff(), share, rtol=0, atol=cell)


def test_information_uniform_gives_every_draw_the_same_information() -> None:
    information = torch.linspace(0.5, 4, 16, dtype=F64)
    law = times.information_uniform(times.uniform(), information, uniform_share=0.0)
    t = law.quantile((torch.arange(4096, dtype=F64) + 0.5) / 4096)
    per_draw = information[(t * 16).long()] / law.density(t)
    torch.testing.assert_close(per_draw, torch.full_like(t, information.mean().item()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_information_uniform_without_information_is_the_clock(bad: float) -> None:
    clock = times.uniform()
    assert times.information_uniform(clock, torch.full((4,), bad)) is clock
