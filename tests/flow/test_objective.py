"""The plan of a batch, its division, and what the mixture of losses makes of exact, collapsed and wrong maps."""

import dataclasses
from typing import Literal, get_args

import pytest
import torch
from oracle import ConstantMap, ExactMap, Offset, random_chain, random_joint, seeded
from torch import Tensor

from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import interpolate
from catmaps.flow.losses import LAGRANGIAN, OFF_DIAGONAL, anchor, endpoint_cross_entropy, soft_cross_entropy
from catmaps.flow.objective import (
    ANCHOR,
    DIAGONAL,
    OFF_DIAGONAL_ROW,
    BatchLoss,
    ObjectiveConfig,
    Plan,
    batch_loss,
    clean_positions,
    plan,
)
from catmaps.flow.times import Pair, grid, uniform, warp

MIXED = ObjectiveConfig(off_diagonal=0.5)
CLOCK = warp(27)
JOINT = random_joint(3, 3, seed=1, spread=1.2)
TEACHER = FlowMap(JOINT)
DIRECTION = torch.randn(3, 3, generator=seeded(2), dtype=torch.float64)


def student(theta: Tensor | float = 0.3) -> FlowMap:
    return FlowMap(Offset(JOINT, torch.as_tensor(theta, dtype=torch.float64), DIRECTION))


# ---- the plan


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("layout", ["strided", "blocks"])
@pytest.mark.parametrize("config", [MIXED, ObjectiveConfig(off_diagonal=0.25, anchor=0.5)], ids=["half", "quarter"])
def test_every_process_gets_its_share_of_roles(config: ObjectiveConfig, layout: str, world: int) -> None:
    batch = 256
    roles = plan(config, CLOCK, batch, 8, seeded(3)).role
    parts = [roles[r::world] for r in range(world)] if layout == "strided" else roles.chunk(world)
    for part in parts:
        off, anchored = (part != DIAGONAL).sum().item(), (part == ANCHOR).sum().item()
        assert abs(off - config.off_diagonal * len(part)) <= 3
        assert abs(anchored - config.off_diagonal * config.anchor * len(part)) <= 3


def test_base_training_is_the_plan_without_off_diagonal_rows() -> None:
    drawn = plan(ObjectiveConfig(), CLOCK, 64, 8, seeded(4))
    assert bool((drawn.role == DIAGONAL).all())
    everything = plan(ObjectiveConfig(off_diagonal=1.0, anchor=1.0), CLOCK, 64, 8, seeded(4))
    assert bool((everything.role == ANCHOR).all())


def test_bases_draw_the_numbers_they_would_beside_off_diagonal_rows() -> None:
    base, mixed = (plan(c, CLOCK, 32, 16, seeded(7)) for c in (ObjectiveConfig(), MIXED))
    assert torch.equal(base.known, mixed.known)
    diagonal = mixed.role == DIAGONAL
    assert torch.equal(base.times.t[diagonal], mixed.times.t[diagonal])


@pytest.mark.parametrize("vocab_size", [27, 50257])
def test_times_are_ordered_and_lie_inside(vocab_size: int) -> None:
    drawn = plan(MIXED, warp(vocab_size), 4096, 4, seeded(5))
    (s, u, t), off = drawn.times, drawn.role[:, None] != DIAGONAL
    assert s.shape == u.shape == t.shape == (4096, 1)
    assert bool(((s >= 0) & (t <= 1)).all())
    assert bool(((s < u) & (u < t))[off].all())
    assert bool(((s == u) & (u == t))[~off].all())


def test_diagonal_times_are_stratified_in_the_clock() -> None:
    times = plan(ObjectiveConfig(), CLOCK, 128, 4, seeded(6)).times.t
    cells = CLOCK.cdf(times[:, 0].double()).sort().values
    torch.testing.assert_close(cells.diff(), torch.full((127,), 1 / 128).double(), rtol=0, atol=1e-4)
    assert bool((times[1:] < times[:-1]).any())  # in random order: no process has the late times


def test_boundary_pairs_have_their_share_and_anchors_have_none() -> None:
    drawn = plan(MIXED, CLOCK, 8192, 4, seeded(7))
    whole = ((drawn.times.s == 0) & (drawn.times.t == 1))[:, 0]
    assert whole[drawn.role == OFF_DIAGONAL_ROW].double().mean().item() == pytest.approx(MIXED.boundary, abs=0.03)
    assert not bool(whole[drawn.role != OFF_DIAGONAL_ROW].any())
    never = plan(dataclasses.replace(MIXED, boundary=0.0), CLOCK, 512, 4, seeded(7))
    assert not bool(((never.times.s == 0) & (never.times.t == 1)).any())


def test_the_ladder_stands_on_the_grids_of_samplers() -> None:
    sampling = warp(27)
    config = dataclasses.replace(MIXED, boundary=0.0, ladder=1.0)
    drawn = plan(config, uniform(), 8192, 4, seeded(7), sampling)
    rows = drawn.role == OFF_DIAGONAL_ROW
    grids = {n: grid(sampling, n) for n in (1, 2, 4, 8, 16, 32, 64)}
    steps = torch.full((int(rows.sum()),), 0)
    s, u, t = (time[rows, 0] for time in drawn.times)
    for n in (1, 2, 4, 8, 16, 32):
        coarse, fine = grids[n], grids[2 * n]
        ends = torch.stack([coarse[:-1], fine[1::2], coarse[1:]], -1)
        here = (torch.stack([s, u, t], -1)[:, None] - ends).abs().amax(-1).amin(-1) < 1e-6
        steps[here] = n
    share = torch.bincount(steps, minlength=33)[[1, 2, 4, 8, 16, 32]].double() / len(steps)
    torch.testing.assert_close(share, torch.full((6,), 1 / 6).double(), rtol=0, atol=0.03)
    half = plan(dataclasses.replace(MIXED, ladder=0.5), uniform(), 8192, 4, seeded(7), sampling)
    without = plan(MIXED, uniform(), 8192, 4, seeded(7), sampling)
    moved = (half.times.t != without.times.t)[:, 0]
    assert not bool(moved[without.role != OFF_DIAGONAL_ROW].any())
    off = moved[without.role == OFF_DIAGONAL_ROW].double().mean().item()
    # A step that ends where the other pair does is not seen to move: t = 1 is one.
    assert off == pytest.approx(0.5 * (1 - MIXED.boundary), abs=0.1)


def test_final_jumps_end_at_one_and_start_all_over_the_sampling_clock() -> None:
    sampling = warp(27)
    config = dataclasses.replace(MIXED, final=0.5, ladder=0.0)
    drawn = plan(config, uniform(), 8192, 4, seeded(7), sampling)
    s, u, t = (time[drawn.role == OFF_DIAGONAL_ROW, 0] for time in drawn.times)
    final = (t == 1) & (s > 0)
    assert final.double().mean().item() == pytest.approx(0.5 * (1 - MIXED.boundary), abs=0.03)
    start, middle = sampling.cdf(s[final].double()), sampling.cdf(u[final].double())
    assert torch.histc(start, 4, 0, 1).min().item() > 0.2 * len(start)
    torch.testing.assert_close(middle, (1 + start) / 2, rtol=0, atol=2e-3)
    every = plan(dataclasses.replace(MIXED, boundary=0.0, final=1.0), uniform(), 512, 4, seeded(7), sampling)
    assert bool((every.times.t[every.role == OFF_DIAGONAL_ROW] == 1).all())
    assert bool((every.times.s < every.times.u)[every.role == OFF_DIAGONAL_ROW].all())


@pytest.mark.parametrize("loss", get_args(ObjectiveConfig.__annotations__["loss"]))
def test_lagrangian_losses_alone_never_end_at_one(loss: Literal["psd", "lsd", "lsd_kl", "esd", "ecld"]) -> None:
    config = dataclasses.replace(MIXED, loss=loss, final=0.5, ladder=0.5)
    drawn = plan(config, CLOCK, 2048, 4, seeded(7), warp(27))
    ends = (drawn.times.t[drawn.role == OFF_DIAGONAL_ROW] == 1).double().mean().item()
    assert ends == 0 if loss in LAGRANGIAN else ends > config.boundary


def test_anchors_have_small_gaps_and_the_others_do_not() -> None:
    drawn = plan(MIXED, CLOCK, 4096, 4, seeded(8))
    gap = (CLOCK.cdf(drawn.times.t.double()) - CLOCK.cdf(drawn.times.s.double()))[:, 0]
    anchored = gap[drawn.role == ANCHOR]
    assert anchored.min().item() > 0
    assert anchored.max().item() < MIXED.anchor_gap + 1e-4
    starts = CLOCK.cdf(drawn.times.s.double())[drawn.role == ANCHOR]
    assert starts.min().item() < 0.05
    assert starts.max().item() > 0.9
    assert gap[drawn.role == OFF_DIAGONAL_ROW].mean().item() > 0.5


@pytest.mark.parametrize("length", [1, 2, 16])
def test_clean_positions_are_one_run_and_never_all(length: int) -> None:
    known = clean_positions(4096, length, 1.0, seeded(9))
    assert not bool(known.all(1).any())
    edges = torch.nn.functional.pad(known.int(), (1, 1)).diff(dim=1).abs().sum(1)
    assert bool((edges <= 2).all())
    if length == 16:
        some = known.any(1)
        assert some.double().mean().item() > 0.8
        assert 0.4 < known[some][:, 0].double().mean().item() < 0.75  # prefixes and spans


def test_share_of_sequences_with_clean_positions() -> None:
    share = plan(ObjectiveConfig(clean=0.25), CLOCK, 8192, 64, seeded(10)).known.any(1).double().mean().item()
    assert 0.21 < share < 0.26  # a few chosen runs are empty
    assert not bool(plan(ObjectiveConfig(clean=0.0), CLOCK, 64, 8, seeded(10)).known.any())


def test_plan_is_a_function_of_its_generator() -> None:
    first, again, other = (plan(MIXED, CLOCK, 64, 8, seeded(seed)) for seed in (1, 1, 2))
    torch.testing.assert_close(first.times.t, again.times.t, rtol=0, atol=0)
    torch.testing.assert_close(first.known, again.known)
    assert bool((first.times.t != other.times.t).any())
    torch.testing.assert_close(first.role, other.role)


@pytest.mark.parametrize("name", ["off_diagonal", "anchor", "anchor_gap", "boundary", "final", "ladder", "clean"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_shares_outside_the_unit_interval_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"objective.{name}"):
        dataclasses.replace(MIXED, **{name: value})


def test_every_loss_of_the_config_exists() -> None:
    names = get_args(ObjectiveConfig.__dataclass_fields__["loss"].type)
    assert set(names) == set(OFF_DIAGONAL)


# ---- the loss of a batch


def batch(config: ObjectiveConfig, size: int = 48, seed: int = 11) -> tuple[Tensor, Tensor, Plan, float]:
    generator = seeded(seed)
    tokens = JOINT.sample(size, generator)
    noise = torch.randn((size, 3, 3), generator=generator, dtype=torch.float64)
    drawn = plan(config, warp(3), size, 3, generator)
    return tokens, noise, drawn, float((~drawn.known).sum())


Loss = Literal["psd", "lsd", "lsd_kl", "esd", "ecld"]


@pytest.mark.parametrize("loss", get_args(Loss))
@pytest.mark.parametrize("teacher", [None, TEACHER], ids=["joint", "distilled"])
def test_micro_batches_add_up_to_the_batch(loss: Loss, teacher: FlowMap | None) -> None:
    """Blocks of 7 rows, some without one of the roles, and single rows: totals, gradients and counts are the same."""
    config = ObjectiveConfig(loss=loss, off_diagonal=0.5, clean=0.5)
    tokens, noise, drawn, normaliser = batch(config)

    def loss_of(index: Tensor) -> tuple[BatchLoss, Tensor]:
        theta = torch.full((3, 3), 0.3, dtype=torch.float64, requires_grad=True)
        rows = drawn.rows(index)
        result = batch_loss(student(theta), teacher, config, tokens[index], noise[index], rows, normaliser)
        return result, torch.autograd.grad(result.total, theta)[0]

    whole, gradient = loss_of(torch.arange(48))
    for size in (7, 1):
        parts, gradients = zip(*(loss_of(index) for index in torch.arange(48).split(size)), strict=True)
        torch.testing.assert_close(torch.stack([part.total for part in parts]).sum(), whole.total)
        torch.testing.assert_close(torch.stack(gradients).sum(0), gradient)
        torch.testing.assert_close(torch.stack([part.sums for part in parts]).sum(0), whole.sums)
        torch.testing.assert_close(torch.stack([part.counts for part in parts]).sum(0), whole.counts)
        torch.testing.assert_close(torch.cat([part.squared_error for part in parts]), whole.squared_error)
        torch.testing.assert_close(torch.cat([part.diagonal_times for part in parts]), whole.diagonal_times)
    assert whole.counts.sum().item() == normaliser
    assert whole.total.item() == pytest.approx(whole.sums.sum().item() / normaliser, rel=1e-6)
    assert bool((whole.sums > 0).all())


def role_rows(drawn: Plan, role: int) -> tuple[Tensor, Pair, Tensor]:
    """Indices, times with clean positions at 1, and the mask of noisy positions of a role's rows."""
    rows = (drawn.role == role).nonzero()[:, 0]
    known = drawn.known[rows]
    return rows, Pair(*(torch.where(known, 1.0, time[rows]) for time in drawn.times)), ~known


def test_base_loss_is_the_mean_cross_entropy_of_noisy_positions() -> None:
    config = ObjectiveConfig(clean=0.5)
    tokens, noise, drawn, normaliser = batch(config)
    result = batch_loss(student(), None, config, tokens, noise, drawn, normaliser)
    times = torch.where(drawn.known, 1.0, drawn.times.t)
    state = interpolate(tokens, noise, times)
    log_mu = student().log_endpoint(state, times, times)
    noisy = ~drawn.known
    right = log_mu.gather(-1, tokens[..., None])[..., 0]
    assert result.total.item() == pytest.approx(-right[noisy].mean().item(), rel=1e-6)
    error = (torch.nn.functional.one_hot(tokens, 3) - log_mu.exp()).square().sum(-1)
    torch.testing.assert_close(result.squared_error, (error * noisy).sum(1) / noisy.sum(1))
    torch.testing.assert_close(result.diagonal_times, drawn.times.t[:, 0])


@pytest.mark.parametrize("loss", get_args(Loss))
@pytest.mark.parametrize("average", [None, 0.8], ids=["map", "average"])
@pytest.mark.parametrize("teacher", [None, TEACHER], ids=["joint", "distilled"])
def test_every_role_gets_its_own_loss_and_teacher(loss: Loss, teacher: FlowMap | None, average: float | None) -> None:
    config = ObjectiveConfig(loss=loss, off_diagonal=0.6, clean=0.5)
    tokens, noise, drawn, normaliser = batch(config, seed=12)
    own = student() if average is None else student(average)
    result = batch_loss(student(), teacher, config, tokens, noise, drawn, normaliser, None if average is None else own)
    guide = teacher or own
    for role in (DIAGONAL, OFF_DIAGONAL_ROW, ANCHOR):
        rows, times, noisy = role_rows(drawn, role)
        state, weight = interpolate(tokens[rows], noise[rows], times.s), noisy.double()
        if role == ANCHOR:
            expected = anchor(student(), guide, state, times, weight)
        elif role == OFF_DIAGONAL_ROW:
            expected = OFF_DIAGONAL[loss](student(), own if loss == "psd" else guide, state, times, weight)
        elif teacher is None:
            expected = endpoint_cross_entropy(student(), state, times.t, tokens[rows], weight)
        else:
            expected = soft_cross_entropy(student(), teacher, state, times.t, weight)
        torch.testing.assert_close(result.sums[role], expected.total)
        assert result.counts[role].item() == noisy.sum().item()
    assert (len(result.squared_error) == 0) == (teacher is not None)


def test_soft_targets_are_least_at_the_teacher() -> None:
    config = ObjectiveConfig()
    tokens, noise, drawn, normaliser = batch(config)

    def value(theta: Tensor | float) -> Tensor:
        return batch_loss(student(theta), TEACHER, config, tokens, noise, drawn, normaliser).total

    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    least = value(theta)
    assert least.item() == pytest.approx(0, abs=1e-9)
    assert torch.autograd.grad(least, theta)[0].item() == pytest.approx(0, abs=1e-9)
    assert min(value(-0.2).item(), value(0.2).item()) > 1e-3


# ---- collapse


def test_collapse_has_a_price() -> None:
    """A map that is the unigram for every s < t satisfies PSD and the diagonal; anchors alone price it."""
    chain = random_chain(8, 6, seed=1, spread=1.0)
    generator, size = seeded(13), 256
    tokens = chain.sample(size, generator)
    noise = torch.randn((size, 6, 8), generator=generator, dtype=torch.float64)
    unigram = torch.nn.functional.one_hot(chain.sample(5000, generator), 8).double().mean((0, 1))

    def values(config: ObjectiveConfig) -> tuple[float, float]:
        drawn = plan(config, warp(8), size, 6, seeded(14))
        count = float((~drawn.known).sum())
        maps = ConstantMap(chain, unigram), ExactMap(chain, steps=32)
        with torch.no_grad():
            collapsed, exact = (
                batch_loss(FlowMap(m), FlowMap(chain), config, tokens, noise, drawn, count).total for m in maps
            )
        return collapsed.item(), exact.item()

    collapsed, exact = values(MIXED)
    assert 0 <= exact < 1e-3
    assert collapsed - exact > 0.1
    collapsed, exact = values(dataclasses.replace(MIXED, anchor=0.0))
    assert collapsed < 1e-9


def test_uniform_law_is_accepted_too() -> None:
    drawn = plan(MIXED, uniform(), 32, 4, seeded(15))
    assert bool((drawn.times.s <= drawn.times.t).all())
