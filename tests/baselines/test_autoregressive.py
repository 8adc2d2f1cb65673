"""Left to right: the likelihood is exact, a distribution, and what is sampled."""

import pytest
import torch
from exact_tokens import ExactNext, Flattened, every_text, token_network
from oracle import random_joint, seeded, total_variation

from catmaps.baselines import autoregressive
from catmaps.baselines.draws import Draws

LAW = random_joint(3, 3, seed=2, spread=1.5)
TEXTS = every_text(3, 3)


def test_exact_conditionals_give_exact_log_probabilities() -> None:
    found = autoregressive.bound(ExactNext(LAW), TEXTS)
    torch.testing.assert_close(found.nats, -LAW.log_prob(TEXTS), rtol=1e-9, atol=1e-9)
    assert not found.stderr.any()
    torch.testing.assert_close(found.per_token.sum(1), found.nats)
    wrong = autoregressive.bound(Flattened(ExactNext(LAW), 0.6), TEXTS)
    assert (LAW.log_prob(TEXTS).exp() * wrong.nats).sum().item() > LAW.entropy() + 0.02


def test_a_network_is_a_distribution_over_texts() -> None:
    net = token_network(vocab_size=3, special=1, causal=True)
    texts = every_text(3, 4)
    assert autoregressive.bound(net, texts).nats.neg().exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_the_likelihood_is_the_product_of_conditionals() -> None:
    net = token_network(vocab_size=3, special=1, causal=True)
    text, total = torch.tensor([[2, 0, 1, 1]]), 0.0
    for place in range(4):
        before = torch.cat([torch.tensor([[3]]), text[:, :place]], 1)
        total -= net(before, torch.zeros(1, 1))[0, -1].log_softmax(-1)[text[0, place]].item()
    assert autoregressive.bound(net, text).nats.item() == pytest.approx(total, abs=1e-12)


def test_the_loss_is_the_weighted_likelihood_and_reaches_every_table() -> None:
    net = token_network(vocab_size=3, special=1, causal=True)
    texts, weight = TEXTS[:5], torch.rand(5, 3, generator=seeded(0), dtype=torch.float64)
    draws = Draws(torch.rand(5).double(), torch.rand(5, 3).double())
    found = autoregressive.loss(net, texts, draws, weight)
    expected = autoregressive.bound(net, texts).per_token
    torch.testing.assert_close(found.values, expected)
    torch.testing.assert_close(found.total, (expected * weight).sum())
    found.total.backward()
    assert net.table.weight.grad is not None
    assert bool(net.table.weight.grad[3].any())


def test_samples_are_drawn_from_the_law() -> None:
    drawn = autoregressive.sample(ExactNext(LAW), (4000, 3), 1, generator=seeded(0))
    assert total_variation(drawn, LAW.probabilities) < 0.04


def test_samples_go_on_after_a_prefix() -> None:
    tokens = torch.tensor([[1, 0, 0]]).expand(4000, 3)
    known = torch.tensor([True, False, False]).expand(4000, 3)
    drawn = autoregressive.sample(ExactNext(LAW), (4000, 3), 1, tokens=tokens, known=known, generator=seeded(1))
    assert bool((drawn[:, 0] == 1).all())
    rest = LAW.probabilities[1] / LAW.probabilities[1].sum()
    assert total_variation(drawn[:, 1:], rest) < 0.04


@pytest.mark.parametrize("known", [[[False, True]], [[True, False], [False, False]]])
def test_gaps_cannot_be_filled(known: list[list[bool]]) -> None:
    given = torch.tensor(known)
    with pytest.raises(ValueError, match="fills no gaps"):
        autoregressive.sample(ExactNext(LAW), tuple(given.shape), 1, tokens=given.long(), known=given)  # pyright: ignore


def test_temperature_sharpens() -> None:
    drawn = autoregressive.sample(ExactNext(LAW), (500, 3), 1, temperature=0.01, generator=seeded(0))
    assert len(drawn.unique(dim=0)) == 1
