"""The anchor: what ties a map's short jumps to the flow, and so tells a collapsed map."""

import functools

import pytest
import torch
from oracle import ConstantMap, ExactMap, Scaled, path_state, random_joint, time_like

from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import State
from catmaps.flow.losses import anchor, psd
from catmaps.flow.times import Pair

JOINT = random_joint(3, 2, seed=1, spread=1.2)
TEACHER = FlowMap(JOINT)
ONES = torch.ones(16, 2, dtype=torch.float64)


def setting(times: tuple[float, ...]) -> tuple[State, Pair]:
    state = path_state(JOINT, 16, times[0], seed=8)
    return state, Pair(*(time_like(state, time) for time in times))


@pytest.mark.parametrize("times", [(0.0, 0.25, 0.4), (0.2, 0.45, 0.6), (0.45, 0.6, 0.7)])
def test_anchor_is_the_divergence_from_two_euler_steps_of_the_teacher(times: tuple[float, ...]) -> None:
    state, pair = setting(times)
    s, u, t = pair
    wrong = FlowMap(Scaled(ExactMap(JOINT, steps=16), 0.7))
    half = state.x + ((u - s) / (1 - s))[..., None] * (TEACHER.endpoint(state, s, s) - state.x)
    end = half + ((t - u) / (1 - u))[..., None] * (TEACHER.endpoint(State(half), u, u) - half)
    target = state.x + ((1 - s) / (t - s))[..., None] * (end - state.x)  # mu_{s,t} of (2), solved for
    expected = (target * (target.log() - wrong.log_endpoint(state, s, t))).sum(-1)
    torch.testing.assert_close(anchor(wrong, TEACHER, state, pair, ONES).values, expected, rtol=1e-7, atol=1e-12)


@functools.cache
def value_at_the_exact_map(gap: float, start: float = 0.8) -> float:
    """Mean for jumps of `gap` in u = t / (1 - t), with their middle inside."""
    state, pair = setting(tuple(r / (1 + r) for r in (start, start + gap / 2, start + gap)))
    exact = FlowMap(ExactMap(JOINT, steps=48))
    return anchor(exact, TEACHER, state, pair, ONES / ONES.numel()).total.item()


@pytest.mark.parametrize("gap", [0.2, 0.1, 0.05])
def test_bias_falls_with_the_square_of_the_gap(gap: float) -> None:
    assert 3.5 < value_at_the_exact_map(gap) / value_at_the_exact_map(gap / 2) < 5
    assert value_at_the_exact_map(0.05) < 1e-3


def test_anchor_tells_a_collapsed_map_which_psd_cannot() -> None:
    state, pair = setting((0.45, 0.6, 0.7))
    collapsed = FlowMap(ConstantMap(JOINT, torch.full((3,), 1 / 3)))
    assert psd(collapsed, collapsed, state, pair, ONES).total.item() == pytest.approx(0, abs=1e-12)
    assert anchor(collapsed, TEACHER, state, pair, ONES).values.mean().item() > 0.3
