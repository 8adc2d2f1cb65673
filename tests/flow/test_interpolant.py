"""The path, its noise and its jumps, recomputed from their closed forms."""

import math

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from catmaps.flow import interpolant
from catmaps.flow.interpolant import State, advance, interpolate, renoise, step_fraction

# The first use of torch.func.jvp in a process makes torch load its own scripted decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

B, L, V = 3, 5, 7


def draws(seed: int = 0) -> tuple[Tensor, Tensor, torch.Generator]:
    """Tokens (B, L), fp64 noise (B, L, V), and the generator that made them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (B, L), generator=generator)
    return tokens, torch.randn(B, L, V, generator=generator, dtype=torch.float64), generator


def onehot(tokens: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(tokens, V).double()


@pytest.mark.parametrize("times", [1, L])
def test_state_is_the_closed_form_with_the_same_noise(times: int) -> None:
    tokens, noise, generator = draws()
    t = torch.rand(B, times, generator=generator, dtype=torch.float64)
    state = interpolate(tokens, noise, t)
    torch.testing.assert_close(state.x, (1 - t)[..., None] * noise + t[..., None] * onehot(tokens), rtol=0, atol=1e-15)
    assert state.batch_size == B
    assert torch.equal(state[1:].x, state.x[1:])
    assert torch.equal(state[torch.tensor([2, 0])].x, state.x[[2, 0]])


def test_ends_of_the_path_are_noise_and_onehot() -> None:
    tokens, noise, _ = draws()
    assert torch.equal(interpolate(tokens, noise, torch.zeros(B, 1, dtype=torch.float64)).x, noise)
    assert torch.equal(interpolate(tokens, noise, torch.ones(B, 1, dtype=torch.float64)).x, onehot(tokens))


def test_gaussian_state_follows_its_generator() -> None:
    first = interpolant.gaussian((2, 3, 4), torch.Generator().manual_seed(1), torch.float64)
    again = interpolant.gaussian((2, 3, 4), torch.Generator().manual_seed(1), torch.float64)
    assert first.x.dtype == torch.float64
    assert torch.equal(first.x, again.x)


def test_step_fraction_and_the_clean_end() -> None:
    s = torch.tensor([[0.0, 0.2, 0.5, 0.5, 1.0]], dtype=torch.float64)
    t = torch.tensor([[1.0, 0.6, 0.5, 1.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[1.0, 0.5, 0.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(step_fraction(s, t), expected, rtol=0, atol=1e-15)


def test_step_fraction_broadcasts_one_time_over_positions() -> None:
    s = torch.tensor([[0.0], [0.5]])
    t = torch.tensor([[0.5, 1.0], [0.75, 0.5]])
    assert torch.equal(step_fraction(s, t), torch.tensor([[0.5, 1.0], [0.5, 0.0]]))


def test_step_fraction_has_finite_gradients_at_the_clean_end() -> None:
    s = torch.tensor([[0.3, 1.0]], requires_grad=True)
    t = torch.tensor([[0.7, 1.0]], requires_grad=True)
    step_fraction(s, t).sum().backward()
    assert s.grad is not None
    assert t.grad is not None
    assert bool(torch.isfinite(s.grad).all() and torch.isfinite(t.grad).all())


def test_step_fractions_compose() -> None:
    times = torch.rand(B, L, 3, generator=draws()[2], dtype=torch.float64).sort(-1).values
    s, u, t = times.unbind(-1)
    rest = (1 - step_fraction(s, u)) * (1 - step_fraction(u, t))
    torch.testing.assert_close(rest, 1 - step_fraction(s, t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("end", ["inside", "clean"])
def test_a_jump_towards_the_true_token_stays_on_the_path(end: str) -> None:
    tokens, noise, generator = draws()
    s, t = torch.rand(2, B, L, generator=generator, dtype=torch.float64).sort(0).values
    s[:, 0], t[:, 0] = 1.0, 1.0
    t = torch.ones_like(t) if end == "clean" else t
    jumped = advance(interpolate(tokens, noise, s), onehot(tokens), step_fraction(s, t))
    torch.testing.assert_close(jumped.x, interpolate(tokens, noise, t).x, rtol=0, atol=1e-14)


def test_a_whole_jump_returns_the_endpoint_exactly_and_none_the_state() -> None:
    _, noise, generator = draws()
    state = State(noise.float())
    endpoint = torch.rand(B, L, V, generator=generator).softmax(-1)
    assert torch.equal(advance(state, endpoint, torch.ones(B, 1)).x, endpoint)
    assert torch.equal(advance(state, endpoint, torch.zeros(B, L)).x, state.x)


def test_move_is_the_rate_of_the_jump() -> None:
    _, noise, generator = draws()
    state, endpoint = State(noise), torch.rand(B, L, V, generator=generator, dtype=torch.float64)
    t = torch.rand(B, L, generator=generator, dtype=torch.float64)

    def jump(t_new: Tensor) -> Tensor:
        return advance(state, endpoint, step_fraction(t, t_new)).x

    rate = torch.func.jvp(jump, (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(interpolant.move(state, endpoint, 1 / (1 - t)).x, rate, rtol=1e-12, atol=1e-12)


def test_root_snr() -> None:
    t = torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(
        interpolant.root_snr(t), torch.tensor([0, 1, 9.0], dtype=torch.float64), rtol=1e-12, atol=0
    )


def moments(x: Float[Tensor, "n 1 v"]) -> tuple[Tensor, Tensor]:
    return x[:, 0].mean(0), x[:, 0].var(0)


@pytest.mark.parametrize(("t", "t_new"), [(0.6, 0.25), (0.9, 0.7), (1.0, 0.4), (0.5, 0.0)])
def test_renoise_keeps_the_law_of_the_path(t: float, t_new: float) -> None:
    n, generator = 40_000, torch.Generator().manual_seed(5)
    tokens = torch.full((n, 1), 2)
    before, fresh = torch.randn(2, n, 1, 4, generator=generator, dtype=torch.float64)
    times = torch.full((n, 1), t, dtype=torch.float64), torch.full((n, 1), t_new, dtype=torch.float64)
    state = renoise(interpolate(tokens, before, times[0]), *times, fresh)
    mean, var = moments(state.x)
    expected = t_new * torch.nn.functional.one_hot(torch.tensor(2), 4).double()
    scale = 1 - t_new
    torch.testing.assert_close(mean, expected, rtol=0, atol=5 * scale / math.sqrt(n))
    torch.testing.assert_close(var, torch.full((4,), scale**2, dtype=torch.float64), rtol=5 * math.sqrt(2 / n), atol=0)


def test_renoise_to_the_same_time_changes_nothing() -> None:
    tokens, noise, generator = draws()
    for dtype in (torch.float32, torch.float64):
        t = torch.rand(B, L, generator=generator, dtype=dtype)
        t[0, :2] = torch.tensor([0.0, 1.0])
        state = interpolate(tokens, noise.to(dtype), t)
        assert torch.equal(renoise(state, t, t, torch.randn_like(state.x)).x, state.x)


def test_clamp_known_writes_clean_onehots_there_and_nowhere_else() -> None:
    tokens, noise, generator = draws()
    known = torch.rand(B, L, generator=generator) < 0.5
    clamped = interpolant.clamp_known(State(noise), tokens, known)
    assert torch.equal(clamped.x[known], onehot(tokens)[known])
    assert torch.equal(clamped.x[~known], noise[~known])


def test_clamp_known_without_known_positions_is_the_identity() -> None:
    tokens, noise, _ = draws()
    state = State(noise)
    assert interpolant.clamp_known(state, tokens, None) is state
    assert interpolant.clamp_known(state, None, None) is state
