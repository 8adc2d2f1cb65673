"""Samplers against the law they should sample: by frequency at the end, by moments on the way, by order in the step."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from oracle import (
    EnumeratedJoint,
    ExactMap,
    Forgetful,
    path_state,
    random_joint,
    seeded,
    times_like,
    total_variation,
)
from torch import Tensor

from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import State, clamp_known, gaussian, renoise
from catmaps.flow.noise import RowStreams
from catmaps.flow.samplers import (
    SAMPLERS,
    categorical,
    flow_map_step,
    localisation,
    renoise_step,
    renoising,
    sample,
)
from catmaps.flow.times import grid, uniform, warp

JOINT = random_joint(3, 2, seed=1, spread=1.2)
DIAGONAL, EXACT = FlowMap(JOINT), FlowMap(ExactMap(JOINT, steps=16))
CLOCK = warp(3)
N = 30000  # frequencies in 9 cells then differ from probabilities by a total variation of 0.007 +- 0.002


def draw(flow_map: FlowMap, name: str, steps: int, seed: int = 1, n: int = N) -> Tensor:
    generator = seeded(seed)
    shape = (n, 2, 3)
    return sample(flow_map, SAMPLERS[name], grid(CLOCK, steps), shape, generator=generator, dtype=torch.float64)


# ---- final tokens


@pytest.mark.parametrize(("name", "steps"), [("flow_map", 1), ("flow_map", 2), ("renoise", 2)])
def test_exact_map_samples_the_joint_in_any_number_of_steps(name: str, steps: int) -> None:
    assert total_variation(draw(EXACT, name, steps), JOINT.probabilities) < 0.015


@pytest.mark.parametrize(("name", "steps"), [("euler", 32), ("heun", 12), ("localisation", 48)])
def test_diagonal_samples_the_joint_in_many_steps(name: str, steps: int) -> None:
    assert total_variation(draw(DIAGONAL, name, steps), JOINT.probabilities) < 0.015


def test_one_euler_step_does_not_sample_the_joint() -> None:
    # The test of the tests: without correlation, or with one token for all, the distance is far above the bars.
    assert total_variation(draw(DIAGONAL, "euler", 1), JOINT.probabilities) > 0.3
    independent = JOINT.probabilities.sum(1)[:, None] * JOINT.probabilities.sum(0)
    assert 0.5 * (independent - JOINT.probabilities).abs().sum().item() > 0.1


# ---- the law on the way


def check_path_moments(state: State, t: float, joint: EnumeratedJoint = JOINT) -> None:
    """First and second moments of x_t = (1 - t) x_0 + t e over positions and vocabulary."""
    onehot = torch.nn.functional.one_hot(joint.texts(), joint.vocab_size).double().flatten(1)
    p, x = joint.probabilities.flatten(), state.x.flatten(1)
    second = t**2 * (onehot.T * p) @ onehot + (1 - t) ** 2 * torch.eye(onehot.shape[1], dtype=torch.float64)
    bar = 5 / math.sqrt(len(x))
    torch.testing.assert_close(x.mean(0), t * (p @ onehot), rtol=0, atol=bar * second.diag().max().sqrt().item())
    torch.testing.assert_close(x.T @ x / len(x), second, rtol=0, atol=bar * math.sqrt(2) * second.max().item())


def test_jump_of_the_exact_map_keeps_the_marginal() -> None:
    state = gaussian((N, 2, 3), seeded(2), torch.float64)
    check_path_moments(EXACT.jump(state, *times_like(state, 0.0, 0.5)), 0.5)


@pytest.mark.parametrize(("t", "t_new"), [(1.0, 0.6), (0.7, 0.5), (0.6, 0.2), (0.5, 0.0)])
def test_renoise_keeps_the_marginal(t: float, t_new: float) -> None:
    state = path_state(JOINT, N, t, seed=3)
    noise = torch.randn(state.x.shape, generator=seeded(4), dtype=torch.float64)
    check_path_moments(renoise(state, *times_like(state, t, t_new), noise), t_new)


def test_renoise_to_the_same_time_is_the_identity() -> None:
    state = path_state(JOINT, 8, 0.4, seed=3)
    noise = torch.randn(state.x.shape, generator=seeded(4), dtype=torch.float64)
    for t in (0.0, 0.4, 1.0):
        torch.testing.assert_close(renoise(state, *times_like(state, t, t), noise).x, state.x, atol=1e-7, rtol=0)


def test_renoise_step_keeps_the_marginal() -> None:
    state = path_state(JOINT, N, 0.2, seed=5)
    moved, _ = renoise_step(EXACT, state, *times_like(state, 0.2, 0.6), seeded(6))
    assert isinstance(moved, State)
    check_path_moments(moved, 0.6)


def test_less_noise_is_that_share_of_the_variance() -> None:
    """x_t = t mu + sqrt(v) (1 - t) noise, of the same draws whatever v is."""
    state, t = path_state(JOINT, 8, 0.2, seed=5), 0.6
    steps = [renoising(v)(EXACT, state, *times_like(state, 0.2, t), seeded(6)) for v in (0.0, 0.25, 1.0)]
    none, quarter, whole = (step[0].x for step in steps)
    torch.testing.assert_close(none, t * EXACT.endpoint(state, *times_like(state, 0.2, 1.0)))
    torch.testing.assert_close(quarter - none, (whole - none) / 2)
    noise = (whole - none) / (1 - t)
    assert noise.std().item() == pytest.approx(1, abs=0.3)
    known = torch.tensor([[True, False]] * 8)
    before, after = (torch.where(known, 1.0, time) for time in (0.2, t))
    clean = clamp_known(state, torch.ones(8, 2, dtype=torch.long), known)
    moved, _ = renoising(0.25)(EXACT, clean, before, after, seeded(6))
    torch.testing.assert_close(moved.x[:, 0], clean.x[:, 0])


def test_localisation_keeps_the_marginal_on_the_way() -> None:
    state, generator = gaussian((N, 2, 3), seeded(7), torch.float64), seeded(8)
    times = torch.linspace(0, 0.65, 40).tolist()
    for s, t in itertools.pairwise(times):
        state, _ = localisation(DIAGONAL, state, *times_like(state, s, t), generator)
        assert isinstance(state, State)
    check_path_moments(state, 0.65)


# ---- order


def error_slope(name: str, counts: tuple[int, ...], end: float = 0.75) -> float:
    """d log(error of the state at `end`) / d log(step), steps equal in u = t / (1 - t), against the exact map."""
    noise = gaussian((64, 2, 3), seeded(9), torch.float64)
    exact = FlowMap(ExactMap(JOINT, steps=200)).jump(noise, *times_like(noise, 0.0, end)).x
    errors: list[float] = []
    for count in counts:
        u = torch.linspace(0, end / (1 - end), count + 1, dtype=torch.float64)
        times, state = (u / (1 + u)).tolist(), noise
        for s, t in itertools.pairwise(times):
            state, _ = SAMPLERS[name](DIAGONAL, state, *times_like(state, s, t), None)
        errors.append((state.x - exact).square().mean().sqrt().item())
    steps, logs = -torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    centred = steps - steps.mean()
    return ((centred * logs).sum() / centred.square().sum()).item()


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    assert error_slope(name, (16, 32, 64, 128)) == pytest.approx(order, abs=0.15)


# ---- known text


TRIPLE = random_joint(3, 3, seed=10, spread=1.3)
# Calls of the exact map cost many of the diagonal: few steps suffice for it.
CALLS = {"euler": 32, "heun": 12, "flow_map": 1, "renoise": 2, "localisation": 40}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("position", [0, 1], ids=["prefix", "middle"])
def test_known_text_is_untouched_and_the_rest_follows_the_conditional(name: str, position: int) -> None:
    """Each given token is its own condition, with half of the batch."""
    n = 12000
    tokens = torch.full((n, 3), 2)
    tokens[:, position] = torch.arange(n) % 2
    known = torch.zeros(n, 3, dtype=torch.bool)
    known[:, position] = True
    model = TRIPLE if name not in ("flow_map", "renoise") else ExactMap(TRIPLE, steps=12)
    out = sample(
        FlowMap(model),
        SAMPLERS[name],
        grid(CLOCK, CALLS[name]),
        (n, 3, 3),
        tokens=tokens,
        known=known,
        generator=seeded(11),
        dtype=torch.float64,
    )
    assert bool((out[:, position] == tokens[:, position]).all())
    others = [p for p in range(3) if p != position]
    marginal = TRIPLE.probabilities.sum(position)
    for token in range(2):
        rest = out[tokens[:, position] == token][:, others]
        conditional = TRIPLE.probabilities.select(position, token)
        conditional = conditional / conditional.sum()
        assert total_variation(rest, conditional) < 0.03  # of which noise 0.012 +- 0.003
        assert 0.5 * (marginal - conditional).abs().sum().item() > 0.08


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_moves_a_clean_position(name: str) -> None:
    tokens = TRIPLE.sample(16, seeded(12))
    known = torch.rand(16, 3, generator=seeded(13)) < 0.5
    state = clamp_known(gaussian((16, 3, 3), seeded(14), torch.float64), tokens, known)
    flow_map, generator, start = FlowMap(Forgetful(ExactMap(TRIPLE, steps=4))), seeded(15), state.x
    for s, t in [(0.0, 0.4), (0.4, 0.8), (0.8, 1.0)]:
        before, after = (torch.where(known, 1.0, time).double() for time in (s, t))
        old = state.x
        state, endpoint = SAMPLERS[name](flow_map, state, before, after, generator)
        torch.testing.assert_close(state.x[known], start[known], rtol=0, atol=0)
        assert bool((state.x[~known] != old[~known]).any())
        assert isinstance(endpoint, Tensor)
        torch.testing.assert_close(endpoint.sum(-1), torch.ones(16, 3, dtype=torch.float64))
    assert bool(torch.isfinite(state.x).all())


# ---- the loop


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_generator_same_text(name: str) -> None:
    model = FlowMap(ExactMap(JOINT, steps=4))
    first, again, other = (draw(model, name, 2, seed=seed, n=64) for seed in (1, 1, 2))
    assert bool((first == again).all())
    assert bool((first != other).any())


@pytest.mark.parametrize("name", ["renoise", "localisation"])
def test_stochastic_samplers_draw_fresh_noise(name: str) -> None:
    state = path_state(JOINT, 8, 0.2, seed=16)
    times = times_like(state, 0.2, 0.5)
    first, other = (SAMPLERS[name](EXACT, state, *times, seeded(seed))[0].x for seed in (1, 2))
    assert bool((first != other).all())


def test_watch_sees_every_step_and_known_text() -> None:
    tokens, known = torch.tensor([[1, 0]]).expand(4, 2), torch.tensor([[True, False]]).expand(4, 2)
    seen: list[tuple[float, Tensor]] = []
    out = sample(
        FlowMap(JOINT),
        SAMPLERS["euler"],
        grid(uniform(), 4),
        (4, 2, 3),
        tokens=tokens,
        known=known,
        generator=seeded(17),
        watch=lambda t, endpoint: seen.append((t, endpoint)),
    )
    assert [t for t, _ in seen] == [0.25, 0.5, 0.75, 1.0]
    assert all(bool((endpoint[:, 0] == torch.tensor([0.0, 1.0, 0.0])).all()) for _, endpoint in seen)
    assert bool((seen[-1][1].argmax(-1) == out).all())
    assert out.dtype == torch.int64


def test_known_needs_tokens() -> None:
    with pytest.raises(ValueError, match="together"):
        sample(DIAGONAL, flow_map_step, grid(CLOCK, 1), (1, 2, 3), known=torch.ones(1, 2, dtype=torch.bool))


# ---- categorical draws


def test_frequencies_of_categorical_draws() -> None:
    """Pearson's statistic with 5 degrees of freedom: above 29.9 once in 65,000 times."""
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.09, 0.009, 0.001])
    n = 200_000
    drawn = categorical(probabilities.expand(n // 100, 100, 6), seeded(18))
    expected = n * probabilities.double()
    statistic = ((drawn.flatten().bincount(minlength=6) - expected).square() / expected).sum().item()
    assert statistic < 29.9


def test_categorical_rows_are_independent_and_need_not_be_normalised() -> None:
    rows = torch.tensor([[0.0, 2.0, 0.0], [0.5, 0.0, 0.0]]).expand(500, 2, 3)
    assert torch.unique(categorical(rows, seeded(19)), dim=0).tolist() == [[1, 0]]
    drawn = categorical(torch.full((20000, 2, 2), 0.5), seeded(20)).double()
    assert abs((drawn[:, 0] * drawn[:, 1]).mean().item() - 0.25) < 0.02


@pytest.fixture
def fixed_point(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes torch.rand return one number, in the dtype that is asked for."""

    def fix(value: float) -> None:
        def rand(shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32, **_: object) -> Tensor:
            return torch.full(shape, value, dtype=dtype)

        monkeypatch.setattr(torch, "rand", rand)

    return fix


@pytest.mark.parametrize(
    ("point", "token"),
    [(0.0, 1), (0.5e-9, 1), (1.5e-9, 2), (0.5, 2), (1 - 3e-9, 2), (1 - 1.5e-9, 3), (1 - 0.5e-9, 4), (1 - 1e-16, 4)],
)
def test_events_of_probability_1e_9_are_drawn(fixed_point: Callable[[float], None], point: float, token: int) -> None:
    """In fp32 the running sum stands at 1 before the last two tokens, which would then never be drawn."""
    fixed_point(point)
    probabilities = torch.tensor([[[0.0, 1e-9, 1.0, 1e-9, 1e-9]]])
    assert categorical(probabilities).item() == token


# ---- randomness by row


@pytest.mark.parametrize(
    ("flow_map", "name", "steps"), [(EXACT, "renoise", 2), (DIAGONAL, "localisation", 48), (DIAGONAL, "euler", 32)]
)
def test_streams_by_row_sample_the_joint(flow_map: FlowMap, name: str, steps: int) -> None:
    streams = RowStreams(torch.arange(N))
    drawn = sample(flow_map, SAMPLERS[name], grid(CLOCK, steps), (N, 2, 3), generator=streams, dtype=torch.float64)
    assert total_variation(drawn, JOINT.probabilities) < 0.015


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_row_with_its_stream_is_the_same_in_every_batch(name: str) -> None:
    def drawn(rows: list[int]) -> list[list[int]]:
        shape, streams = (len(rows), 2, 3), RowStreams(torch.tensor(rows))
        return sample(EXACT, SAMPLERS[name], grid(CLOCK, 4), shape, generator=streams, dtype=torch.float64).tolist()

    crowd = drawn(list(range(40)))
    assert len({tuple(text) for text in crowd}) > 2
    assert [*drawn([7]), *drawn([31, 2])] == [crowd[7], crowd[31], crowd[2]]


def test_a_generator_deals_to_the_batch_as_a_whole() -> None:
    """What a seed means for `sample` and `generate`: one draw for the start, one after every step."""
    times, generator, by_hand = grid(CLOCK, 3), seeded(4), seeded(4)
    drawn = sample(EXACT, renoise_step, times, (5, 2, 3), generator=generator, dtype=torch.float64)
    state = gaussian((5, 2, 3), by_hand, torch.float64)
    for s, t in itertools.pairwise(times.tolist()):
        clean = EXACT.jump(state, *times_like(state, s, 1.0))
        noise = torch.randn(state.x.shape, generator=by_hand, dtype=torch.float64)
        state = renoise(clean, *times_like(state, 1.0, t), noise)
    assert torch.equal(drawn, state.x.argmax(-1))
    assert torch.equal(generator.get_state(), by_hand.get_state())
