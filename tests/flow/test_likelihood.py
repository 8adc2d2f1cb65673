"""The bound (14) against exact models: an equality for exact posteriors, for every text, wherever it is cut."""

import math

import pytest
import torch
from oracle import (
    EnumeratedJoint,
    ExactModel,
    Forgetful,
    Scaled,
    path_state,
    random_chain,
    random_joint,
    seeded,
    times_like,
)
from torch import Tensor

from catmaps.flow.flow_map import FlowMap
from catmaps.flow.likelihood import Bound, nelbo, squared_error
from catmaps.flow.times import Law, logit_normal, uniform, warp

JOINT = random_joint(3, 2, seed=1, spread=1.2)
CHAIN = random_chain(4, 8, seed=2)


def average(bound: Bound, rows: int) -> Bound:
    """Means over groups of `rows` consecutive sequences, with their standard errors."""
    nats, stderr = bound.nats.reshape(-1, rows), bound.stderr.reshape(-1, rows)
    per_token = bound.per_token.unflatten(0, (-1, rows)).mean(1)
    return Bound(nats.mean(1), stderr.square().sum(1).sqrt() / rows, per_token)


@pytest.mark.parametrize("model", [JOINT, CHAIN], ids=["joint", "chain"])
def test_bound_of_the_exact_posterior_is_the_entropy(model: ExactModel) -> None:
    tokens = model.sample(16000, seeded(1))
    law = warp(model.vocab_size)
    bound = nelbo(FlowMap(model), tokens, law, generator=seeded(2), dtype=torch.float64)
    stderr = bound.nats.std().item() / math.sqrt(len(tokens))
    assert stderr < 0.01 * model.entropy()
    assert bound.nats.mean().item() == pytest.approx(model.entropy(), abs=4 * stderr)


@pytest.mark.parametrize("model", [JOINT, CHAIN], ids=["joint", "chain"])
def test_bound_equals_minus_log_p_for_every_text(model: ExactModel) -> None:
    texts = model.texts() if isinstance(model, EnumeratedJoint) else model.sample(8, seeded(3))
    tokens = texts.repeat_interleave(256, 0)
    law, expected = warp(model.vocab_size), -model.log_prob(texts)
    bound = nelbo(FlowMap(model), tokens, law, num_samples=64, generator=seeded(4), dtype=torch.float64)
    mean = average(bound, 256)
    assert bool((mean.stderr < 0.03 * expected).all())
    assert bool(((mean.nats - expected).abs() < 4 * mean.stderr).all())


@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_bound_tells_a_wrong_model_apart(factor: float) -> None:
    """Its excess over the exact model is int u sum ||mu* - mu||^2 du, integrated here on a grid of u."""
    tokens, law = JOINT.sample(4000, seeded(5)), warp(3)
    exact, wrong = FlowMap(JOINT), FlowMap(Scaled(JOINT, factor))
    a, b = (nelbo(m, tokens, law, generator=seeded(6), dtype=torch.float64) for m in (exact, wrong))
    excess = b.nats - a.nats
    stderr = excess.std().item() / math.sqrt(len(tokens))
    expected, h = 0.0, 0.1
    for i in range(90):
        u = (i + 0.5) * h
        state = path_state(JOINT, 2000, u / (1 + u), seed=i)
        t = times_like(state, u / (1 + u), u / (1 + u))
        gap = exact.endpoint(state, *t) - wrong.endpoint(state, *t)
        expected += h * u * gap.square().sum((1, 2)).mean().item()
    assert excess.mean().item() > 5 * stderr
    assert excess.mean().item() == pytest.approx(expected, abs=4 * stderr, rel=0.05)


@pytest.mark.parametrize("t_max", [0.2, 0.4, 0.6, 0.95])
def test_bound_is_valid_wherever_the_path_is_cut(t_max: float) -> None:
    """Its slack is the total correlation that is left: sum of H(x_l | x_tmax) - H(x | x_tmax)."""
    tokens = JOINT.sample(8000, seeded(7))
    bound = nelbo(FlowMap(JOINT), tokens, warp(3), t_max=t_max, generator=seeded(8), dtype=torch.float64)
    state = path_state(JOINT, 20000, t_max, seed=9)
    x, gain = state.x, t_max / (1 - t_max) ** 2
    texts = JOINT.texts()
    evidence = gain * sum((x[:, p, texts[:, p]] for p in range(2)), torch.zeros(()))
    joint = (JOINT.probabilities.flatten().log() + evidence).softmax(-1)
    mu = FlowMap(JOINT).endpoint(state, *times_like(state, t_max, t_max))
    slack = (torch.special.entr(mu).sum((1, 2)) - torch.special.entr(joint).sum(1)).mean().item()
    stderr = bound.nats.std().item() / math.sqrt(len(tokens))
    assert slack > 0.05 or t_max > 0.5
    assert bound.nats.mean().item() == pytest.approx(JOINT.entropy() + slack, abs=4 * stderr + 0.003)
    assert bound.nats.mean().item() > JOINT.entropy() - 4 * stderr


KNOWN = [[True, False, False], [False, True, False], [False, True, True]]


@pytest.mark.parametrize("known", KNOWN, ids=["prefix", "middle", "suffix"])
def test_conditional_bound_equals_minus_the_conditional_log_p(known: list[bool]) -> None:
    model = random_joint(3, 3, seed=10, spread=1.5)
    texts = model.sample(8, seeded(11))
    tokens, mask = texts.repeat_interleave(256, 0), torch.tensor(known)
    bound = nelbo(
        FlowMap(model),
        tokens,
        warp(3),
        known=mask.expand(tokens.shape),
        generator=seeded(12),
        dtype=torch.float64,
    )
    mean, expected = average(bound, 256), -model.log_prob(texts, mask.expand(texts.shape))
    assert bool(((mean.nats - expected).abs() < 4 * mean.stderr).all())
    free = (expected - -model.log_prob(texts)).abs() > 8 * mean.stderr
    assert bool(free.any())  # the unconditional value is told apart, hence the mask matters


def test_what_the_network_says_at_known_positions_does_not_count() -> None:
    tokens, known = JOINT.sample(16, seeded(11)), torch.tensor([[True, False]]).expand(16, 2)
    exact, forgetful = (
        nelbo(FlowMap(m), tokens, warp(3), known=known, generator=seeded(12), dtype=torch.float64)
        for m in (JOINT, Forgetful(JOINT))
    )
    torch.testing.assert_close(forgetful.nats, exact.nats)
    torch.testing.assert_close(forgetful.stderr, exact.stderr)


def test_conditional_bound_of_nothing_is_zero() -> None:
    tokens = JOINT.sample(4, seeded(13))
    known = torch.ones_like(tokens, dtype=torch.bool)
    bound = nelbo(FlowMap(JOINT), tokens, warp(3), known=known, generator=seeded(14), dtype=torch.float64)
    assert bound.nats.tolist() == [0.0] * 4
    assert bound.stderr.tolist() == [0.0] * 4


@pytest.mark.parametrize("t_max", [0.5, 0.9])
@pytest.mark.parametrize("law", [uniform(), warp(3)], ids=["uniform", "warp"])
def test_standard_error_covers(law: Law, t_max: float) -> None:
    """Of 200 means over 100 estimates each, about 95% lie within two standard errors of what they estimate."""
    tokens = JOINT.texts()[4:5].expand(20000, 2)
    bound = nelbo(FlowMap(JOINT), tokens, law, num_samples=16, t_max=t_max, generator=seeded(15), dtype=torch.float64)
    truth = bound.nats.mean() if t_max < 0.9 else -JOINT.log_prob(tokens[:1])
    mean = average(bound, 100)
    z = (mean.nats - truth) / mean.stderr
    assert (z.abs() < 2).double().mean().item() > 0.9
    assert 0.5 < z.std().item() < 1.15  # stratified draws are treated as independent: an upper estimate


LAWS = {"uniform": uniform(), "warp": warp(3), "logit_normal": logit_normal()}


def test_importance_laws_agree_in_the_mean() -> None:
    tokens = JOINT.sample(4000, seeded(16))
    means: list[Tensor] = []
    for seed, law in enumerate(LAWS.values()):
        bound = nelbo(FlowMap(JOINT), tokens, law, generator=seeded(17 + seed), dtype=torch.float64)
        means.append(average(bound, 4000).nats[0])
        # Texts differ in -log p alike under all laws: only the Monte-Carlo error of each estimate remains.
        error = (bound.nats + JOINT.log_prob(tokens)).std().item() / math.sqrt(4000)
        assert means[-1].item() == pytest.approx(-JOINT.log_prob(tokens).mean().item(), abs=4 * error)
        assert error < 0.03


def test_bound_is_deterministic_given_a_generator_and_runs_in_fp32() -> None:
    tokens = JOINT.sample(16, seeded(20))
    first, again, other = (nelbo(FlowMap(JOINT), tokens, warp(3), generator=seeded(seed)).nats for seed in (21, 21, 22))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert bool((first != other).any())


def test_squared_error_needs_no_onehot() -> None:
    log_mu = (5 * torch.randn(50, 2, 4, generator=seeded(23), dtype=torch.float64)).log_softmax(-1)
    tokens = torch.randint(4, (50, 2), generator=seeded(24))
    onehot = torch.nn.functional.one_hot(tokens, 4)
    expected = (onehot - log_mu.exp()).square().sum(-1)
    torch.testing.assert_close(squared_error(log_mu, tokens), expected, rtol=1e-9, atol=1e-14)


def test_squared_error_stays_exact_when_the_token_is_almost_sure() -> None:
    wrong = 1e-6
    log_mu = torch.tensor([[[math.log1p(-wrong), math.log(wrong), -200.0]]])
    value = squared_error(log_mu, torch.zeros(1, 1, dtype=torch.long)).item()
    assert value == pytest.approx(2 * wrong**2, rel=1e-4)


@pytest.mark.parametrize("mistake", [{"num_samples": 1}, {"t_max": 0.0}, {"t_max": 1.0}])
def test_arguments_out_of_range_are_refused(mistake: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="nelbo needs"):
        nelbo(FlowMap(JOINT), JOINT.sample(1, seeded(0)), warp(3), **mistake)  # pyright: ignore[reportArgumentType]
