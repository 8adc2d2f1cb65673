"""The bounds' single draws, pilot, common random numbers, cross-entropy and projected forms, against exact models."""

import math
from dataclasses import dataclass

import pytest
import torch
from oracle import (
    CLEAN_GAIN,
    EnumeratedJoint,
    ExactModel,
    MarkovChain,
    Oracle,
    Scaled,
    random_chain,
    random_joint,
    seeded,
)
from torch import Tensor

from catmaps.flow.flow_map import FlowMap
from catmaps.flow.likelihood import (
    CROSS_ENTROPY_FACTOR,
    Integrand,
    capped_cross_entropy,
    end_draws,
    nelbo,
    path_draws,
    pilot,
    projected_error,
    squared_error,
    stratified_variance,
)
from catmaps.flow.times import Law, uniform, warp

F64 = torch.float64
JOINT = random_joint(3, 2, seed=1, spread=1.2)
CHAIN = random_chain(4, 8, seed=2)


def noise_for(tokens: Tensor, vocab_size: int, seed: int) -> Tensor:
    return torch.randn(*tokens.shape, vocab_size, generator=seeded(seed), dtype=F64)


def places(rows: int, seed: int) -> Tensor:
    return torch.rand(rows, generator=seeded(seed), dtype=F64)


@pytest.mark.parametrize("law", [uniform(), warp(3)], ids=["uniform", "warp"])
def test_single_draws_compose_to_the_bound(law: Law) -> None:
    """Mixed rows in one batch: every text with its own draws; the means of both terms add up to -log p."""
    texts = JOINT.texts()
    tokens = texts.repeat(3000, 1)
    path = path_draws(FlowMap(JOINT), tokens, places(len(tokens), 1), law, noise_for(tokens, 3, 2))
    end = end_draws(FlowMap(JOINT), tokens, noise_for(tokens, 3, 3))
    assert path.dtype == end.dtype == F64
    draws = (path + end).sum(1).view(3000, 9)
    error = draws.std(0) / math.sqrt(3000)
    assert bool(((draws.mean(0) + JOINT.log_prob(texts)).abs() < 4 * error).all())


def test_rows_are_drawn_apart_and_known_positions_add_nothing() -> None:
    tokens, noise = CHAIN.sample(6, seeded(4)), noise_for(torch.zeros(6, 8), 4, 5)
    known = torch.arange(8).expand(6, 8) < torch.tensor([[0], [3], [8], [1], [0], [7]])
    flow_map, place, law = FlowMap(CHAIN), places(6, 6), warp(4)
    together = path_draws(flow_map, tokens, place, law, noise, known=known)
    end = end_draws(flow_map, tokens, noise, known=known)
    for row in range(6):
        one = slice(row, row + 1)
        alone = path_draws(flow_map, tokens[one], place[one], law, noise[one], known=known[one])
        torch.testing.assert_close(alone, together[one])
        torch.testing.assert_close(end_draws(flow_map, tokens[one], noise[one], known=known[one]), end[one])
    assert bool((together[known] == 0).all())
    assert bool((end[known] == 0).all())
    assert bool((together[~known] > 0).all())
    unconditional = path_draws(flow_map, tokens, place, law, noise)
    torch.testing.assert_close(unconditional[:1], together[:1])
    assert bool((unconditional[1] != together[1])[3:].all())


def test_place_is_the_position_in_the_law_that_is_cut() -> None:
    """At place q the time is quantile(q cdf(t_max)): the end of the cut law is t_max, never beyond."""

    @dataclass
    class Watching(Oracle):
        vocab_size: int
        seen: list[Tensor]

        def log_endpoint(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
            self.seen.append(s[:, 0])
            return torch.zeros_like(x)

    oracle = Watching(3, [])
    tokens = torch.zeros(4, 2, dtype=torch.long)
    place = torch.tensor([0.0, 0.25, 0.5, 1 - 1e-16], dtype=F64)
    draws = path_draws(FlowMap(oracle), tokens, place, uniform(), noise_for(tokens, 3, 7), t_max=0.8)
    t = 0.8 * place
    torch.testing.assert_close(oracle.seen[0], t)
    assert oracle.seen[0].max().item() <= 0.8
    error = (2 / 3) ** 2 + 2 / 9  # of the uniform distribution
    torch.testing.assert_close(draws[:, 0], 0.8 * t / (1 - t) ** 3 * error)


def test_tokens_add_up_to_the_bound() -> None:
    tokens = CHAIN.sample(20, seeded(8))
    known = torch.arange(8).expand(20, 8) < 2
    bound = nelbo(FlowMap(CHAIN), tokens, warp(4), known=known, generator=seeded(9), dtype=F64)
    torch.testing.assert_close(bound.per_token.sum(1), bound.nats)
    assert bool((bound.per_token[:, :2] == 0).all())
    assert bool((bound.per_token[:, 2:] > 0).all())


def test_tokens_of_an_independent_model_carry_their_own_log_p() -> None:
    p = torch.tensor([0.6, 0.3, 0.1])
    model = MarkovChain(p, p.expand(3, 3), 3)
    tokens = torch.tensor([[0, 1, 2]]).expand(4000, 3)
    bound = nelbo(FlowMap(model), tokens, warp(3), generator=seeded(10), dtype=F64)
    error = bound.per_token.std(0) / math.sqrt(4000)
    assert bool(((bound.per_token.mean(0) + p.log()).abs() < 4 * error).all())


def test_prefix_and_rest_add_up_to_the_whole() -> None:
    """-log p(prefix), of the chain cut short, plus the clean-prefix bound of the rest: -log p of the text."""
    texts = CHAIN.sample(6, seeded(11))
    tokens, length = texts.repeat_interleave(400, 0), 3
    short = MarkovChain(CHAIN.initial, CHAIN.transition, length)
    known = (torch.arange(8) < length).expand(tokens.shape)
    law = warp(4)
    head = nelbo(FlowMap(short), tokens[:, :length], law, generator=seeded(12), dtype=F64).nats
    rest = nelbo(FlowMap(CHAIN), tokens, law, known=known, generator=seeded(13), dtype=F64).nats
    parts, expected = (head + rest).view(6, 400), -CHAIN.log_prob(texts)
    error = parts.std(1) / 20
    assert bool(((parts.mean(1) - expected).abs() < 4 * error).all())
    given = -CHAIN.log_prob(texts, known[:6])
    assert bool(((rest.view(6, 400).mean(1) - given).abs() < 4 * rest.view(6, 400).std(1) / 20).all())


@pytest.mark.parametrize("integrand", [squared_error, capped_cross_entropy], ids=["nelbo", "cross-entropy"])
def test_common_random_numbers_make_differences_sharper(integrand: Integrand) -> None:
    """Two texts that differ in their last token, as two answers to one question do."""
    model = random_joint(3, 4, seed=3, spread=1.2)
    tokens, law = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 1]]), warp(3)

    def gaps(common: bool) -> Tensor:
        how = {"num_samples": 4, "dtype": F64, "common": common, "integrand": integrand}
        each = [nelbo(FlowMap(model), tokens, law, generator=seeded(i), **how) for i in range(40)]
        return torch.cat([bound.nats.diff() for bound in each])

    together, apart = gaps(True), gaps(False)
    assert together.std().item() < 0.7 * apart.std().item()
    assert together.mean().item() == pytest.approx(apart.mean().item(), abs=4 * apart.std().item() / math.sqrt(40))


def test_common_draws_of_one_text_are_the_same() -> None:
    tokens = CHAIN.sample(1, seeded(14)).expand(5, 8)
    bound = nelbo(FlowMap(CHAIN), tokens, warp(4), generator=seeded(15), dtype=F64, common=True)
    torch.testing.assert_close(bound.nats, bound.nats[:1].expand(5))  # equal rows of a product may round differently
    apart = nelbo(FlowMap(CHAIN), tokens, warp(4), generator=seeded(15), dtype=F64)
    assert apart.nats.sort().values.diff().min() > 1e-6


def test_pilot_finds_a_law_of_small_variance() -> None:
    """One draw per text: less spread than under uniform t and the clock, near the least there is; the same mean."""
    model = random_chain(5, 16, seed=4)
    flow_map, clock = FlowMap(model), warp(5)
    law = pilot(flow_map, model.sample(64, seeded(16)), clock, num_samples=1, generator=seeded(17))
    tokens = model.sample(2000, seeded(18))
    noise, place = noise_for(tokens, 5, 19), places(2000, 20)
    spread, mean = {}, {}
    least = pilot(flow_map, model.sample(256, seeded(21)), law, num_samples=1, generator=seeded(22))
    for name, one in {"pilot": law, "clock": clock, "uniform": uniform(), "least": least}.items():
        draws = path_draws(flow_map, tokens, place, one, noise).sum(1)
        spread[name], mean[name] = (draws.std() / draws.mean()).item(), draws.mean().item()
    assert spread["pilot"] < 0.6 * spread["uniform"]
    assert spread["pilot"] < 0.95 * spread["clock"]
    assert spread["pilot"] < 1.2 * spread["least"]
    error = spread["pilot"] * mean["pilot"] / math.sqrt(2000)
    assert mean["pilot"] == pytest.approx(model.entropy(), abs=4 * error)


def test_pilot_spends_little_beyond_the_cut() -> None:
    law = pilot(FlowMap(JOINT), JOINT.sample(32, seeded(21)), warp(3), t_max=0.6, generator=seeded(22))
    assert law.cdf(torch.tensor(0.6, dtype=F64)).item() > 0.999


def test_factor_of_the_cross_entropy_form() -> None:
    """0.814529 is the least c with ||e - mu||^2 <= c (-log mu_x): the maximum at one wrong token, rounded up."""
    p = torch.linspace(1e-4, 1 - 1e-4, 1_000_001, dtype=F64)
    ratio = 2 * (1 - p).square() / -p.log()
    assert ratio.max().item() <= CROSS_ENTROPY_FACTOR <= ratio.max().item() + 1e-6
    assert p[ratio.argmax()].item() == pytest.approx(0.28467, abs=1e-4)
    log_mu = (4 * torch.randn(20_000, 1, 4, generator=seeded(23), dtype=F64)).log_softmax(-1)
    tokens = torch.randint(4, (20_000, 1), generator=seeded(24))
    assert bool((squared_error(log_mu, tokens) <= capped_cross_entropy(log_mu, tokens) + 1e-15).all())


@pytest.mark.parametrize("model", [JOINT, CHAIN], ids=["joint", "chain"])
def test_cross_entropy_form_is_a_looser_bound(model: ExactModel) -> None:
    tokens, law, known = model.sample(2000, seeded(25)), warp(model.vocab_size), None
    tight, loose = (
        nelbo(FlowMap(model), tokens, law, known=known, generator=seeded(26), dtype=F64, integrand=integrand).nats
        for integrand in (squared_error, capped_cross_entropy)
    )
    assert bool((loose >= tight - 1e-9).all())  # draw by draw, on the same random numbers
    ratio = loose.mean().item() / model.entropy()
    assert 1.2 < ratio < 2.2
    wrong = nelbo(
        FlowMap(Scaled(model, 0.6)), tokens, law, generator=seeded(26), dtype=F64, integrand=capped_cross_entropy
    )
    assert wrong.nats.mean().item() > loose.mean().item()


class Narrow(Oracle):
    """The exact posterior of a joint for one who sees only the projection of x onto `basis`, (V, d)."""

    def __init__(self, inner: EnumeratedJoint, basis: Tensor) -> None:
        self.inner, self.basis, self.vocab_size = inner, basis, inner.vocab_size

    def log_endpoint(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Bayes' rule in d dimensions: log p(z | k) = z.b_k t/(1-t)^2 - |b_k|^2 u^2/2."""
        clean = (s >= 1)[..., None]
        s = torch.where(clean, 0.5, s[..., None])
        gain, snr = s / (1 - s).square(), (s / (1 - s)).square()
        seen = (x.double() @ self.basis) @ self.basis.mT
        evidence = gain * seen - snr / 2 * self.basis.square().sum(1)
        return self.inner.log_marginals(torch.where(clean, CLEAN_GAIN * x.double(), evidence)).log_softmax(-1)


def test_projected_form_is_exact_for_a_model_that_sees_a_projection() -> None:
    """V = 4 seen in 2 dimensions: an equality for every text once t_max decides it; the plain form is far above."""
    joint = random_joint(4, 2, seed=27, spread=1.0)
    basis = torch.linalg.qr(torch.randn(4, 2, generator=seeded(28), dtype=F64)).Q
    model, t_max = FlowMap(Narrow(joint, basis)), 0.97
    law = pilot(model, joint.sample(256, seeded(29)), uniform(), bins=64, t_max=t_max, generator=seeded(30))
    texts = joint.texts()
    tokens = texts.repeat_interleave(400, 0)
    tight, loose = (
        nelbo(model, tokens, law, t_max=t_max, generator=seeded(31), dtype=F64, integrand=f).nats.view(16, 400)
        for f in (projected_error(basis), squared_error)
    )
    error = tight.std(1) / 20
    expected = -joint.log_prob(texts)
    assert bool(((tight.mean(1) - expected).abs() < 4 * error).all())
    assert error.mean().item() < 0.05 * expected.mean().item()
    assert loose.mean().item() > 1.5 * tight.mean().item()


def test_projected_form_with_everything_seen_is_the_plain_one() -> None:
    log_mu = (9 * torch.randn(50, 2, 4, generator=seeded(32), dtype=F64)).log_softmax(-1)
    tokens = torch.randint(4, (50, 2), generator=seeded(33))
    basis = torch.linalg.qr(torch.randn(4, 4, generator=seeded(34), dtype=F64)).Q
    torch.testing.assert_close(projected_error(basis)(log_mu, tokens), squared_error(log_mu, tokens), rtol=1e-9, atol=0)


@pytest.mark.parametrize("rows", [7, 200])
@pytest.mark.parametrize("num", [2, 3, 8, 9])
def test_variance_of_a_stratified_mean(num: int, rows: int) -> None:
    """Unbiased where neighbours have one mean. A trend counts as pairs feel it; many rows' common one not at all."""
    batches = 4000 // rows
    values = torch.randn(batches, num, rows, generator=seeded(35), dtype=F64)
    scale = torch.arange(1, num + 1, dtype=F64)[:, None]

    def mean(draws: Tensor) -> float:
        return torch.stack([stratified_variance(batch) for batch in draws]).mean().item()

    assert mean(500 + scale * values) == pytest.approx(scale.square().sum().item() / num**2, rel=0.1)
    trend = mean(500 + 10 * torch.arange(num, dtype=F64)[:, None] + values)
    if rows > 7:
        assert trend == pytest.approx(1 / num, rel=0.1)
    elif num > 3:
        assert 10 / num < trend < 100 / num  # of the trend alone: 50 / num in pairs, against 100 (num + 1) / 12
    else:
        assert trend > 10 / num
