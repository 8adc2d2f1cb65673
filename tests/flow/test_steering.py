"""Tilting by particles against the law it should draw: p(text) exp(r(text)) / Z on enumerated joints.

Two estimates of that law: particles pooled over runs by their weights, biased by about 1 / P, and the same with each
run counted by its evidence, which is unbiased for any number of particles.
"""

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from oracle import ConstantMap, EnumeratedJoint, ExactMap, Oracle, path_state, random_joint, seeded, times_like
from torch import Tensor

from catmaps.flow import steering
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.particles import Particles, Swarm
from catmaps.flow.samplers import SAMPLERS, renoising, sample
from catmaps.flow.steering import Tilt, tilt
from catmaps.flow.times import grid, warp

K = 3
JOINT = random_joint(K, 2, seed=1, spread=1.2)
CLOCK = warp(K)
TABLE = 1.5 * torch.randn(K, K, generator=seeded(5), dtype=torch.float64)
TILTED = EnumeratedJoint(JOINT.probabilities * TABLE.exp())


def reward(tokens: Tensor) -> Tensor:
    return TABLE[tokens[:, 0], tokens[:, 1]]


def relaxed(p: Tensor) -> Tensor:
    """The mean reward of independent tokens."""
    return torch.einsum("ba,bc,ac->b", p[:, 0], p[:, 1], TABLE)


ANCESTRAL = Tilt(reward=reward, move="localisation", lookahead="diagonal")


def swarms(model: Oracle, wanted: Tilt, runs: int, steps: int = 16, seed: int = 1) -> Particles:
    times = grid(CLOCK, steps, 1 / 3 if wanted.move == "renoise" else 1.0)
    return tilt(FlowMap(model), wanted, times, (runs, 2, K), generator=seeded(seed), dtype=torch.float64)


def distance(found: Particles, law: EnumeratedJoint, by_evidence: bool = False) -> float:
    """Total variation of the weighted particles of all runs from a law."""
    weights = found.log_weights.exp() * (found.log_evidence.exp()[:, None] if by_evidence else 1)
    cells = (found.tokens * torch.tensor([K, 1])).sum(-1)
    mass = torch.zeros(K * K, dtype=torch.float64).index_add(0, cells.flatten(), weights.flatten())
    return 0.5 * (mass / mass.sum() - law.probabilities.flatten()).abs().sum().item()


# ---- the law


@pytest.mark.parametrize(
    ("wanted", "steps"),
    [
        (replace(ANCESTRAL, particles=256), 16),
        (replace(ANCESTRAL, particles=256, relaxed=relaxed), 16),
        (Tilt(reward=reward, particles=256), 3),
    ],
    ids=["localisation", "drift", "renoise"],
)
def test_many_particles_have_the_tilted_law(wanted: Tilt, steps: int) -> None:
    """With six other seeds each: 0.006 to 0.024."""
    model = ExactMap(JOINT, steps=4) if wanted.move == "renoise" else JOINT
    found = swarms(model, wanted, 40, steps)
    assert distance(found, TILTED) < 0.05
    assert distance(found, JOINT) > 0.3
    assert bool((found.effective >= 1 - 1e-9).all())
    assert bool((found.effective <= 256 + 1e-9).all())


@pytest.fixture(scope="module")
def plain() -> Tensor:
    """exp r of the texts of the sampler itself, in 12 steps."""
    times, shape = grid(CLOCK, 12), (20000, 2, K)
    texts = sample(FlowMap(JOINT), SAMPLERS["localisation"], times, shape, generator=seeded(2), dtype=torch.float64)
    return reward(texts).exp()


@pytest.mark.parametrize(
    ("drift", "threshold"), [(None, 0.0), (None, 0.5), (None, 1.1), (0.5, 0.0), (1.0, 0.5)], ids=str
)
def test_four_particles_give_unbiased_estimates(drift: float | None, threshold: float, plain: Tensor) -> None:
    """Evidence and law, against the mean of exp r over the sampler's own texts on the same grid."""
    options: dict[str, Any] = {} if drift is None else {"relaxed": relaxed, "drift": drift}
    wanted = replace(ANCESTRAL, particles=4, threshold=threshold, **options)
    found = swarms(JOINT, wanted, 1500, steps=12)
    evidence = found.log_evidence.exp()
    error = math.sqrt(evidence.var().item() / len(evidence) + plain.var().item() / len(plain))
    assert abs(evidence.mean().item() - plain.mean().item()) < 4 * error
    assert error < 0.05 * plain.mean().item()
    assert distance(found, TILTED, by_evidence=True) < 0.05  # with five other seeds each: 0.006 to 0.025


def test_one_particle_that_renoises_is_a_text_of_the_sampler() -> None:
    """Whose noise it has: the law that many particles tilt is that sampler's."""
    model, times, shape = ExactMap(JOINT, steps=4), grid(CLOCK, 3, 1 / 3), (500, 2, K)
    found = {}
    for noise in (1.0, 0.5):
        drawn = sample(FlowMap(model), renoising(noise), times, shape, generator=seeded(1), dtype=torch.float64)
        found[noise] = swarms(model, Tilt(reward=reward, particles=1, noise=noise), 500, steps=3).tokens[:, 0]
        assert torch.equal(found[noise], drawn)
    assert not torch.equal(found[1.0], found[0.5])


def test_a_useless_look_ahead_costs_particles_and_no_bias() -> None:
    constant = torch.tensor([0.1, 0.6, 0.3])
    wanted = Tilt(reward=reward, particles=256, move="localisation", lookahead="map")
    assert distance(swarms(ConstantMap(JOINT, constant), wanted, 60), TILTED) < 0.05


def test_a_good_look_ahead_spreads_evidence_less_than_the_end_alone() -> None:
    ahead = swarms(JOINT, replace(ANCESTRAL, particles=16, trust=1.0), 250)
    blind = swarms(JOINT, replace(ANCESTRAL, particles=16, trust=1e6), 250)
    drifting = swarms(JOINT, replace(ANCESTRAL, particles=16, relaxed=relaxed, drift=0.5), 250)
    assert ahead.effective[-1].mean() > 1.3 * blind.effective[-1].mean()
    assert drifting.log_evidence.std() < ahead.log_evidence.std()


@pytest.mark.parametrize("move", ["renoise", "localisation"])
def test_nothing_wanted_changes_nothing(move: Literal["renoise", "localisation"]) -> None:
    zero = Tilt(
        reward=lambda tokens: torch.zeros(len(tokens)),
        particles=8,
        move=move,
        lookahead="diagonal",
        relaxed=(lambda p: 0 * p.sum((1, 2))) if move == "localisation" else None,
    )
    found = swarms(JOINT, zero, 700 if move == "localisation" else 20, steps=24 if move == "localisation" else 4)
    torch.testing.assert_close(found.effective, torch.full_like(found.effective, 8))
    torch.testing.assert_close(found.log_evidence, torch.zeros_like(found.log_evidence))
    if move == "localisation":
        assert distance(found, JOINT) < 0.04


def test_given_text_stays_and_the_rest_has_the_tilted_conditional() -> None:
    known = torch.tensor([[False, True]]).expand(60, 2)
    tokens = torch.tensor([[0, 2]]).expand(60, 2)
    for gradient in (None, relaxed):
        wanted = replace(ANCESTRAL, particles=64, relaxed=gradient)
        given = {"tokens": tokens, "known": known, "generator": seeded(3), "dtype": torch.float64}
        found = tilt(FlowMap(JOINT), wanted, grid(CLOCK, 16), (60, 2, K), **given)
        assert bool((found.tokens[..., 1] == 2).all())
        law = torch.zeros(K, K, dtype=torch.float64)
        law[:, 2] = TILTED.probabilities[:, 2]
        assert distance(found, EnumeratedJoint(law)) < 0.04


# ---- one step


@pytest.mark.parametrize("s", [0.3, 0.8])
def test_the_weight_of_a_drifting_step_is_the_ratio_of_its_densities(s: float) -> None:
    """(21), with p and q written out as mixtures of Gaussians in Y."""
    state = path_state(JOINT, 50, s, seed=4)
    log_mu = FlowMap(JOINT).log_endpoint(state, *times_like(state, s, s))
    push = torch.randn(log_mu.shape, generator=seeded(5), dtype=torch.float64)
    t = 0.85
    look = steering._Look(log_mu, torch.zeros(50, dtype=torch.float64), push)
    after, log_ratio = steering._localise(state, look, *times_like(state, s, t), seeded(6))
    size = (t / (1 - t)) ** 2 - (s / (1 - s)) ** 2
    moved = t / (1 - t) ** 2 * after.x - s / (1 - s) ** 2 * state.x

    def log_density(log_weights: Tensor, shift: Tensor | float) -> Tensor:
        gap = moved[:, :, None] - size * (torch.eye(K, dtype=torch.float64) + shift)
        return (log_weights - gap.square().sum(-1) / (2 * size)).logsumexp(-1).sum(1)

    tilted = (log_mu + size * push).log_softmax(-1)
    expected = log_density(log_mu, 0.0) - log_density(tilted, push[:, :, None])
    torch.testing.assert_close(log_ratio, expected, rtol=1e-7, atol=1e-7)


def test_the_last_drifting_step_weighs_tokens() -> None:
    state = path_state(JOINT, 50, 0.6, seed=4)
    log_mu = FlowMap(JOINT).log_endpoint(state, *times_like(state, 0.6, 0.6))
    push = torch.randn(log_mu.shape, generator=seeded(5), dtype=torch.float64)
    look = steering._Look(log_mu, torch.zeros(50, dtype=torch.float64), push)
    after, log_ratio = steering._localise(state, look, *times_like(state, 0.6, 1.0), seeded(6))
    drawn = after.x.argmax(-1)[..., None]
    expected = (log_mu.gather(-1, drawn) - (log_mu + push).log_softmax(-1).gather(-1, drawn)).sum((1, 2))
    torch.testing.assert_close(log_ratio, expected)


def test_the_push_is_the_gradient_of_log_psi_along_y() -> None:
    s, h = 0.5, 1e-6
    state = path_state(JOINT, 5, s, seed=7)
    wanted = replace(ANCESTRAL, relaxed=relaxed, trust=2.0)
    given = steering.Given(None, None)
    push = steering._look(FlowMap(JOINT), wanted, state, (s, 0.6), given).push
    assert push is not None
    direction = torch.randn(state.x.shape, generator=seeded(8), dtype=torch.float64)

    def log_psi(sign: int) -> Tensor:
        x = state.x + sign * h * (1 - s) ** 2 / s * direction  # Y moves by h times the direction
        times = times_like(state, s, s)
        return s**2 * relaxed(FlowMap(JOINT).endpoint(steering.State(x), *times))

    rate = (log_psi(1) - log_psi(-1)) / (2 * h)
    torch.testing.assert_close((push * direction).sum((1, 2)), rate, rtol=1e-5, atol=1e-8)


# ---- weights and copies


def test_systematic_resampling_copies_in_proportion() -> None:
    weights = torch.rand(50, 10, generator=seeded(9), dtype=torch.float64) ** 4
    swarm = Swarm(50, 10, torch.device("cpu"))
    swarm.weigh(weights.log().flatten())
    kept = swarm.effective[-1] >= 5
    assert 0 < kept.sum() < 50
    index = swarm.renew(0.5, seeded(10))
    assert index is not None
    copies = torch.stack([row.bincount(minlength=500) for row in index.view(50, 10)])
    expected = 10 * weights / weights.sum(1, keepdim=True)
    for run in range(50):
        own = copies[run, 10 * run : 10 * run + 10]
        assert own.sum() == 10  # never from another run
        if kept[run]:
            assert bool((own == 1).all())
            continue
        assert bool(((own == expected[run].floor()) | (own == expected[run].ceil())).all())
        assert bool((swarm.log_weights[run] == 0).all())
        torch.testing.assert_close(swarm.log_evidence[run], weights[run].mean().log())
    torch.testing.assert_close(swarm.log_psi.flatten(), weights.log().flatten()[index])


def test_texts_are_drawn_by_weight_and_the_best_is_the_best() -> None:
    n = 20000
    weights = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64).log().expand(n, 4)
    found = Particles(
        tokens=torch.arange(4)[None, :, None].expand(n, 4, 1),
        log_weights=weights,
        rewards=torch.tensor([0.0, 3.0, 1.0, 2.0]).expand(n, 4),
        log_evidence=torch.zeros(n),
        effective=torch.ones(1, n),
    )
    share = found.draw(seeded(11))[:, 0].bincount(minlength=4) / n
    torch.testing.assert_close(share, torch.tensor([0.5, 0.0, 0.3, 0.2]), rtol=0, atol=0.02)
    assert bool((found.best() == 1).all())


def test_the_same_seed_gives_the_same_particles() -> None:
    wanted = replace(ANCESTRAL, particles=4)
    first, again, other = (swarms(JOINT, wanted, 20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.log_weights, again.log_weights)
    assert not torch.equal(first.tokens, other.tokens)


def test_what_cannot_be_sought_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 particle"):
        Tilt(reward=reward, particles=0)
    with pytest.raises(ValueError, match="only localisation"):
        Tilt(reward=reward, relaxed=relaxed)
    for wanted, noise in ((ANCESTRAL, 0.5), (Tilt(reward=reward), -1.0)):
        with pytest.raises(ValueError, match="noise is a variance"):
            replace(wanted, noise=noise)
    known = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="together"):
        tilt(FlowMap(JOINT), Tilt(reward=reward), grid(CLOCK, 2), (1, 2, K), known=known)
