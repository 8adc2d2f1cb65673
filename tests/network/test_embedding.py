"""Embeddings of noisy text and of time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catmaps.network.embedding import (
    JITTER,
    BeliefEmbedding,
    Conditioner,
    LinearEmbedding,
    distinct,
    with_factor,
)

# The first use of torch.func.jvp in a process makes torch load its own scripted decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

F64 = torch.float64
B, L, V, D = 2, 5, 7, 4


def randomise(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        parameter.data.normal_(generator=generator)


def inputs(times: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, gain, s, log prior)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, L, V, generator=generator, dtype=F64)
    gain, s = torch.rand(2, B, times, generator=generator, dtype=F64)
    return x, gain, s, torch.randn(V, generator=generator, dtype=F64).log_softmax(-1)


@pytest.mark.parametrize("times", [1, L])
@pytest.mark.parametrize("moves", [True, False])
def test_tangent_of_the_belief(times: int, moves: bool) -> None:
    embedding = BeliefEmbedding(V, D)
    randomise(embedding)
    x, gain, _, log_prior = inputs(times)
    dx, dgain, _, _ = inputs(times, seed=1)
    ours = embedding.forward_with_tangent((x, dx if moves else None), (gain, dgain), log_prior)
    expected = torch.func.jvp(
        lambda x, gain: embedding(x, gain, log_prior), (x, gain), (dx if moves else torch.zeros_like(x), dgain)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("times", [1, L])
@pytest.mark.parametrize("moves", [True, False])
def test_tangent_of_the_linear_input(times: int, moves: bool) -> None:
    embedding = LinearEmbedding(V, D)
    (x, _, s, _), (dx, _, ds, _) = inputs(times), inputs(times, seed=1)
    z, dz = x[..., :D], dx[..., :D]
    ours = embedding.forward_with_tangent((z, dz if moves else None), (s, ds))
    expected = torch.func.jvp(embedding, (z, s), (dz if moves else torch.zeros_like(z), ds))
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def test_factor_of_the_table_and_its_gradient() -> None:
    weight = torch.randn(4, 30, generator=torch.Generator().manual_seed(2), dtype=F64, requires_grad=True)
    factor = with_factor(weight)[1]
    torch.testing.assert_close(factor @ factor.mT, weight @ weight.mT, rtol=1e-5, atol=1e-4)
    assert torch.equal(factor.tril(), factor)

    def plain(weight: Tensor) -> Tensor:
        gram = weight @ weight.mT
        jitter = JITTER * gram.detach().diagonal().mean() * torch.eye(4, dtype=F64)
        return torch.linalg.cholesky(gram + jitter)

    direction = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=F64)
    (ours,) = torch.autograd.grad((factor * direction).sum(), weight)
    (expected,) = torch.autograd.grad((plain(weight) * direction).sum(), weight)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("noisy", [True, False])
def test_gradients_of_tokens_and_of_noise_come_together_in_the_table(noisy: bool) -> None:
    embedding = LinearEmbedding(30, 4).double()
    weight, tokens = embedding.table.weight, torch.tensor([[3, 29, 3], [0, 7, 3]])
    normal = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    direction = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2), dtype=F64)

    def projected(vectors: Tensor, factor: Tensor) -> Tensor:
        return ((vectors + normal @ factor.mT if noisy else vectors) * direction).sum()

    projection = embedding.projection(torch.float64)
    (ours,) = torch.autograd.grad(projected(projection.columns(tokens), projection.factor), weight)
    gram = weight @ weight.mT
    factor = torch.linalg.cholesky(gram + JITTER * gram.detach().diagonal().mean() * torch.eye(4, dtype=F64))
    (expected,) = torch.autograd.grad(projected(weight.mT[tokens], factor), weight)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_a_factor_is_kept_until_its_table_changes() -> None:
    embedding = LinearEmbedding(30, 4).requires_grad_(False)
    first = embedding.projection(torch.float32).factor
    assert embedding.projection(torch.float32).factor is first
    embedding.table.weight.mul_(2)
    torch.testing.assert_close(embedding.projection(torch.float32).factor, 2 * first)


def test_belief_at_a_clean_position_is_the_tokens_row() -> None:
    torch.manual_seed(0)
    embedding, tokens = BeliefEmbedding(V, D), torch.arange(V)[None]
    x = F.one_hot(tokens, V).float()
    gain = torch.full((1, 1), 0.95 / 0.05**2)
    log_prior = torch.linspace(-12, 0, V).log_softmax(-1)
    rows = embedding(x, gain, log_prior)
    torch.testing.assert_close(rows, embedding.table.weight.T[None], rtol=0, atol=1e-6)


def test_belief_without_evidence_is_the_prior() -> None:
    torch.manual_seed(0)
    embedding = BeliefEmbedding(V, D).double()
    x, _, _, log_prior = inputs(1)
    out = embedding(x, torch.zeros(B, 1, dtype=F64), log_prior)
    expected = embedding.table(log_prior.exp()).expand(B, L, D)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("s", [0.0, 0.5, 0.9, 1.0])
def test_linear_input_has_unit_root_mean_square_at_every_time(s: float) -> None:
    vocab_size, n = 64, 2000
    embedding = LinearEmbedding(vocab_size, vocab_size)
    embedding.table.weight.data.copy_(torch.eye(vocab_size))
    noise = torch.randn(1, n, vocab_size, generator=torch.Generator().manual_seed(0))
    x = (1 - s) * noise + s * F.one_hot(torch.arange(n) % vocab_size, vocab_size)
    out = embedding(embedding.table(x), torch.full((1, 1), s))
    assert out.square().mean().sqrt().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_gap_embedder_is_silent_on_the_diagonal_for_any_parameters(seed: int) -> None:
    conditioner = Conditioner(6, 8)
    randomise(conditioner, seed)
    phi = torch.randn(B, 3, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)
    with_gap = conditioner(phi, phi)
    for layer in conditioner.gap:
        assert isinstance(layer, nn.Linear)
        layer.weight.data.normal_(generator=torch.Generator().manual_seed(seed + 9))
    assert torch.equal(conditioner(phi, phi), with_gap)


def test_new_gap_embedder_does_not_see_the_gap() -> None:
    torch.manual_seed(0)
    conditioner = Conditioner(6, 8)
    phi_s, phi_t = torch.randn(2, B, 3, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(conditioner(phi_s, phi_t), conditioner(phi_s, phi_s))
    randomise(conditioner)
    assert not torch.allclose(conditioner(phi_s.double(), phi_t.double()), conditioner(phi_s.double(), phi_s.double()))


def test_tangent_of_the_conditioner() -> None:
    conditioner = Conditioner(6, 8)
    randomise(conditioner)
    phi, dphi = torch.randn(2, 2, B, 3, 6, generator=torch.Generator().manual_seed(1), dtype=F64)
    ours = conditioner.forward_with_tangent((phi[0], dphi[0]), (phi[1], dphi[1]))
    expected = torch.func.jvp(conditioner, (phi[0], phi[1]), (dphi[0], dphi[1]))
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def test_distinct_returns_the_tuples_of_times_and_where_they_are() -> None:
    s = torch.tensor([[0.5, 1.0, 0.5, 0.2, 1.0], [0.1, 0.1, 0.1, 0.1, 0.1]])
    t = torch.tensor([[0.6, 1.0, 0.6, 0.6, 1.0], [0.2, 0.3, 0.2, 0.3, 0.2]])
    (s_k, t_k), index = distinct(s, t)
    assert index is not None
    assert s_k.shape == t_k.shape == (2, 3)
    assert torch.equal(s_k.gather(1, index), s)
    assert torch.equal(t_k.gather(1, index), t)
    assert int(index[1].max()) == 1


def test_distinct_of_one_tuple_needs_an_index_only_if_given_per_position() -> None:
    s, t = torch.tensor([[0.1], [0.2]]), torch.tensor([[0.3], [0.4]])
    values, index = distinct(s, t)
    assert index is None
    assert torch.equal(values[0], s)
    assert torch.equal(values[1], t)
    (s_k, t_k), index = distinct(s.expand(2, 6), t.expand(2, 6))
    assert index is not None
    assert torch.equal(s_k.gather(1, index), s.expand(2, 6))
    assert torch.equal(t_k.gather(1, index), t.expand(2, 6))


def test_distinct_broadcasts_a_shared_start_over_many_ends() -> None:
    s, t = torch.tensor([[0.1], [0.2]]), torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    (s_k, t_k), index = distinct(s, t)
    assert index is not None
    assert torch.equal(t_k.gather(1, index), t)
    assert torch.equal(s_k.gather(1, index), s.expand(2, 6))


@pytest.mark.parametrize("seed", range(5))
def test_distinct_of_random_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    times = torch.randint(3, (4, 3, 17), generator=generator).float().unbind(0)
    values, index = distinct(*times)
    assert index is not None
    for time, value in zip(times, values, strict=True):
        assert torch.equal(value.gather(1, index), time)
    table = torch.stack(times, -1)
    for b in range(3):
        assert int(index[b].max()) + 1 == len(table[b].unique(dim=0))
