"""Losses against their definitions, at the exact map (where they vanish) and away from it."""

import math

import pytest
import torch
from oracle import ExactMap, Offset, Oracle, Scaled, jvp, path_state, random_joint, seeded, time_like
from torch import Tensor

from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import State
from catmaps.flow.likelihood import squared_error
from catmaps.flow.losses import (
    OFF_DIAGONAL,
    OffDiagonalLoss,
    TokenLoss,
    anchor,
    ecld,
    endpoint_cross_entropy,
    esd,
    lsd,
    lsd_kl,
    psd,
    soft_cross_entropy,
)
from catmaps.flow.times import Pair

JOINT = random_joint(3, 2, seed=1, spread=1.2)
EXACT, TEACHER = ExactMap(JOINT, steps=48), FlowMap(JOINT)
DIRECTION = torch.randn(2, 3, generator=seeded(2), dtype=torch.float64)
TIMES = {"start": (0.0, 0.25, 0.4), "middle": (0.2, 0.45, 0.6), "late": (0.45, 0.6, 0.7)}
FIXED_POINTS = {"psd": psd, "lsd": lsd, "lsd_kl": lsd_kl, "esd": esd}
B = 12
ONES = torch.ones(B, 2, dtype=torch.float64)

every_time = pytest.mark.parametrize("times", TIMES.values(), ids=TIMES.keys())


def setting(times: tuple[float, float, float], seed: int = 3) -> tuple[State, Pair]:
    state = path_state(JOINT, B, times[0], seed=seed)
    return state, Pair(*(time_like(state, time) for time in times))


def moved(theta: Tensor | float, inner: Oracle = EXACT) -> FlowMap:
    """The exact map with its logits moved by theta; theta = 0 leaves it exact."""
    return FlowMap(Offset(inner, torch.as_tensor(theta, dtype=torch.float64), DIRECTION))


def wrong_map() -> FlowMap:
    return moved(0.4, ExactMap(Scaled(JOINT, 0.8), steps=16))


def parameter(value: float = 0.0) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def slope(loss: TokenLoss, theta: Tensor) -> float:
    return torch.autograd.grad(loss.total, theta)[0].item()


def taught(loss: OffDiagonalLoss, flow_map: FlowMap, times: Pair, state: State, weight: Tensor = ONES) -> TokenLoss:
    """With the base's diagonal as target; PSD takes the map's own jumps."""
    return loss(flow_map, flow_map if loss is psd else TEACHER, state, times, weight)


def rates(flow_map: FlowMap, state: State, times: Pair, h: float = 1e-5) -> Tensor:
    """d/dt mu_{s,t}(x) by central differences."""
    ahead, behind = (flow_map.endpoint(state, times.s, times.t + e) for e in (h, -h))
    return (ahead - behind) / (2 * h)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


# ---- the diagonal


def test_cross_entropy_is_minus_log_of_the_right_token() -> None:
    state = path_state(JOINT, B, 0.4, seed=4)
    t = time_like(state, 0.4)
    tokens, weight = JOINT.sample(B, seeded(5)), torch.rand(B, 2, generator=seeded(6), dtype=torch.float64)
    loss = endpoint_cross_entropy(TEACHER, state, t, tokens, weight)
    log_mu = TEACHER.log_endpoint(state, t, t)
    expected = torch.tensor([[-log_mu[b, p, tokens[b, p]] for p in range(2)] for b in range(B)])
    torch.testing.assert_close(loss.values, expected)
    torch.testing.assert_close(loss.total, (weight * expected).sum())
    assert loss.squared_error is not None
    torch.testing.assert_close(loss.squared_error, squared_error(log_mu, tokens))


def test_soft_targets_are_the_expected_cross_entropy_less_the_entropy() -> None:
    """sum_k mu*_k CE(k) = KL(mu* || mu) + H(mu*): hence both losses have the exact posterior as their minimum."""
    state = path_state(JOINT, B, 0.4, seed=4)
    t = time_like(state, 0.4)
    exact, model = TEACHER.endpoint(state, t, t), moved(0.5, JOINT)
    soft = soft_cross_entropy(model, TEACHER, state, t, ONES).values
    hard = torch.stack(
        [endpoint_cross_entropy(model, state, t, torch.full((B, 2), k), ONES).values for k in range(3)], -1
    )
    torch.testing.assert_close(soft, (exact * hard).sum(-1) - torch.special.entr(exact).sum(-1))
    assert soft.min().item() > 0


def test_soft_targets_have_their_minimum_at_the_teacher() -> None:
    state = path_state(JOINT, B, 0.4, seed=4)
    t = time_like(state, 0.4)
    theta = parameter()
    loss = soft_cross_entropy(moved(theta, JOINT), TEACHER, state, t, ONES)
    assert loss.total.item() == pytest.approx(0, abs=1e-12)
    assert slope(loss, theta) == pytest.approx(0, abs=1e-12)
    for value in (-0.3, 0.3):
        assert soft_cross_entropy(moved(value, JOINT), TEACHER, state, t, ONES).total.item() > 0.05


# ---- the exact map is a fixed point of PSD, LSD and ESD


@every_time
@pytest.mark.parametrize("loss", FIXED_POINTS.values(), ids=FIXED_POINTS.keys())
def test_exact_map_is_a_stationary_zero(loss: OffDiagonalLoss, times: tuple[float, float, float]) -> None:
    state, pair = setting(times)
    theta = parameter()
    exact = taught(loss, moved(theta), pair, state)
    assert exact.values.abs().max().item() < 1e-9
    assert abs(slope(exact, theta)) < 1e-5
    for value in (-0.3, 0.3):
        away = taught(loss, moved(value), pair, state)
        assert away.total.item() > 1e-3


@pytest.mark.parametrize("loss", FIXED_POINTS.values(), ids=FIXED_POINTS.keys())
def test_exact_map_is_a_fixed_point_up_to_the_end(loss: OffDiagonalLoss) -> None:
    """t = 1, where quotients of posteriors are empty: PSD, LSD and ESD are written without them."""
    state, pair = setting((0.0, 0.5, 1.0))
    theta = parameter()
    exact = taught(loss, moved(theta), pair, state)
    assert exact.values.abs().max().item() < 1e-9
    assert abs(slope(exact, theta)) < 1e-5


# ---- definitions, at a map that is not exact


@every_time
def test_lsd_is_the_squared_defect_of_the_flow_equation(times: tuple[float, float, float]) -> None:
    """(1 - t) (dX/dt - v_t(X)) from the definition of X alone; v is the teacher's."""
    state, pair = setting(times)
    s, _, t = pair
    flow_map = wrong_map()

    def position(r: Tensor) -> Tensor:
        gamma = ((r - s) / (1 - s))[..., None]
        return state.x + gamma * (flow_map.endpoint(state, s, r) - state.x)

    x, rate = jvp(position, (t,), (torch.ones_like(t),))
    velocity = (TEACHER.endpoint(State(x), t, t) - x) / (1 - t)[..., None]
    expected = ((1 - t)[..., None] * (rate - velocity)).square().sum(-1)
    loss = lsd(flow_map, TEACHER, state, pair, ONES / 7)
    torch.testing.assert_close(loss.values, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.total, expected.sum() / 7, rtol=1e-6, atol=0)
    assert expected.min().item() > 1e-6


def test_lsd_holds_the_teacher_fixed_and_differentiates_the_rest() -> None:
    """d/dtheta of ||mu - sg(p) + (1-t) gamma dmu||^2, with p frozen at theta0, by central differences."""
    state, pair = setting(TIMES["middle"])
    s, _, t = pair
    theta0, h = 0.3, 1e-4
    factor = ((1 - t) * (t - s) / (1 - s))[..., None]
    target = TEACHER.endpoint(moved(theta0).jump(state, s, t), t, t)

    def value(theta: float) -> float:
        flow_map = moved(theta)
        residual = flow_map.endpoint(state, s, t) - target + factor * rates(flow_map, state, pair)
        return residual.square().sum().item()

    theta = parameter(theta0)
    gradient = slope(lsd(moved(theta), TEACHER, state, pair, ONES), theta)
    assert gradient == pytest.approx((value(theta0 + h) - value(theta0 - h)) / (2 * h), rel=1e-5)


@every_time
def test_psd_is_the_divergence_from_two_short_jumps(times: tuple[float, float, float]) -> None:
    state, pair = setting(times)
    s, u, t = pair
    flow_map = wrong_map()
    first = flow_map.endpoint(state, s, u)
    second = flow_map.endpoint(flow_map.jump(state, s, u), u, t)
    a = ((u - s) * (1 - t) / ((t - s) * (1 - u)))[..., None]
    expected = kl(a * first + (1 - a) * second, flow_map.endpoint(state, s, t))
    loss = psd(flow_map, flow_map, state, pair, ONES)
    torch.testing.assert_close(loss.values, expected, rtol=1e-7, atol=1e-14)
    assert expected.min().item() > 1e-7


@pytest.mark.parametrize("times", [*TIMES.values(), (0.01, 0.5, 1.0), (0.4, 0.7, 1.0)])
def test_esd_steps_against_the_eulerian_residual(times: tuple[float, float, float]) -> None:
    """Target mu_{s,t} - (1-t)(mu_{s,t} - mu_{s,s}) + (1-s)(t-s) D mu_{s,t}, with D by central differences."""
    state, pair = setting(times)
    s, _, t = pair
    flow_map, h = moved(0.05), 1e-5
    base, mu = TEACHER.endpoint(state, s, s), flow_map.endpoint(state, s, t)
    drift = (base - state.x) / (1 - s)[..., None]
    ahead, behind = (flow_map.endpoint(State(state.x + e * drift), s + e, t) for e in (h, -h))
    target = mu - (1 - t)[..., None] * (mu - base) + ((1 - s) * (t - s))[..., None] * (ahead - behind) / (2 * h)
    values = esd(flow_map, TEACHER, state, pair, ONES).values
    usable = (target > 0.02 * mu).all(-1)  # elsewhere the floor acts
    assert usable.double().mean().item() > 0.5
    torch.testing.assert_close(values[usable], kl(target, mu)[usable], rtol=1e-5, atol=1e-9)
    assert bool(torch.isfinite(values).all())


@every_time
def test_lsd_in_kl_form_steps_against_the_lagrangian_residual(times: tuple[float, float, float]) -> None:
    """Target mu_{t,t}(X) - (1-t)(t-s)/(1-s) d/dt mu_{s,t}, with the derivative by central differences."""
    state, pair = setting(times)
    s, _, t = pair
    flow_map = moved(0.05)
    mu, factor = flow_map.endpoint(state, s, t), (1 - t) * (t - s) / (1 - s)
    ahead = TEACHER.endpoint(flow_map.jump(state, s, t), t, t)
    target = ahead - factor[..., None] * rates(flow_map, state, pair)
    values = lsd_kl(flow_map, TEACHER, state, pair, ONES).values
    usable = (target > 0.02 * mu).all(-1)  # elsewhere the floor acts
    assert usable.double().mean().item() > 0.5
    torch.testing.assert_close(values[usable], kl(target, mu)[usable], rtol=1e-5, atol=1e-9)
    assert bool(torch.isfinite(values).all())


@every_time
def test_ecld_is_the_bound_and_keeps_a_bias_at_the_exact_map(times: tuple[float, float, float]) -> None:
    state, pair = setting(times)
    s, _, t = pair
    theta = parameter()
    loss = ecld(moved(theta), TEACHER, state, pair, ONES)
    exact = FlowMap(EXACT)
    mu, factor = exact.endpoint(state, s, t), (1 - t) * (t - s) / (1 - s)
    target = TEACHER.endpoint(exact.jump(state, s, t), t, t)
    energy = factor.square() * rates(exact, state, pair).square().sum(-1)
    torch.testing.assert_close(loss.values, 2 * kl(target, mu) + 2 * energy, rtol=1e-6, atol=1e-10)
    assert loss.total.item() > 0.05
    assert abs(slope(loss, theta)) > 1e-2


@every_time
@pytest.mark.parametrize("flow_map", [FlowMap(EXACT), wrong_map()], ids=["exact", "wrong"])
def test_ecld_bounds_lsd_at_every_position(flow_map: FlowMap, times: tuple[float, float, float]) -> None:
    state, pair = setting(times)
    bound = ecld(flow_map, TEACHER, state, pair, ONES).values
    assert bool((lsd(flow_map, TEACHER, state, pair, ONES).values <= bound + 1e-12).all())


@pytest.mark.parametrize("vocab_size", [2, 3, 30])
def test_squared_distance_is_at_most_the_divergence(vocab_size: int) -> None:
    """The sharper inequality behind the constants 2 and 2 of (9): ||p - q||^2 <= KL(p || q), nearly met at K = 2."""
    generator = seeded(7)
    scale = 5 * torch.rand(20000, 1, generator=generator, dtype=torch.float64)
    p, q = (
        (scale * torch.randn(20000, vocab_size, generator=generator, dtype=torch.float64)).softmax(-1) for _ in range(2)
    )
    ratio = (p - q).square().sum(-1) / kl(p, q)
    assert ratio.max().item() <= 1
    near = torch.tensor([0.501, 0.499], dtype=torch.float64)
    assert ((near - 0.5).square().sum() / kl(near, torch.full_like(near, 0.5))).item() > 0.999


# ---- clean positions


class Hard(Offset):
    """Infinite log-odds at clean positions, as Bayes' rule has them: 0 x infinity lurks in every loss."""

    def log_endpoint(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        value = super().log_endpoint(x, s, t)
        return torch.where(value < -300, -math.inf, value)


@pytest.mark.parametrize("name", ["psd", "lsd", "lsd_kl", "esd", "ecld", "anchor", "cross entropy", "soft"])
def test_clean_positions_contribute_nothing(name: str) -> None:
    """One position is clean with weight 0: the loss and gradient are those of the noisy one, and finite."""
    known = torch.tensor([[True, False], [False, False], [False, True]]).repeat(4, 1)
    clean = torch.where(known, 1.0, 0.0).double()
    times = Pair(*(torch.where(known, 1.0, time).double() for time in (0.2, 0.4, 0.6)))
    state = path_state(JOINT, B, times.s, seed=9)
    tokens = state.x.argmax(-1)
    theta = torch.full((2, 3), 0.3, dtype=torch.float64, requires_grad=True)
    inner = ExactMap(JOINT, steps=16)

    def loss(oracle: type[Offset], theta: Tensor, weight: Tensor) -> TokenLoss:
        flow_map = FlowMap(oracle(inner, theta, DIRECTION))
        teacher = flow_map if name == "psd" else TEACHER
        if name == "cross entropy":
            return endpoint_cross_entropy(flow_map, state, times.s, tokens, weight)
        if name == "soft":
            return soft_cross_entropy(flow_map, teacher, state, times.s, weight)
        function = {**OFF_DIAGONAL, "anchor": anchor}[name]
        return function(flow_map, teacher, state, times, weight)

    weight = (1 - clean) / 5
    result = loss(Hard, theta, weight)
    (gradient,) = torch.autograd.grad(result.total, theta)
    assert bool(torch.isfinite(result.total))
    assert bool(torch.isfinite(gradient).all())
    torch.testing.assert_close(result.total, result.values[~known].sum() / 5)
    # Rows are independent: noisy positions' gradients are those of a loss that never saw infinities.
    plain = loss(Offset, theta, weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.total, theta)[0])
    torch.testing.assert_close(result.total, plain.total)
    assert gradient.abs().max().item() > 1e-4


def test_values_carry_no_gradient_and_weights_scale_the_total() -> None:
    state, pair = setting(TIMES["middle"])
    for loss in OFF_DIAGONAL.values():
        theta = parameter(0.2)
        once, twice = (taught(loss, moved(theta), pair, state, w * ONES) for w in (1, 2))
        assert not once.values.requires_grad
        torch.testing.assert_close(2 * once.total, twice.total)
        torch.testing.assert_close(once.values, twice.values)
