"""Masked diffusion: with the exact posterior the bound is an equality for every text, and samples are from the law."""

import math
from itertools import permutations

import pytest
import torch
from exact_tokens import ExactMasked, Flattened, every_text, token_network
from oracle import random_chain, random_joint, seeded, total_variation
from torch import Tensor

from catmaps.baselines import masked
from catmaps.baselines.draws import Draws, Predictor

LAW = random_joint(3, 3, seed=1, spread=1.5)
TEXTS = every_text(3, 3)


def every_draw(texts: Tensor) -> list[Draws]:
    """All numbers and orders of masks, equally likely."""
    length, places = texts.shape[1], []
    for n in range(length):
        for order in permutations(range(length)):
            noise = torch.tensor(order).double().expand(texts.shape) / length
            places.append(Draws(torch.full((len(texts),), (n + 0.5) / length).double(), noise))
    return places


def exact_mean(predictor: Predictor, texts: Tensor) -> Tensor:
    draws = every_draw(texts)
    return sum((masked.nats(predictor, texts, d).sum(1) for d in draws), torch.zeros(len(texts))) / len(draws)


def test_the_bound_is_an_equality_for_every_text() -> None:
    torch.testing.assert_close(exact_mean(ExactMasked(LAW), TEXTS), -LAW.log_prob(TEXTS), rtol=1e-9, atol=1e-9)


def test_a_wrong_posterior_costs() -> None:
    probabilities = LAW.log_prob(TEXTS).exp()
    wrong = (probabilities * exact_mean(Flattened(ExactMasked(LAW), 0.6), TEXTS)).sum().item()
    assert LAW.entropy() + 0.02 < wrong < LAW.entropy() + 1


def test_18_is_17_for_any_model() -> None:
    """Gauss-Legendre over t, and every set of masks with its probability: the published form."""
    predictor = Flattened(ExactMasked(LAW), 0.6)
    nodes, weights = torch.linalg.eigh(_jacobi(12))
    total = torch.zeros(len(TEXTS), dtype=torch.float64)
    for t, w in zip(((nodes + 1) / 2).tolist(), weights[0].square().tolist(), strict=True):
        for mask in every_text(2, 3).bool():
            share = math.prod(1 - t if hidden else t for hidden in mask.tolist())
            log_p = predictor(torch.where(mask, 3, TEXTS), torch.zeros(27, 1)).log_softmax(-1)
            nats = -(log_p.gather(-1, TEXTS[..., None])[..., 0] * mask).sum(1)
            total += w * share / (1 - t) * nats
    torch.testing.assert_close(total, exact_mean(predictor, TEXTS), rtol=1e-9, atol=1e-9)


def _jacobi(n: int) -> Tensor:
    """Its eigenvalues are the nodes of Gauss-Legendre quadrature on [-1, 1]."""
    k = torch.arange(1, n, dtype=torch.float64)
    return torch.diag(k / (4 * k * k - 1).sqrt(), 1) + torch.diag(k / (4 * k * k - 1).sqrt(), -1)


def test_the_estimate_is_unbiased_and_its_error_covers() -> None:
    law = random_chain(4, 12, seed=3)
    texts = law.sample(400, seeded(0))
    found = masked.bound(ExactMasked(law), texts, num_samples=6, generator=seeded(1))
    excess = found.nats + law.log_prob(texts)
    assert abs(excess.mean().item()) < 4 * excess.std().item() / 20
    assert excess.std().item() < 1.5 * found.stderr.square().mean().sqrt().item()
    torch.testing.assert_close(found.per_token.sum(1), found.nats)


def test_masks_are_n_of_the_positions_and_weigh_the_rest() -> None:
    class Seen:
        vocab_size = 5

        def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
            self.tokens = tokens
            return torch.zeros(*tokens.shape, 5)

    seen, texts = Seen(), torch.arange(4).expand(1000, 4)
    draws = Draws(torch.arange(1000).double() / 1000, torch.rand(1000, 4, generator=seeded(0), dtype=torch.float64))
    nats = masked.nats(seen, texts, draws)
    hidden = seen.tokens == 5
    assert hidden.sum(1).bincount().tolist() == [0, 250, 250, 250, 250]
    assert hidden[:250].sum(0).min() > 40  # any one of the four
    assert bool((seen.tokens == texts)[~hidden].all())
    torch.testing.assert_close(nats.sum(1), torch.full((1000,), 4 * math.log(5)))  # L/n for each of n


def test_the_loss_learns_the_mask_and_not_hidden_tokens() -> None:
    net = token_network(vocab_size=4, special=1)
    texts = torch.tensor([[0, 1, 2, 3, 3, 2]])
    draws = Draws(torch.tensor([0.99]).double(), torch.rand(1, 6, generator=seeded(0)).double())  # all masked
    masked.loss(net, texts, draws, torch.full((1, 6), 1 / 6).double()).total.backward()
    assert net.table.weight.grad is not None
    assert net.table.weight.grad.abs().sum(1).bool().tolist() == [False] * 4 + [True]


@pytest.mark.parametrize(("steps", "most", "least"), [(1, 1.0, 0.15), (32, 0.06, 0.0)])
def test_samples_approach_the_law_with_steps(steps: int, most: float, least: float) -> None:
    drawn = masked.sample(ExactMasked(LAW), (4000, 3), steps, generator=seeded(0))
    assert least <= total_variation(drawn, LAW.probabilities) < most


def test_given_tokens_stay_and_condition_the_rest() -> None:
    tokens = torch.tensor([[0, 2, 0]]).expand(4000, 3)
    known = torch.tensor([False, True, False]).expand(4000, 3)
    drawn = masked.sample(ExactMasked(LAW), (4000, 3), 24, tokens=tokens, known=known, generator=seeded(1))
    assert bool((drawn[:, 1] == 2).all())
    rest = LAW.probabilities[:, 2] / LAW.probabilities[:, 2].sum()
    assert total_variation(drawn[:, [0, 2]], rest) < 0.06
