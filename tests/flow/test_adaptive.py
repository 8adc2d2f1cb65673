"""The running histogram of the bound over time, and the law it leads to."""

import pytest
import torch
from torch import Tensor

from catmaps.flow import times
from catmaps.flow.adaptive import BINS, LAST, REFRESH, InformationClock

F64 = torch.float64


def squared_error(t: Tensor) -> Tensor:
    """A synthetic profile: the context resolves the token around t = 0.6."""
    return 0.9 * torch.sigmoid((0.6 - t) / 0.03)


def information(t: Tensor) -> Tensor:
    """d NELBO / dt = u MSE du/dt, u = t / (1 - t), du/dt = (1 - t)^-2; cut at LAST."""
    u = t / (1 - t)
    return torch.where(t < LAST, u * squared_error(t) / (1 - t).square(), torch.zeros_like(t))


def trained(clock: InformationClock, steps: int, batch: int = 64, seed: int = 0) -> InformationClock:
    """The clock after some steps of drawing times from its own law."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        t = clock.law.quantile(times.stratified(batch, generator))
        clock.update(clock.contributions(t, squared_error(t)), step)
    return clock


@pytest.mark.parametrize("base", ["warp", "uniform"])
def test_law_levels_the_information_profile(base: str) -> None:
    start = times.warp(27) if base == "warp" else times.uniform()
    clock = trained(InformationClock(start, uniform_share=0.1), 600)
    t = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000
    profile = information(t)
    edges = start.quantile(torch.linspace(0, 1, BINS + 1, dtype=F64))
    cumulative = torch.cat([torch.zeros(1, dtype=F64), profile.cumsum(0) / profile.sum()])
    at_edges = cumulative[(edges * 200_000).round().long()]
    expected = 0.9 * at_edges + 0.1 * torch.linspace(0, 1, BINS + 1, dtype=F64)
    torch.testing.assert_close(clock.law.cdf(edges), expected, rtol=0, atol=0.01)


def test_draws_of_the_law_carry_equal_information() -> None:
    start = times.warp(27)
    clock = trained(InformationClock(start, uniform_share=0.1), 600)
    q = (torch.arange(64_000, dtype=F64) + 0.5) / 64_000
    t = clock.law.quantile(q)
    # What a draw adds to the bound, and to the share of the clock that is always kept.
    per_draw = (information(t) / clock.law.density(t)).unflatten(0, (32, -1)).mean(1)
    kept = (0.1 * start.density(t) / clock.law.density(t)).unflatten(0, (32, -1)).mean(1)
    per_informed = per_draw[kept < 0.5] / (1 - kept[kept < 0.5])
    assert len(per_informed) >= 24
    assert (per_informed.std() / per_informed.mean()).item() < 0.05
    before = start.quantile(q)
    spread = (information(before) / start.density(before)).unflatten(0, (32, -1)).mean(1)
    assert (spread.std() / spread.mean()).item() > 0.5  # the start law is far from level


def test_information_is_per_unit_of_the_clock() -> None:
    clock = InformationClock(times.uniform())
    added = clock.contributions(torch.tensor([0.5, 0.51]), torch.tensor([0.2, 0.4]))
    hit = added[1].nonzero()[:, 0]
    assert hit.tolist() == [32]
    expected = sum(t / (1 - t) ** 3 * error for t, error in ((0.5, 0.2), (0.51, 0.4)))
    assert added[0, 32].item() == pytest.approx(expected, rel=1e-6)
    assert added[1, 32].item() == 2


def test_contributions_add_up_over_any_split() -> None:
    clock = InformationClock(times.warp(27))
    t = torch.rand(100, generator=torch.Generator().manual_seed(1))
    error = squared_error(t)
    whole = clock.contributions(t, error)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(2))
    parts = [clock.contributions(t[i], error[i]) for i in order.split([1, 60, 39])]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-12, atol=1e-12)
    assert whole[1].sum().item() == 100
    assert torch.equal(clock.contributions(t[:0], error[:0]), torch.zeros(2, BINS, dtype=F64))


def test_nothing_is_added_beyond_the_last_informative_time_but_visits_count() -> None:
    clock = InformationClock(times.uniform())
    t = torch.tensor([0.951, 0.98, 1.0])
    added = clock.contributions(t, torch.ones(3))
    assert torch.equal(added[0], torch.zeros(BINS, dtype=F64))
    assert added[1].sum().item() == 3
    assert added[1, -1].item() == 1  # t = 1 belongs to the last bin
    assert bool(torch.isfinite(added).all())


def test_clock_keeps_its_own_law_until_every_bin_was_seen() -> None:
    start = times.uniform()
    clock = InformationClock(start, patience=2.0)
    middles = (torch.arange(BINS, dtype=F64) + 0.5) / BINS
    some = clock.contributions(middles[:-1].repeat(4), torch.ones(4 * (BINS - 1)))
    last = clock.contributions(middles[-1:], torch.ones(1))
    clock.update(some, REFRESH)
    assert clock.law is start
    clock.update(last, 2 * REFRESH)  # seen, but once only
    assert clock.law is start
    clock.update(2 * last, 3 * REFRESH)
    assert clock.law is not start


def test_law_follows_only_every_refresh() -> None:
    clock = InformationClock(times.uniform(), patience=1.0)
    t = (torch.arange(BINS * 4, dtype=F64) + 0.5) / (BINS * 4)
    added = clock.contributions(t, squared_error(t))
    clock.update(added, REFRESH - 1)
    assert clock.law is clock.clock
    clock.update(added, REFRESH)
    law = clock.law
    assert law is not clock.clock
    clock.update(added, REFRESH + 1)
    assert clock.law is law


def test_all_bins_of_the_default_clock_are_visited_by_its_own_draws() -> None:
    clock = trained(InformationClock(times.warp(27)), REFRESH)
    assert clock.law is not clock.clock
    # The informed law starves no bin either: a tenth of the draws keep to the clock.
    again = trained(clock, 1000, seed=1)
    assert again.counts.min().item() >= clock.patience


def test_old_observations_fade() -> None:
    clock = InformationClock(times.uniform(), decay=0.5, patience=1.0)
    t = (torch.arange(BINS, dtype=F64) + 0.5) / BINS
    for _ in range(30):
        clock.update(clock.contributions(t, torch.zeros(BINS)), 1)
    for _ in range(30):
        clock.update(clock.contributions(t, torch.ones(BINS)), 1)
    clock.refresh()
    expected = torch.where(t < LAST, t / (1 - t).pow(3), torch.zeros_like(t))
    torch.testing.assert_close(clock.information, expected, rtol=1e-6, atol=1e-6)


def test_state_round_trip_gives_the_same_law_and_future() -> None:
    clock = trained(InformationClock(times.warp(27)), 130)
    assert clock.law is not clock.clock
    other = InformationClock(times.warp(27))
    other.load_state_dict(clock.state_dict())
    assert torch.equal(other.law.table, clock.law.table)
    t = torch.rand(64, generator=torch.Generator().manual_seed(3))
    for one in (clock, other):
        one.update(one.contributions(t, squared_error(t)), 4 * REFRESH)
    assert torch.equal(other.law.table, clock.law.table)
    assert torch.equal(other.counts, clock.counts)


def test_state_of_a_new_clock_round_trips_to_its_own_law() -> None:
    clock = InformationClock(times.uniform())
    clock.load_state_dict(InformationClock(times.uniform()).state_dict())
    assert clock.law is clock.clock


def test_saved_state_is_a_snapshot() -> None:
    clock = trained(InformationClock(times.uniform()), 3)
    saved = clock.state_dict()
    before = {name: value.clone() for name, value in saved.items()}
    trained(clock, 60)
    for name, value in saved.items():
        assert torch.equal(value, before[name]), name


def test_an_adapted_law_is_in_force_until_all_its_bins_are_known() -> None:
    """At 16 draws a step a quiet bin never has eight visits in its memory; its share of them is enough."""
    start = times.warp(27)
    law = trained(InformationClock(start), 600).law
    clock = trained(InformationClock(start, law), REFRESH, batch=16)
    assert clock.law is law
    again = InformationClock(start, law)
    again.load_state_dict(clock.state_dict())
    assert again.law is law
    trained(clock, 400, batch=16)
    assert bool(clock.information.any())
    assert clock.law is not law
    edges = start.quantile(torch.linspace(0, 1, BINS + 1, dtype=F64))
    torch.testing.assert_close(clock.law.cdf(edges), law.cdf(edges), rtol=0, atol=0.03)
