"""Weights by time: mean one, the identity of law x weight, what each stands for."""

from dataclasses import replace

import pytest
import torch
from oracle import seeded

from catmaps.flow import times
from catmaps.flow.objective import ObjectiveConfig, plan
from catmaps.flow.times import Law, stratified
from catmaps.flow.weighting import CLIP, WEIGHTINGS, LossMoments, weights

LAWS = {"uniform": times.uniform(), "warp": times.warp(27), "logit_normal": times.logit_normal()}


def seen(law: Law, batches: int = 40) -> LossMoments:
    """Moments of a loss whose mean is 3 (1 - t) + 0.1 and whose variance is (1 + t)^2."""
    moments, generator = LossMoments(law), seeded(0)
    for _ in range(batches):
        t = law.quantile(stratified(4096, generator, torch.float64))
        loss = 3 * (1 - t) + 0.1 + (1 + t) * torch.randn(t.shape, generator=generator, dtype=torch.float64)
        moments.update(moments.contributions(t, loss))
    return moments


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_weights_are_positive_of_mean_one_and_clipped(name: str, law: Law) -> None:
    t = law.quantile((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    w = weights(name, t, law, seen(law))
    assert w.mean().item() == pytest.approx(1, abs=0.01)
    assert w.min() > 0
    assert w.max() <= 1.01 * CLIP


def test_unit_is_one_exactly() -> None:
    t = torch.rand(9, generator=seeded(0))
    assert torch.equal(weights("unit", t, LAWS["warp"], LossMoments(LAWS["warp"])), torch.ones(9))


def test_law_times_weight_is_what_counts() -> None:
    """Under any law the likelihood weighs a test function as the integral over u does, where nothing is clipped."""
    middle = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    means = []
    for law in (times.uniform(), times.mixture([(0.5, times.uniform()), (0.5, times.logit_normal(-1.0, 0.7))])):
        t = law.quantile(middle)
        w = weights("likelihood", t, law, LossMoments(law))
        early = t < 0.4  # far below the clip
        means.append((w * early * (1 - t).pow(5)).sum() / (w * early).sum())
    assert means[0].item() == pytest.approx(means[1].item(), rel=1e-3)


def test_moments_are_those_of_the_loss() -> None:
    moments = seen(LAWS["warp"])
    t = torch.linspace(0.1, 0.8, 8, dtype=torch.float64)
    torch.testing.assert_close(moments.mean(t), 3 * (1 - t) + 0.1, atol=0.1, rtol=0)
    torch.testing.assert_close(moments.variance(t), (1 + t).square(), atol=0, rtol=0.1)


def test_before_anything_was_seen_all_times_count_alike() -> None:
    law = LAWS["warp"]
    t = law.quantile((torch.arange(64) + 0.5) / 64)
    for name in ("learned", "inverse_variance"):
        torch.testing.assert_close(weights(name, t, law, LossMoments(law)), torch.ones(64))


def test_learned_and_inverse_variance_level_their_moment() -> None:
    law = LAWS["warp"]
    moments, t = seen(law), torch.linspace(0.05, 0.7, 10, dtype=torch.float64)
    for name, moment in (("learned", moments.mean(t)), ("inverse_variance", moments.variance(t))):
        level = weights(name, t, law, moments) * moment
        torch.testing.assert_close(level, level[:1].expand(10))


def test_a_plan_weighs_its_diagonal_alone() -> None:
    config = replace(ObjectiveConfig(off_diagonal=0.5), weighting="snr")
    law = LAWS["warp"]
    drawn = plan(config, law, 32, 8, seeded(0), weigh=lambda t: 2 + t)
    off = (drawn.role != 0)[:, None]
    assert bool(off.any())
    torch.testing.assert_close(drawn.weight, torch.where(off, 1.0, 2 + drawn.times.t))
    same = plan(config, law, 32, 8, seeded(0))
    assert torch.equal(same.weight, torch.ones(32, 1))
    assert all(torch.equal(a, b) for a, b in zip(same.times, drawn.times, strict=True))
