"""The flow map's algebra, the oracle behind the other tests, and the identities that an exact map satisfies."""

import math

import pytest
import torch
from oracle import (
    EnumeratedJoint,
    ExactMap,
    ExactModel,
    MarkovChain,
    Offset,
    Scaled,
    jvp,
    path_state,
    random_chain,
    random_joint,
    seeded,
    time_like,
    times_like,
)
from torch import Tensor

from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import State

JOINT = random_joint(3, 2, seed=1, spread=1.2)
EXACT = FlowMap(ExactMap(JOINT, steps=64))
TIMES = [(0.0, 0.45), (0.15, 0.6), (0.4, 0.75), (0.5, 0.65)]


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-6)


def jump(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """X_{s,t}(x) by its definition (2), from nothing but the endpoint."""
    gamma = ((t - s) / (1 - s))[..., None]
    return x + gamma * (EXACT.endpoint(State(x), s, t) - x)


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """v_t(x) by its definition (3)."""
    return (EXACT.endpoint(State(x), t, t) - x) / (1 - t)[..., None]


# ---- the oracle itself


def brute_force_posterior(model: EnumeratedJoint, x: Tensor, t: Tensor) -> Tensor:
    """P(x_l = k | x_t) from Gaussian densities of every text; positions with t = 1 must agree exactly."""
    texts = model.texts()
    onehot = torch.nn.functional.one_hot(texts, model.vocab_size).double()
    clean = t >= 1
    scale = torch.where(clean, 1.0, 1 - t)
    distance = (x[:, None] - t[:, None, :, None] * onehot).square().sum(-1)
    agrees = torch.where(distance < 1e-9, 0.0, -math.inf)
    density = torch.where(clean[:, None], agrees, -distance / (2 * scale.square())[:, None])
    weight = (model.probabilities.flatten().log() + density.sum(-1)).softmax(-1)
    return torch.einsum("bn,nlk->blk", weight, onehot)


@pytest.mark.parametrize("model", [random_joint(4, 3, seed=2), random_chain(3, 4, seed=3)], ids=["joint", "chain"])
def test_oracle_posterior_is_bayes_rule_with_per_position_times(model: ExactModel) -> None:
    times = torch.rand(20, model.length, generator=seeded(0), dtype=torch.float64) * 0.8
    times[::2, 1] = 1.0
    state = path_state(model, 20, times, seed=1)
    table = model.enumerate() if isinstance(model, MarkovChain) else model
    assert isinstance(table, EnumeratedJoint)
    expected = brute_force_posterior(table, state.x, times)
    torch.testing.assert_close(FlowMap(model).endpoint(state, times, times), expected, rtol=0, atol=1e-12)


def test_oracle_chain_agrees_with_its_table() -> None:
    chain = random_chain(3, 4, seed=3)
    table = chain.enumerate()
    texts, known = table.texts(), torch.tensor([True, False, True, False]).expand(81, 4)
    torch.testing.assert_close(chain.log_prob(texts), table.probabilities.flatten().log())
    torch.testing.assert_close(chain.log_prob(texts, known), table.log_prob(texts, known))
    marginal = table.probabilities.sum((1, 3))[texts[:, 0], texts[:, 2]]
    torch.testing.assert_close(table.log_prob(texts, known), (table.probabilities.flatten() / marginal).log())
    assert chain.entropy() == pytest.approx(table.entropy(), rel=1e-12)
    assert table.probabilities.sum().item() == pytest.approx(1)


def test_exact_map_with_a_clean_position_is_the_map_of_the_conditional() -> None:
    joint = random_joint(3, 2, seed=4)
    rest = EnumeratedJoint(joint.probabilities[2])
    state = path_state(rest, 16, 0.2, seed=5)
    clean = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(16, 1, 3)
    s, t = (torch.tensor([1.0, time], dtype=torch.float64).expand(16, 2) for time in (0.2, 0.7))
    mu = FlowMap(ExactMap(joint)).endpoint(State(torch.cat([clean, state.x], 1)), s, t)
    torch.testing.assert_close(mu[:, :1], clean)
    torch.testing.assert_close(mu[:, 1:], FlowMap(ExactMap(rest)).endpoint(state, *times_like(state, 0.2, 0.7)))


# ---- the algebra


def test_endpoint_jump_and_velocity_follow_their_definitions() -> None:
    state = path_state(JOINT, 8, 0.3, seed=1)
    s, t = times_like(state, 0.3, 0.8)
    mu = EXACT.endpoint(state, s, t)
    torch.testing.assert_close(mu.sum(-1), torch.ones_like(mu[..., 0]))
    torch.testing.assert_close(EXACT.log_endpoint(state, s, t).exp(), mu)
    torch.testing.assert_close(EXACT.jump(state, s, t).x, jump(state.x, s, t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(EXACT.velocity(state, s), velocity(state.x, s), rtol=1e-12, atol=1e-12)


def test_velocity_is_the_conditional_mean_of_the_path_direction() -> None:
    # E[x_1 - x_0 | x_t] with x_0 = (x_t - t x_1) / (1 - t): the meaning of (3), which fixes its sign and scale.
    state = path_state(JOINT, 8, 0.4, seed=2)
    t = time_like(state, 0.4)
    mean = FlowMap(JOINT).endpoint(state, t, t)
    expected = mean - (state.x - 0.4 * mean) / 0.6
    torch.testing.assert_close(EXACT.velocity(state, t), expected, rtol=1e-9, atol=1e-9)


def test_temperature_divides_logits_everywhere() -> None:
    state = path_state(JOINT, 8, 0.3, seed=1)
    s, t = times_like(state, 0.3, 0.8)
    hot = FlowMap(ExactMap(JOINT, 8), temperature=2.0)
    plain = FlowMap(Scaled(ExactMap(JOINT, 8), 0.5))
    torch.testing.assert_close(hot.endpoint(state, s, t), plain.endpoint(state, s, t))
    first, second = (
        flow_map.endpoint_with_tangent(state, s, t, ds=torch.zeros_like(s), dt=torch.ones_like(t))
        for flow_map in (hot, plain)
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("moved", ["x", "s", "t", "all"])
def test_endpoint_with_tangent_is_the_directional_derivative(moved: str) -> None:
    state = path_state(JOINT, 8, 0.3, seed=1)
    direction = torch.randn(JOINT.length, 3, generator=seeded(3), dtype=torch.float64)
    wrong = Offset(ExactMap(JOINT, 16), torch.tensor(0.5, dtype=torch.float64), direction)
    flow_map = FlowMap(wrong, temperature=0.8)
    s, t = times_like(state, 0.3, 0.7)
    dx = torch.randn(state.x.shape, generator=seeded(4), dtype=torch.float64)
    dx, ds, dt = dx * (moved in ("x", "all")), 0.7 * (moved in ("s", "all")), -1.3 * (moved in ("t", "all"))
    tangent = flow_map.endpoint_with_tangent(state, s, t, ds=s * 0 + ds, dt=t * 0 + dt, dx=dx)
    h = 1e-5
    ahead, behind = (flow_map.endpoint(State(state.x + e * dx), s + e * ds, t + e * dt) for e in (h, -h))
    torch.testing.assert_close(tangent.endpoint_rate, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(tangent.logit_rate, (ahead.log() - behind.log()) / (2 * h), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(tangent.endpoint, flow_map.endpoint(state, s, t))
    torch.testing.assert_close(tangent.log_endpoint, tangent.endpoint.log())


# ---- identities of an exact map, written out from definitions


@pytest.mark.parametrize(("s", "t"), TIMES)
def test_identity_5_endpoint_is_the_average_of_posteriors_along_the_flow(s: float, t: float) -> None:
    """The flow is integrated here in t with dx/dt = v_t(x), and (5) by Simpson's rule on its nodes."""
    x, diagonal = path_state(JOINT, 8, s, seed=6).x, FlowMap(JOINT)
    start, end = x, t
    cells, average = 400, torch.zeros_like(x)
    h = (end - s) / cells

    def at(x: Tensor, time: float) -> tuple[Tensor, Tensor]:
        mu = diagonal.endpoint(State(x), *times_like(State(x), time, time))
        return mu, (mu - x) / (1 - time)

    for i in range(cells + 1):
        now = s + i * h
        mu, k1 = at(x, now)
        density = (1 - s) * (1 - end) / ((end - s) * (1 - now) ** 2)
        simpson = 1 if i in (0, cells) else 4 if i % 2 else 2
        average = average + simpson * h / 3 * density * mu
        if i == cells:
            break
        k2 = at(x + h / 2 * k1, now + h / 2)[1]
        k3 = at(x + h / 2 * k2, now + h / 2)[1]
        k4 = at(x + h * k3, now + h)[1]
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    times = times_like(State(start), s, end)
    same(EXACT.endpoint(State(start), *times), average)
    same(EXACT.jump(State(start), *times).x, x)


@pytest.mark.parametrize(("s", "t"), TIMES)
def test_identity_8_lagrangian(s: float, t: float) -> None:
    """d/dt X_{s,t}(x) = v_t(X_{s,t}(x)), and the endpoint form of it."""
    state = path_state(JOINT, 16, s, seed=7)
    start, end = times_like(state, s, t)

    def endpoint_and_jump(r: Tensor) -> tuple[Tensor, Tensor]:
        mu = EXACT.endpoint(state, start, r)
        return mu, state.x + ((r - start) / (1 - start))[..., None] * (mu - state.x)

    (mu, moved), (dmu, rate) = jvp(endpoint_and_jump, (end,), (torch.ones_like(end),))
    same(rate, velocity(moved, end))
    residual = mu - EXACT.endpoint(State(moved), end, end) + (1 - t) * (t - s) / (1 - s) * dmu
    same(residual, torch.zeros_like(mu))
    same(residual, (1 - t) * (rate - velocity(moved, end)))


@pytest.mark.parametrize("t", [0.7, 0.8, 1.0])
@pytest.mark.parametrize(("s", "u"), [(0.0, 0.3), (0.2, 0.6)])
def test_identity_10_semigroup(s: float, u: float, t: float) -> None:
    state = path_state(JOINT, 16, s, seed=8)
    start, middle, end = (time_like(state, time) for time in (s, u, t))
    between = jump(state.x, start, middle)
    first, second = EXACT.endpoint(state, start, middle), EXACT.endpoint(State(between), middle, end)
    a = (u - s) * (1 - t) / ((t - s) * (1 - u))
    long = EXACT.endpoint(state, start, end)
    same(long, a * first + (1 - a) * second)
    same(jump(state.x, start, end), jump(between, middle, end))


@pytest.mark.parametrize(("s", "t"), TIMES)
def test_identity_11_lagrangian_as_a_distribution(s: float, t: float) -> None:
    """mu_{t,t}(X) = mu_{s,t} (1 + gamma_c d/dt log mu_{s,t}), solved for mu_{s,t} where no ratio is tiny."""
    state = path_state(JOINT, 16, s, seed=9)
    start, end = times_like(state, s, t)
    log_mu, rate = jvp(lambda r: EXACT.log_endpoint(state, start, r), (end,), (torch.ones_like(end),))
    ahead = EXACT.log_endpoint(State(jump(state.x, start, end)), end, end)
    ratio = 1 + (t - s) * (1 - t) / (1 - s) * rate
    same(ahead.exp(), log_mu.exp() * ratio)
    even = ratio.amin(-1) > 0.03
    target = (ahead - ratio.clamp_min(1e-9).log()).softmax(-1)
    assert bool(even.any())
    same(target[even], log_mu.exp()[even])


@pytest.mark.parametrize(("s", "t"), TIMES)
def test_identity_12_eulerian(s: float, t: float) -> None:
    """d_s X + J_x X v = 0 along the flow, and the ratio mu_{s,s} / mu_{s,t} that follows from it."""
    state = path_state(JOINT, 16, s, seed=10)
    start, end = times_like(state, s, t)
    along = (velocity(state.x, start), torch.ones_like(start))
    _, still = jvp(lambda x, r: jump(x, r, end), (state.x, start), along)
    same(still, torch.zeros_like(still))
    log_mu, delta = jvp(lambda x, r: EXACT.log_endpoint(State(x), r, end), (state.x, start), along)
    base = EXACT.log_endpoint(state, start, start)
    ratio = 1 - (1 - s) * (t - s) / (1 - t) * delta
    same(base.exp(), log_mu.exp() * ratio)
    target = (base - torch.log((1 - t) - (1 - s) * (t - s) * delta)).softmax(-1)
    same(target, log_mu.exp())
