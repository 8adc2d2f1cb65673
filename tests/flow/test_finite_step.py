"""The bound (16) against exact models: it bounds the sampler's own law, falls with the calls, and knows good grids."""

import itertools
import math

import pytest
import torch
from oracle import ConstantMap, ExactMap, ExactModel, Scaled, random_chain, random_joint, seeded
from torch import Tensor

from catmaps.flow.finite_step import best_grid, finite_step_bound, optimise_grid, step_cost, step_costs
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.likelihood import nelbo
from catmaps.flow.samplers import localisation, sample
from catmaps.flow.times import grid, warp

F64 = torch.float64
JOINT = random_joint(3, 2, seed=1, spread=1.2)
CHAIN = random_chain(4, 6, seed=2)
CLOCK = warp(3)


def mean_and_error(nats: Tensor) -> tuple[float, float]:
    return nats.mean().item(), nats.std().item() / math.sqrt(len(nats))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_it_bounds_the_law_of_the_sampler(steps: int) -> None:
    """-log p_N of every text, from the frequencies of a hundred thousand samples of `localisation` on the same grid."""
    times, flow_map, texts = grid(CLOCK, steps), FlowMap(JOINT), JOINT.texts()
    drawn = sample(flow_map, localisation, times, (100_000, 2, 3), generator=seeded(1), dtype=F64)
    share = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9) / len(drawn)
    error = ((1 - share) / (share * len(drawn))).sqrt()  # of -log share
    tokens = texts.repeat_interleave(2000, 0)
    bound = finite_step_bound(flow_map, tokens, times, generator=seeded(2), dtype=F64).nats.view(9, -1)
    slack = bound.mean(1) + share.log()
    noise = (error.square() + bound.var(1) / bound.shape[1]).sqrt()
    assert bool((slack > -4 * noise).all())
    assert (slack * share).sum().item() < 0.3  # and it is no wild guess


def test_one_call_is_the_cross_entropy_of_the_marginals() -> None:
    tokens = CHAIN.sample(64, seeded(3))
    bound = finite_step_bound(FlowMap(CHAIN), tokens, torch.tensor([0.0, 1.0]), generator=seeded(4), dtype=F64)
    marginals = CHAIN.log_marginals(torch.zeros(1, 6, 4, dtype=F64)).log_softmax(-1).expand(64, 6, 4)
    expected = -marginals.gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(bound.per_token, expected)
    assert bound.stderr.tolist() == pytest.approx([0.0] * 64, abs=1e-12)


@pytest.mark.parametrize("model", [JOINT, CHAIN], ids=["joint", "chain"])
def test_more_calls_bring_it_down_to_the_nelbo(model: ExactModel) -> None:
    tokens, clock = model.sample(3000, seeded(5)), warp(model.vocab_size)
    entropy = -model.log_prob(tokens).mean().item()
    slack, errors = [], []
    for steps in (1, 2, 4, 16, 64):
        few = tokens[: max(500, 3000 // steps)]
        bound = finite_step_bound(FlowMap(model), few, grid(clock, steps), generator=seeded(6), dtype=F64)
        mean, error = mean_and_error(bound.nats + model.log_prob(few))
        assert mean > -4 * error
        slack.append(mean)
        errors.append(error)
    assert all(
        a > b - 3 * math.hypot(e, f)
        for (a, b), (e, f) in zip(itertools.pairwise(slack), itertools.pairwise(errors), strict=True)
    )
    assert slack[0] > 0.05 * entropy
    assert slack[-1] < 0.02 * entropy + 4 * errors[-1]


def test_taking_off_the_noise_of_first_order_changes_no_mean() -> None:
    """The plain summand of (16) has the same mean, and at small steps many times the spread."""
    tokens = torch.tensor([[1, 0]]).expand(40_000, 2)
    log_mu = torch.randn(1, 2, 3, generator=seeded(7), dtype=F64).log_softmax(-1).expand(40_000, 2, 3)
    noise = torch.randn(log_mu.shape, generator=seeded(8), dtype=F64)
    for size, gain in ((0.01, 10.0), (1.0, 1.5), (30.0, 0.9)):
        increment = torch.full((len(tokens),), size, dtype=F64)
        onehot = torch.nn.functional.one_hot(tokens, 3)
        d = size * onehot + math.sqrt(size) * noise
        plain = -(log_mu + d - d.gather(-1, tokens[..., None])).logsumexp(-1)
        ours = step_cost(log_mu, tokens, increment[:, None], noise)
        error = (plain - ours).std(0) / math.sqrt(len(tokens))
        assert bool(((plain - ours).mean(0).abs() < 4 * error + 1e-9).all())
        assert bool((plain.std(0) > gain * ours.std(0)).all())


def test_an_infinite_step_costs_the_cross_entropy() -> None:
    log_mu = torch.randn(5, 2, 3, generator=seeded(9), dtype=F64).log_softmax(-1)
    tokens = torch.randint(3, (5, 2), generator=seeded(10))
    noise = torch.randn(5, 2, 3, generator=seeded(11), dtype=F64)
    expected = -log_mu.gather(-1, tokens[..., None])[..., 0]
    last = step_cost(log_mu, tokens, torch.full((5, 1), math.inf, dtype=F64), noise)
    torch.testing.assert_close(last, expected)
    far = step_cost(log_mu, tokens, torch.full((5, 1), 1e4, dtype=F64), noise)
    torch.testing.assert_close(far, expected)


@pytest.mark.parametrize("known", [[True, False, False], [False, True, True]], ids=["prefix", "suffix"])
def test_conditional_bound_is_above_the_conditional_log_p_and_near(known: list[bool]) -> None:
    model = random_joint(3, 3, seed=10, spread=1.5)
    texts = model.sample(6, seeded(12))
    mask = torch.tensor(known)
    tokens = texts.repeat_interleave(300, 0)
    where = mask.expand(tokens.shape)
    bound = finite_step_bound(FlowMap(model), tokens, grid(CLOCK, 24), known=where, generator=seeded(13), dtype=F64)
    nats = bound.nats.view(6, -1)
    expected = -model.log_prob(texts, mask.expand(texts.shape))
    error = nats.std(1) / math.sqrt(nats.shape[1])
    assert bool((nats.mean(1) > expected - 4 * error).all())
    assert bool((nats.mean(1) < 1.1 * expected + 4 * error + 0.03).all())
    assert bool((bound.per_token[:, mask] == 0).all())


def test_a_wrong_model_is_told_apart() -> None:
    tokens = JOINT.sample(3000, seeded(14))
    exact, wrong = (
        finite_step_bound(FlowMap(m), tokens, grid(CLOCK, 8), generator=seeded(15), dtype=F64).nats
        for m in (JOINT, Scaled(JOINT, 0.6))
    )
    mean, error = mean_and_error(wrong - exact)
    assert mean > 5 * error


def test_only_the_diagonal_is_called() -> None:
    tokens = JOINT.sample(8, seeded(16))
    collapsed = ConstantMap(JOINT, torch.tensor([0.5, 0.25, 0.25]))
    a, b = (
        finite_step_bound(FlowMap(m), tokens, grid(CLOCK, 4), generator=seeded(17), dtype=F64).nats
        for m in (JOINT, collapsed)
    )
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_two_time_endpoint_would_make_it_diverge() -> None:
    """Why the diagonal: mu_{0,1} of the exact map is one-hot, and knows its noise but not the text."""
    tokens = JOINT.sample(200, seeded(18))
    x = torch.randn(200, 2, 3, generator=seeded(19), dtype=F64)
    zero, one = torch.zeros(200, 1, dtype=F64), torch.ones(200, 1, dtype=F64)
    two_time = ExactMap(JOINT, steps=32).log_endpoint(x, zero, one).log_softmax(-1)
    diagonal = JOINT.log_endpoint(x, zero, zero)
    a, b = (-(mu.gather(-1, tokens[..., None])).sum((1, 2)).mean().item() for mu in (two_time, diagonal))
    assert a > 3 * b


def test_standard_error_covers() -> None:
    tokens = JOINT.texts()[4:5].expand(10_000, 2)
    bound = finite_step_bound(FlowMap(JOINT), tokens, grid(CLOCK, 4), num_samples=3, generator=seeded(20), dtype=F64)
    nats, stderr = bound.nats.view(100, 100), bound.stderr.view(100, 100)
    z = (nats.mean(1) - nats.mean()) / (stderr.square().sum(1).sqrt() / 100)
    assert 0.8 < z.std().item() < 1.2
    torch.testing.assert_close(bound.per_token.sum(1), bound.nats)


def test_common_noise_makes_differences_sharper() -> None:
    model, times = random_joint(3, 4, seed=3, spread=1.2), grid(CLOCK, 4)
    tokens = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 1]])

    def gaps(common: bool) -> Tensor:
        how = {"dtype": F64, "common": common}
        each = [finite_step_bound(FlowMap(model), tokens, times, generator=seeded(i), **how) for i in range(40)]
        return torch.cat([bound.nats.diff() for bound in each])

    together, apart = gaps(True), gaps(False)
    assert together.std().item() < 0.7 * apart.std().item()
    assert together.mean().item() == pytest.approx(apart.mean().item(), abs=4 * apart.std().item() / math.sqrt(40))


def test_step_costs_of_neighbours_add_up_to_the_bound() -> None:
    tokens, times = JOINT.sample(4000, seeded(21)), grid(CLOCK, 5)
    costs = step_costs(FlowMap(JOINT), tokens, times, generator=seeded(22), dtype=F64)
    assert bool(costs.isinf().tril().equal(torch.ones(6, 6, dtype=torch.bool).tril()))
    bound = finite_step_bound(FlowMap(JOINT), tokens, times, num_samples=4, generator=seeded(23), dtype=F64).nats
    assert costs.diagonal(1).sum().item() == pytest.approx(bound.mean().item(), abs=0.03)


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_the_best_grid_is_the_best_of_all(steps: int) -> None:
    times = torch.linspace(0, 1, 7, dtype=F64)
    costs = torch.rand(7, 7, generator=seeded(24), dtype=F64)
    costs = torch.where(torch.ones(7, 7).triu(1) > 0, costs, math.inf)

    def total(path: tuple[int, ...]) -> float:
        return sum(costs[a, b].item() for a, b in itertools.pairwise(path))

    every = [(0, *inner, 6) for inner in itertools.combinations(range(1, 6), steps - 1)]
    best = min(every, key=total)
    torch.testing.assert_close(best_grid(costs, times, steps), times[list(best)])


def test_the_optimised_grid_beats_the_clock() -> None:
    tokens, flow_map, clock = CHAIN.sample(2000, seeded(25)), FlowMap(CHAIN), warp(4)
    times = optimise_grid(flow_map, CHAIN.sample(256, seeded(26)), 3, clock, candidates=24, generator=seeded(27))
    assert (times[0].item(), times[-1].item(), len(times)) == (0.0, 1.0, 4)
    best, plain = (
        finite_step_bound(flow_map, tokens, at, num_samples=8, generator=seeded(28), dtype=F64).nats
        for at in (times, grid(clock, 3))
    )
    mean, error = mean_and_error(plain - best)
    assert mean > 3 * error
    exact = nelbo(flow_map, tokens, clock, generator=seeded(29), dtype=F64).nats
    assert best.mean().item() > exact.mean().item()


@pytest.mark.parametrize("times", [[0.0, 0.5], [0.1, 1.0], [0.0, 0.5, 0.5, 1.0], [1.0], [[0.0, 1.0]]])
def test_what_is_no_grid_is_refused(times: list[float]) -> None:
    tokens = JOINT.sample(1, seeded(0))
    with pytest.raises((ValueError, TypeError), match=r"0 = t_0|Float"):
        finite_step_bound(FlowMap(JOINT), tokens, torch.tensor(times))


def test_arguments_out_of_range_are_refused() -> None:
    tokens = JOINT.sample(1, seeded(0))
    with pytest.raises(ValueError, match="num_samples >= 2"):
        finite_step_bound(FlowMap(JOINT), tokens, grid(CLOCK, 2), num_samples=1)
    with pytest.raises(ValueError, match="1 to 3 steps, not 4"):
        best_grid(torch.zeros(4, 4), torch.linspace(0, 1, 4), 4)
