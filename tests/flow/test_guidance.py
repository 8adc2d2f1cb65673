"""Denoisers made of flow maps: by their formulas, by their limits, and by what a sampler draws with them."""

from typing import Any

import pytest
import torch
from oracle import ExactMap, Scaled, jvp, path_state, random_joint, seeded, times_like, total_variation
from torch import Tensor

from catmaps.flow.flow_map import Denoiser, FlowMap
from catmaps.flow.guidance import Guided, Nucleus, Unprompted, nucleus
from catmaps.flow.interpolant import State, clamp_known, gaussian
from catmaps.flow.samplers import SAMPLERS, sample
from catmaps.flow.times import grid, warp

JOINT = random_joint(3, 3, seed=10, spread=1.3)
STRONG, WEAK = FlowMap(ExactMap(JOINT, steps=2)), FlowMap(Scaled(JOINT, 0.5))
NOISE = gaussian((6, 3, 3), seeded(1), torch.float64).x
TOKENS = JOINT.sample(6, seeded(2))
KNOWN = torch.tensor([True, False, False]).expand(6, 3)


def prompted(t: float) -> tuple[State, Tensor, Tensor]:
    """A state at time t behind a clean first token, and its times: (x, s, t = 0.9)."""
    state = State(clamp_known(path_state(JOINT, 6, t, seed=3), TOKENS, KNOWN).x)
    s, end = (torch.where(KNOWN, 1.0, time).double() for time in (t, 0.9))
    return state, s, end


def test_all_are_denoisers() -> None:
    for one in (Guided(STRONG, WEAK, 2.0), Unprompted(STRONG, NOISE), Nucleus(STRONG, 0.9)):
        assert isinstance(one, Denoiser)
        assert one.vocab_size == 3


@pytest.mark.parametrize(("weight", "part"), [(0.0, WEAK), (1.0, STRONG)], ids=["weak", "strong"])
def test_guidance_of_weight_0_and_1_is_one_of_its_parts(weight: float, part: FlowMap) -> None:
    state = path_state(JOINT, 6, 0.4, seed=4)
    for end in (0.4, 0.8, 1.0):
        times = times_like(state, 0.4, end)
        torch.testing.assert_close(
            FlowMap(Guided(STRONG, WEAK, weight)).endpoint(state, *times), part.endpoint(state, *times)
        )


def test_guidance_is_a_product_of_powers() -> None:
    state = path_state(JOINT, 6, 0.4, seed=4)
    times = times_like(state, 0.4, 0.8)
    strong, weak = STRONG.endpoint(state, *times), WEAK.endpoint(state, *times)
    expected = weak * (strong / weak) ** 2.5
    found = FlowMap(Guided(STRONG, WEAK, 2.5)).endpoint(state, *times)
    torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True))


def test_guidance_leaves_a_positions_own_evidence_alone() -> None:
    """On the diagonal, of two contexts with their evidence comes one context with the same evidence, eq. (6)."""
    other = FlowMap(random_joint(3, 3, seed=11))
    state = path_state(JOINT, 6, 0.5, seed=4)
    times, gain = times_like(state, 0.5, 0.5), 0.5 / 0.25
    diagonal = FlowMap(JOINT)
    contexts = [(one.log_endpoint(state, *times) - gain * state.x).log_softmax(-1) for one in (diagonal, other)]
    expected = (2 * contexts[0] - contexts[1] + gain * state.x).log_softmax(-1)
    torch.testing.assert_close(FlowMap(Guided(diagonal, other, 2.0)).log_endpoint(state, *times), expected)


def test_a_map_without_its_prompt_sees_it_as_noisy_as_the_rest() -> None:
    state, s, t = prompted(0.4)
    noisy = torch.where(KNOWN[..., None], 0.6 * NOISE + 0.4 * state.x, state.x)
    hidden = FlowMap(Unprompted(STRONG, NOISE)).endpoint(state, s, t)
    torch.testing.assert_close(hidden, STRONG.endpoint(State(noisy), *times_like(state, 0.4, 0.9)))
    assert bool(((STRONG.endpoint(state, s, t) - hidden)[:, 1:].abs() > 1e-3).any())


def test_a_map_without_its_prompt_knows_nothing_of_it_at_time_0() -> None:
    state, s, t = prompted(0.0)
    other = clamp_known(state, (TOKENS + 1) % 3, KNOWN)
    hidden = FlowMap(Unprompted(STRONG, NOISE))
    torch.testing.assert_close(hidden.endpoint(state, s, t), hidden.endpoint(other, s, t))


def test_without_a_prompt_there_is_nothing_to_hide() -> None:
    state = path_state(JOINT, 6, 0.4, seed=4)
    times = times_like(state, 0.4, 0.8)
    torch.testing.assert_close(
        FlowMap(Unprompted(STRONG, NOISE)).endpoint(state, *times), STRONG.endpoint(state, *times)
    )


def test_a_nucleus_is_the_smallest_set_that_holds_the_mass() -> None:
    log_mu = torch.tensor([[[0.5, 0.1, 0.3, 0.1], [0.05, 0.9, 0.05, 0.0], [0.25, 0.25, 0.25, 0.25]]]).log()
    kept = (nucleus(log_mu, 0.75) > -torch.inf).sum(-1)
    assert kept.tolist() == [[2, 1, 3]]
    assert nucleus(log_mu, 0.75)[0, 0].isfinite().tolist() == [True, False, True, False]
    assert torch.equal(nucleus(log_mu, 1.0)[0, 0], log_mu[0, 0])
    assert (nucleus(log_mu, 1e-9) > -torch.inf).sum(-1).tolist() == [[1, 1, 1]]


def test_no_token_outside_the_nucleus_is_drawn() -> None:
    lone = random_joint(3, 1, seed=12, spread=1.5)
    p = lone.probabilities
    mass = 1 - p.min().item() - 1e-6  # of a lone token at t = 0: all but the rarest
    cut = FlowMap(Nucleus(FlowMap(lone), mass))
    drawn = sample(
        cut, SAMPLERS["localisation"], grid(warp(3), 1), (2000, 1, 3), generator=seeded(5), dtype=torch.float64
    )
    assert not bool((drawn == p.argmin()).any())
    assert len(drawn.unique()) == 2


@pytest.mark.parametrize("kind", ["guided", "unprompted", "nucleus"])
def test_tangents_are_derivatives(kind: str) -> None:
    """`torch.func.jvp` of the log endpoint, in all of (x, s, t), behind a prompt."""
    made = {
        "guided": Guided(STRONG, WEAK, 1.7),
        "unprompted": Unprompted(STRONG, NOISE),
        "nucleus": Nucleus(STRONG, 0.9),
    }
    flow_map = FlowMap(made[kind])  # pyright: ignore[reportArgumentType]
    state, s, t = prompted(0.4)
    free = (~KNOWN).double()
    dx = torch.randn(state.x.shape, generator=seeded(6), dtype=torch.float64) * free[..., None]
    ds, dt = 0.7 * free, 0.3 * free
    moved = flow_map.endpoint_with_tangent(state, s, t, ds=ds, dt=dt, dx=dx)

    def endpoint(x: Tensor, s: Tensor, t: Tensor) -> Any:
        return flow_map.endpoint(State(x), s, t)

    value, rate = jvp(endpoint, (state.x, s, t), (dx, ds, dt))
    torch.testing.assert_close(moved.endpoint, value)
    torch.testing.assert_close(moved.endpoint_rate[:, 1:], rate[:, 1:], rtol=1e-6, atol=1e-8)


def test_a_sampler_takes_guided_maps_and_keeps_to_the_prompt() -> None:
    n = 4000
    tokens, known = torch.zeros(n, 3, dtype=torch.long), KNOWN[:1].expand(n, 3)
    noise = gaussian((n, 3, 3), seeded(7), torch.float64).x
    diagonal = FlowMap(JOINT)
    conditional = JOINT.probabilities[0] / JOINT.probabilities[0].sum()
    found = {}
    for weight in (1.0, 2.0):
        flow_map = FlowMap(Guided(diagonal, FlowMap(Unprompted(diagonal, noise)), weight))
        given = {"tokens": tokens, "known": known, "generator": seeded(8), "dtype": torch.float64}
        drawn = sample(flow_map, SAMPLERS["euler"], grid(warp(3), 16), (n, 3, 3), **given)
        assert bool((drawn[:, 0] == 0).all())
        found[weight] = total_variation(drawn[:, 1:], conditional)
    assert found[1.0] < 0.04  # of which noise 0.02
    assert found[2.0] > found[1.0] + 0.02  # guided is not the conditional law
