"""Uniform-state diffusion: (19) by its definition; an equality with the leave-one-out posterior, and only with it."""

import math

import pytest
import torch
from exact_tokens import ExactUniform, Flattened, every_text, token_network
from oracle import random_chain, random_joint, seeded, total_variation
from torch import Tensor

from catmaps.baselines import uniform
from catmaps.baselines.draws import Draws, Predictor
from catmaps.baselines.uniform import LAST, corrupt

V, L = 3, 2
LAW = random_joint(V, L, seed=1, spread=1.5)
TEXTS = every_text(V, L)


def noise_for(texts: Tensor, noisy: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(uniform draws that make `noisy` of `texts`, the probability that it becomes that)."""
    anew = alpha + (noisy + 0.5) / V * (1 - alpha)
    chance = torch.where(noisy == texts, alpha + (1 - alpha) / V, (1 - alpha) / V)
    return anew.double(), chance.double().prod(1)


def exact_mean(predictor: Predictor, nodes: int = 24) -> Tensor:
    """The whole bound of every text, by Gauss-Legendre over the place in time and enumeration of noisy texts."""
    k = torch.arange(1, nodes, dtype=torch.float64)
    off = k / (4 * k * k - 1).sqrt()
    x, q = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    texts, noisy = TEXTS.repeat_interleave(len(TEXTS), 0), TEXTS.repeat(len(TEXTS), 1)
    total = torch.zeros(len(TEXTS), dtype=torch.float64)
    for place, weight in zip(((x + 1) / 2).tolist(), q[0].square().tolist(), strict=True):
        alpha = max(uniform.FIRST, 1 - (1 - (1 - (1 - LAST) ** 0.5) * place) ** 2)
        noise, chance = noise_for(texts, noisy, alpha)
        nats = uniform.nats(predictor, texts, Draws(torch.full((len(texts),), place).double(), noise))
        total += weight * (chance * nats.sum(1)).view(len(TEXTS), -1).sum(1)
    noise, chance = noise_for(texts, noisy, LAST)
    end = uniform.end_nats(predictor, texts, Draws(torch.zeros(len(texts)).double(), noise)).sum(1)
    return total + (chance * end).view(len(TEXTS), -1).sum(1)


def test_the_bound_is_an_equality_with_the_leave_one_out_posterior() -> None:
    """Of every text, but for decoding tokens apart at LAST; that costs nothing in the mean over texts."""
    excess = exact_mean(ExactUniform(LAW)) + LAW.log_prob(TEXTS)
    assert excess.abs().max() < 3e-4
    assert -1e-7 < (LAW.log_prob(TEXTS).exp() * excess).sum() < 1e-5


def test_the_posterior_given_all_tokens_is_the_wrong_one() -> None:
    probabilities = LAW.log_prob(TEXTS).exp()
    for wrong in (ExactUniform(LAW, own=True), Flattened(ExactUniform(LAW), 0.6)):
        assert (probabilities * exact_mean(wrong)).sum().item() > LAW.entropy() + 0.02


def test_19_by_its_definition() -> None:
    predictor, alpha = Flattened(ExactUniform(LAW), 0.7), 0.6
    place = (1 - math.sqrt(1 - alpha)) / (1 - math.sqrt(1 - LAST))
    draws = Draws(torch.full((9,), place).double(), torch.rand(9, L, generator=seeded(0), dtype=torch.float64))
    found = uniform.nats(predictor, TEXTS, draws)
    noisy = corrupt(TEXTS, torch.full((9,), alpha).double(), draws.noise, V)
    c = predictor(noisy, torch.full((9, 1), alpha).double()).softmax(-1)
    slope = 2 * (1 - math.sqrt(1 - LAST)) * math.sqrt(1 - alpha)  # d alpha / d place
    for row in range(9):
        for place_, (token, seen) in enumerate(zip(TEXTS[row].tolist(), noisy[row].tolist(), strict=True)):
            bar = V * alpha * torch.eye(V).double()[token] + 1 - alpha
            model = V * alpha * c[row, place_] + 1 - alpha
            r, rho = bar / bar[seen], model / model[seen]
            expected = (r * (r / rho).log() - r + rho).sum().item() / (V * alpha)
            assert found[row, place_].item() == pytest.approx(slope * expected, rel=1e-6)
    assert bool((noisy == TEXTS).any())
    assert bool((noisy != TEXTS).any())


def test_19_stays_exact_in_fp32_at_a_large_vocabulary() -> None:
    """Near alpha = 0 terms of size V cancel; the same in fp64 differs by rounding only."""

    class Random:
        vocab_size = 4096

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

        def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
            return torch.randn(*tokens.shape, 4096, generator=seeded(3)).to(self.dtype)

    texts = torch.randint(4096, (24, 4), generator=seeded(0))
    draws = Draws(torch.linspace(0, 0.999, 24).double(), torch.rand(24, 4, generator=seeded(1)).double())
    wide, lean = (uniform.nats(Random(dtype), texts, draws) for dtype in (torch.float64, torch.float32))
    torch.testing.assert_close(lean.double(), wide, rtol=1e-3, atol=2e-2)
    assert abs((lean - wide).mean().item()) < 1e-3


def test_noise_keeps_a_share_and_draws_the_rest_from_all() -> None:
    noise = torch.rand(20_000, 1, generator=seeded(0), dtype=torch.float64)
    noisy = corrupt(torch.ones(20_000, 1, dtype=torch.long), torch.full((20_000,), 0.4).double(), noise, 4)
    share = noisy.flatten().bincount(minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.15, 0.55, 0.15, 0.15]), rtol=0, atol=0.01)


def test_the_estimate_is_unbiased_and_its_error_covers() -> None:
    law = random_chain(4, 12, seed=3)
    texts = law.sample(600, seeded(0))
    found = uniform.bound(ExactUniform(law), texts, num_samples=12, generator=seeded(1))
    excess = found.nats + law.log_prob(texts)
    assert abs(excess.mean().item()) < 4 * excess.std().item() / math.sqrt(600)
    assert excess.std().item() < 1.5 * found.stderr.square().mean().sqrt().item()
    torch.testing.assert_close(found.per_token.sum(1), found.nats)


def test_the_loss_is_finite_and_differentiable_at_both_ends() -> None:
    net = token_network(vocab_size=5)
    texts = torch.randint(5, (2, 6), generator=seeded(0))
    draws = Draws(torch.tensor([0.0, 1 - 1e-9]).double(), torch.rand(2, 6, generator=seeded(1)).double())
    uniform.loss(net, texts, draws, torch.full((2, 6), 1 / 12).double()).total.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.trunk.parameters())


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_lone_token_is_exact_in_any_number_of_steps(steps: int) -> None:
    law = random_joint(5, 1, seed=0, spread=1.5)
    drawn = uniform.sample(ExactUniform(law), (4000, 1), steps, generator=seeded(steps))
    assert total_variation(drawn, law.probabilities) < 0.04


@pytest.mark.parametrize(("own", "steps", "most", "least"), [(False, 1, 1.0, 0.1), (False, 48, 0.05, 0.0)])
def test_samples_approach_the_law_with_steps(own: bool, steps: int, most: float, least: float) -> None:
    drawn = uniform.sample(ExactUniform(LAW, own), (4000, L), steps, generator=seeded(0))
    assert least <= total_variation(drawn, LAW.probabilities) < most


def test_samples_with_the_posterior_given_all_tokens_do_not() -> None:
    drawn = uniform.sample(ExactUniform(LAW, own=True), (4000, L), 48, generator=seeded(0))
    assert total_variation(drawn, LAW.probabilities) > 0.1


def test_given_tokens_stay() -> None:
    tokens, known = torch.tensor([[0, 2]]).expand(50, L), torch.tensor([False, True]).expand(50, L)
    drawn = uniform.sample(ExactUniform(LAW), (50, L), 8, tokens=tokens, known=known, generator=seeded(1))
    assert bool((drawn[:, 1] == 2).all())
