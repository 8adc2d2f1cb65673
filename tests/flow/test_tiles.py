"""Tiles change nothing: losses, gradients, states and trajectories are those of the whole, for any size of a tile."""

import gc
import itertools
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Literal

import pytest
import torch
from oracle import seeded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from catmaps.flow.finite_step import finite_step_bound, step_costs
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.guidance import Guided, Nucleus, Unprompted
from catmaps.flow.interpolant import Combination, OneHot, advance, interpolate, move, renoise
from catmaps.flow.likelihood import nelbo
from catmaps.flow.losses import OFF_DIAGONAL, anchor, endpoint_cross_entropy, soft_cross_entropy
from catmaps.flow.noise import Noise, RowStreams
from catmaps.flow.reduction import TokenLoss
from catmaps.flow.samplers import SAMPLERS, UNHELD_STEPS, sample
from catmaps.flow.times import Pair, grid, uniform, warp
from catmaps.model import build_network
from catmaps.network.denoiser import FlowNetwork, NetworkConfig
from catmaps.tiles import Fusion, Tile, split
from catmaps.weights import Weight

B, L, V, D = 3, 5, 48, 16
Mode = Literal["belief", "linear"]
MODES: list[tuple[Mode, bool]] = [("belief", True), ("belief", False), ("linear", False), ("linear", True)]
LOSSES = ["endpoint", "soft", "anchor", *OFF_DIAGONAL]


def network(mode: Mode, skip: bool, seed: int = 0, tile: int = 10**9) -> FlowNetwork:
    torch.manual_seed(seed)
    config = NetworkConfig(width=D, blocks=2, heads=2, conditioning=8, input=mode, skip=skip)
    net = build_network(config, torch.randn(V, generator=seeded(1)).log_softmax(-1))
    for parameter in net.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=seeded(seed + 2)))
    net.tile = tile
    return net


def times() -> Pair:
    """Rows with and without a clean prefix."""
    s, t = torch.rand(2, B, 1, generator=seeded(5)).sort(0).values * 0.9
    known = torch.arange(L) < torch.tensor([[0], [2], [0]])
    s, u, t = (torch.where(known, 1.0, time) for time in (s, (s + t) / 2, t))
    return Pair(s, u, t)


def loss_of(name: str, net: FlowNetwork, teacher: FlowNetwork, held: bool) -> TokenLoss:
    tokens = torch.randint(V, (B, L), generator=seeded(3))
    noise, pair = Noise.of((7, 8), torch.arange(B), L, V), times()
    weight = (pair.s < 1).float() / 11
    state = interpolate(tokens, noise.x if held else noise, pair.s)
    flow_map, guide = FlowMap(net), FlowMap(teacher)
    if name == "endpoint":
        return endpoint_cross_entropy(flow_map, state, pair.s, tokens, weight)
    if name == "soft":
        return soft_cross_entropy(flow_map, guide, state, pair.s, weight)
    return (anchor if name == "anchor" else OFF_DIAGONAL[name])(flow_map, guide, state, pair, weight)


def same_table(net: FlowNetwork, teacher: FlowNetwork) -> None:
    """A projecting student looks at noise through its teacher's table."""
    teacher.embedding.table.weight.data.copy_(net.embedding.table.weight)
    net.embedding.table.weight.requires_grad_(False)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("mode", "skip"), MODES)
@pytest.mark.parametrize("tile", [1, 2 * V, 7 * V])
def test_tiled_losses_and_gradients_are_those_of_the_whole(name: str, mode: Mode, skip: bool, tile: int) -> None:
    # Where x is projected, noise that is held would be another draw: both sides then go without it.
    held = mode == "belief" or skip
    results = []
    for numbers in (10**9, tile):
        net, teacher = (network(mode, skip, seed, numbers) for seed in (0, 9))
        teacher.requires_grad_(False)
        if not held and name != "endpoint":
            same_table(net, teacher)
        loss = loss_of(name, net, teacher, held and numbers > tile)
        (3 * loss.total).backward()
        results.append((loss, {n: p.grad for n, p in net.named_parameters() if p.grad is not None}))
    (whole, gradients), (tiled, parts) = results
    torch.testing.assert_close(tiled.total, whole.total, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(tiled.values, whole.values, rtol=2e-4, atol=1e-5)
    assert (tiled.squared_error is None) == (whole.squared_error is None)
    assert set(parts) == set(gradients)
    for key, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(parts[key], gradient, rtol=1e-3, atol=2e-5 * scale + 1e-9, msg=key)


@pytest.mark.parametrize(("mode", "skip"), MODES)
def test_gradients_of_bf16_products_are_added_up_in_fp32(mode: Mode, skip: bool) -> None:
    """One position a tile: 15 parts, each with the rounding of a product and none with that of a sum."""
    results = []
    for numbers in (10**9, 1):
        net, teacher = (network(mode, skip, seed, numbers) for seed in (0, 9))
        net.precision = torch.bfloat16
        loss_of("endpoint", net, teacher, (mode == "belief" or skip) and numbers > 1).total.backward()
        results.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    whole, tiled = results
    assert set(whole) == set(tiled)
    for name in ("head.weight", "embedding.table.weight"):
        assert tiled[name].dtype == torch.float32
        scale = whole[name].abs().max().item()
        torch.testing.assert_close(tiled[name], whole[name], rtol=0.05, atol=0.02 * scale, msg=name)


def test_sums_of_gradients_keep_the_dtype_of_their_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catmaps.weights.AT_ONCE", 7)  # a few rows at a time, the last ones fewer
    wide, single = Weight.of(torch.zeros(5, 3), torch.zeros(5, 3).bfloat16()), Weight.plain(torch.zeros(()))
    parts = [torch.randn(5, 3, generator=seeded(i)).bfloat16() for i in range(20)]
    for i, part in enumerate(parts):
        wide.add(part)
        single.add(None if i else torch.ones(()))  # a tile in which it was unused adds nothing
    assert wide.total is not None
    assert single.total is not None
    assert wide.total.dtype == torch.float32
    torch.testing.assert_close(wide.total, torch.stack(parts).double().sum(0).float(), rtol=1e-6, atol=1e-6)
    assert single.total.item() == 1


@pytest.mark.parametrize("shape", [(11, 3), (3, 11)])
def test_products_add_the_gradient_of_their_weight(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catmaps.weights.AT_ONCE", 7)
    parameter = torch.randn(shape, generator=seeded(0)).requires_grad_()
    weight = Weight.of(parameter, parameter)
    x = torch.randn(2, 2, 4, shape[1], generator=seeded(1)).requires_grad_()
    upstream = torch.randn(2, 2, 4, shape[0], generator=seeded(2))
    for part, above in zip(x, upstream, strict=True):
        (own,) = torch.autograd.grad(weight.product(part), part, above)
        torch.testing.assert_close(own, above @ parameter)
    expected = torch.einsum("kblo,kbli->oi", upstream, x)
    torch.testing.assert_close(weight.take(), expected, rtol=1e-5, atol=1e-6)
    assert weight.total is None


@pytest.mark.parametrize("mode", ["belief", "linear"])
def test_forgotten_casts_are_made_of_the_weights_of_the_present(mode: Mode) -> None:
    """Weights changed behind their versions, as fused optimisers and gathers change them."""
    tokens = torch.randint(V, (B, L), generator=seeded(3))
    state = interpolate(tokens, Noise.of((7, 8), torch.arange(B), L, V), times().s)

    @torch.no_grad()
    def logits(net: FlowNetwork) -> Tensor:
        return FlowMap(net).logits(state, times().s, times().s)

    net, other = (network(mode, False, seed, 7 * V) for seed in (0, 4))
    for one in (net, other):
        one.precision = torch.bfloat16
    before = logits(net)
    for own, value in zip(net.parameters(), other.parameters(), strict=True):
        own.data.copy_(value)
    net.forget_casts()
    assert torch.equal(logits(net), logits(other))
    assert not torch.equal(logits(net), before)


def test_tiles_cover_every_position_once() -> None:
    for batch, length, numbers in itertools.product((1, 3), (1, 4, 7), (1, 13, 50, 10**6)):
        tiles = list(split(batch, length, 10, numbers))
        value = torch.arange(batch * length).view(batch, length)
        assert torch.cat([tile(value).flatten() for tile in tiles]).tolist() == list(range(batch * length))
        assert all((tile.stop - tile.start) * 10 <= max(numbers, 10) for tile in tiles)


def test_combinations_are_the_states_that_they_stand_for() -> None:
    tokens, noise = torch.randint(V, (B, L), generator=seeded(3)), Noise.of((1, 2), torch.arange(B), L, V)
    s, t = times().s, torch.rand(B, L, generator=seeded(4))
    other, ends = Noise.of((1, 3), torch.arange(B), L, V), torch.rand(B, L, V, generator=seeded(6))
    gamma = torch.rand(B, 1, generator=seeded(8))
    dense, lazy = interpolate(tokens, noise.x, s), interpolate(tokens, noise, s)
    assert isinstance(lazy, Combination)
    pairs = [
        (dense, lazy),
        (advance(dense, ends, gamma), advance(lazy, ends, gamma)),
        (move(dense, ends, gamma), move(lazy, ends, gamma)),
        (renoise(dense, s, s * t, other.x), renoise(lazy, s, s * t, other)),
    ]
    for held, made in pairs:
        torch.testing.assert_close(made.x, held.x, rtol=1e-5, atol=1e-6)
        for tile in split(B, L, V, 4 * V):
            torch.testing.assert_close(made.cut(tile).x, held.cut(tile).x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(OneHot(tokens, V).x.argmax(-1), tokens)


class Widest(TorchDispatchMode):
    """Counts the numbers of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0
        self.wide: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore  # noqa: ANN001, ANN204
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else (made,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage().size() // max(1, value.element_size())
                self.numbers = max(self.numbers, storage)
                if value.dim() == 3 and value.shape[-1] == WIDE:
                    self.wide.append(weakref.ref(value))
        return made


def biggest(work: object, *args: object) -> int:
    with Widest() as seen:
        assert callable(work)
        work(*args)
    return seen.numbers


WIDE, MANY = 4000, 24  # vocabulary, positions of a text: two texts make 192,000 numbers
SHORT = 8  # positions of a text that fits in a tile


def wide_network(mode: Mode) -> FlowNetwork:
    torch.manual_seed(0)
    config = NetworkConfig(width=16, blocks=1, heads=2, conditioning=8, input=mode, skip=mode == "belief")
    net = build_network(config, torch.zeros(WIDE).log_softmax(-1))
    net.tile = 6 * WIDE
    return net


@pytest.mark.parametrize("mode", ["belief", "linear"])
@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_makes_a_vocabulary_sized_tensor_of_the_whole_batch(mode: Mode, name: str) -> None:
    net, teacher = wide_network(mode), wide_network(mode).requires_grad_(False)
    if mode == "linear" and name != "endpoint":
        same_table(net, teacher)
    tokens = torch.randint(WIDE, (2, MANY), generator=seeded(3))
    noise = FlowMap(net).noise((1, 2), torch.arange(2), MANY)
    s, u, t = (torch.full((2, 1), time) for time in (0.2, 0.4, 0.6))
    weight = torch.full((2, MANY), 0.1)

    def step() -> None:
        state = interpolate(tokens, noise, s)
        flow_map, guide = FlowMap(net), FlowMap(teacher)
        if name == "endpoint":
            loss = endpoint_cross_entropy(flow_map, state, s, tokens, weight)
        elif name == "soft":
            loss = soft_cross_entropy(flow_map, guide, state, s, weight)
        else:
            loss = (anchor if name == "anchor" else OFF_DIAGONAL[name])(flow_map, guide, state, Pair(s, u, t), weight)
        loss.total.backward()

    assert biggest(step) < 2 * MANY * WIDE


def test_nothing_vocabulary_sized_waits_for_the_backward_pass() -> None:
    net, tokens = wide_network("belief"), torch.randint(WIDE, (2, MANY), generator=seeded(3))
    s = torch.full((2, 1), 0.2)
    state = interpolate(tokens, Noise.of((1, 2), torch.arange(2), MANY, WIDE), s)
    with Widest() as seen:
        loss = endpoint_cross_entropy(FlowMap(net), state, s, tokens, torch.full((2, MANY), 0.1))
    gc.collect()
    assert len(seen.wide) > 8
    assert not [x for x in (made() for made in seen.wide) if x is not None]
    loss.total.backward()


@pytest.mark.parametrize("mode", ["belief", "linear"])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_no_sampler_makes_a_vocabulary_sized_tensor_of_the_whole_batch(mode: Mode, name: str) -> None:
    flow_map = FlowMap(wide_network(mode).requires_grad_(False))
    times_ = torch.tensor([0.0, 0.4, 0.7, 1.0])

    def draw() -> None:
        tokens = sample(flow_map, SAMPLERS[name], times_, (2, MANY, WIDE), generator=seeded(1))
        assert tokens.shape == (2, MANY)

    assert biggest(draw) < 2 * MANY * WIDE


@pytest.mark.parametrize("mode", ["belief", "linear"])
def test_no_bound_makes_a_vocabulary_sized_tensor_of_the_whole_batch(mode: Mode) -> None:
    flow_map, tokens, law = FlowMap(wide_network(mode)), torch.randint(WIDE, (2, MANY), generator=seeded(3)), uniform()
    assert biggest(lambda: nelbo(flow_map, tokens, law, num_samples=4, generator=seeded(1))) < 2 * MANY * WIDE
    times_ = torch.tensor([0.0, 0.5, 1.0])
    assert biggest(lambda: finite_step_bound(flow_map, tokens, times_, generator=seeded(1))) < 2 * MANY * WIDE
    assert biggest(lambda: step_costs(flow_map, tokens, times_, generator=seeded(1))) < 2 * MANY * WIDE


@pytest.mark.parametrize(("mode", "skip"), MODES)
def test_tiled_bounds_are_those_of_one_tile(mode: Mode, skip: bool) -> None:
    tokens, known = torch.randint(V, (B, L), generator=seeded(3)), times().s == 1
    bounds, costs = [], []
    for numbers in (B * L * V - 1, 4 * V):
        flow_map = FlowMap(network(mode, skip, tile=numbers))
        given = {"known": known, "generator": seeded(2)}
        bounds.append(nelbo(flow_map, tokens, uniform(), num_samples=4, **given))
        bounds.append(finite_step_bound(flow_map, tokens, grid(warp(V), 3), **given))
        costs.append(step_costs(flow_map, tokens, grid(warp(V), 3), **given))
    for whole, tiled in zip(bounds[:2], bounds[2:], strict=True):
        torch.testing.assert_close(tiled.per_token, whole.per_token, rtol=1e-4, atol=1e-4)
        assert bool((whole.per_token[known] == 0).all())
    torch.testing.assert_close(costs[1], costs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize(("mode", "skip"), MODES)
def test_tiled_samples_are_those_of_one_tile(name: str, mode: Mode, skip: bool) -> None:
    tokens, known = torch.randint(V, (B, L), generator=seeded(3)), times().s == 1
    drawn = []
    for numbers in (B * L * V - 1, 4 * V):
        flow_map = FlowMap(network(mode, skip, tile=numbers).requires_grad_(False))
        given = {"tokens": tokens, "known": known, "generator": seeded(2)}
        drawn.append(sample(flow_map, SAMPLERS[name], grid(warp(V), 3), (B, L, V), **given))
        assert torch.equal(drawn[-1][known], tokens[known])
    assert torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("steps", [3, 12])
def test_texts_carried_a_few_at_a_time_are_those_of_the_batch(name: str, by_row: bool, steps: int) -> None:
    """Who watches sees all texts together: the batch as one."""
    tokens, known = torch.randint(V, (B, L), generator=seeded(3)), times().s == 1
    net = network("belief", True, tile=2 * L * V).requires_grad_(False)
    drawn = []
    for watch in (None, lambda t, endpoint: None):
        for given in ({}, {"tokens": tokens, "known": known}):
            source = RowStreams(torch.tensor([4, 9, 2])) if by_row else seeded(2)
            flow_map = FlowMap(Guided(FlowMap(net), FlowMap(Unprompted(FlowMap(net), noise())), 1.5) if given else net)
            options = {**given, "generator": source, "watch": watch}
            drawn.append(sample(flow_map, SAMPLERS[name], grid(warp(V), steps), (B, L, V), **options))
    if by_row or steps <= UNHELD_STEPS or name not in ("renoise", "localisation"):
        # Longer, and from one generator, a batch that is held draws its later noise whole.
        assert torch.equal(drawn[0], drawn[2])
        assert torch.equal(drawn[1], drawn[3])
    assert torch.equal(drawn[1][known], tokens[known])


def noise() -> Tensor:
    return Noise.of((3, 4), torch.arange(B), L, V).x


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("steps", [3, 12])
def test_no_held_state_is_wider_than_a_few_texts(name: str, steps: int) -> None:
    """Five texts, a tile of two: guidance, a prompt and many steps hold no more."""
    net = wide_network("belief").requires_grad_(False)
    net.tile = 2 * SHORT * WIDE
    known = (torch.arange(SHORT) < 2).expand(5, -1)
    hidden = Unprompted(FlowMap(net), Noise.of((3, 4), torch.arange(5), SHORT, WIDE))
    flow_map = FlowMap(Nucleus(FlowMap(Guided(FlowMap(net), FlowMap(hidden), 1.5)), 0.9))

    def draw() -> None:
        given = {"tokens": known.long(), "known": known, "generator": seeded(1)}
        sample(flow_map, SAMPLERS[name], torch.linspace(0, 1, steps + 1), (5, SHORT, WIDE), **given)

    assert biggest(draw) <= 2 * SHORT * WIDE


def test_a_tile_remembers_what_it_cut() -> None:
    noise = Noise.of((1, 2), torch.arange(B), L, V)
    tile = Tile(B, L, 2, 6)
    assert tile(noise) is tile(noise)
    assert Tile(B, L, 0, B * L)(noise) is noise


def test_compiled_kernels_give_the_same_losses_and_gradients() -> None:
    # In a process of its own: the checks of shapes that tests run under cannot be compiled.
    folder = Path(__file__).parents[1]
    paths = os.pathsep.join([str(folder), str(folder / "flow"), str(folder.parent)])
    script = "import test_tiles; test_tiles.compare_compiled()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "compiled" in done.stdout


def compare_compiled() -> None:
    results = []
    for on in (False, True):
        Fusion.on = on
        net, teacher = network("belief", True, tile=7 * V), network("belief", True, seed=9).requires_grad_(False)
        loss = loss_of("psd", net, teacher, held=False)
        loss.total.backward()
        results.append((loss.total.detach(), net.head.weight.grad, net.embedding.table.weight.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-6)
    print("compiled kernels agree")
