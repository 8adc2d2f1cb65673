"""Vocabulary-sized work in tiles of positions, so that no (B, L, V) tensor need exist; torch only.

A tile is a run of positions of the flattened batch. What lives at every position, tensors, states, noise, endpoints,
can be cut to it; a cut has one row of n positions, so code for (B, L, ...) serves whole batches and tiles alike.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, overload, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

NUMBERS = 31 * 2**18
"""Default size of a tile: positions x vocabulary, 31 MiB of fp32. A few such tensors live at a time."""
ADDED_AT_ONCE = 2**20
"""Numbers that are brought to a wider dtype at a time where gradients are added."""


@runtime_checkable
class Cuttable(Protocol):
    """Something that lives at every position and can be cut to a tile."""

    def cut(self, tile: "Tile") -> Any: ...


C = TypeVar("C", bound=Cuttable)


@dataclass(frozen=True, eq=False)
class Tile:
    """Positions `start` to `stop` of a flattened batch of B x L. It remembers cuts, which are often asked for twice."""

    batch: int
    length: int
    start: int
    stop: int
    memory: dict[int, tuple[Any, Any]] = field(default_factory=dict, repr=False)

    @property
    def whole(self) -> bool:
        return self.stop - self.start == self.batch * self.length

    @overload
    def __call__(self, value: Tensor) -> Tensor: ...
    @overload
    def __call__(self, value: C) -> C: ...
    def __call__(self, value: Any) -> Any:
        """The share of a tensor (B, 1 or L, ...), or of anything cuttable, as one row; all of it in a whole tile."""
        if self.whole:
            return value
        if isinstance(value, Tensor):
            wide = value.expand(-1, self.length, *value.shape[2:])
            return wide.flatten(0, 1)[self.start : self.stop][None]
        if id(value) not in self.memory:  # the value is kept beside its cut: an id is unique only while it lives
            self.memory[id(value)] = (value, value.cut(self))
        return self.memory[id(value)][1]


def split(batch: int, length: int, vocab_size: int, numbers: int) -> Iterator[Tile]:
    """Tiles of at most `numbers` numbers each (one position at least), of nearly equal size."""
    positions = batch * length
    parts = -(-positions // max(1, numbers // vocab_size))
    each = -(-positions // parts)
    for start in range(0, positions, each):
        yield Tile(batch, length, start, min(start + each, positions))


class Weight(NamedTuple):
    """A parameter, and the leaf that stands for it in products: in bf16 where they are, so that gradients of many tiles
    are added up in fp32 without a copy of each."""

    parameter: Tensor
    leaf: Tensor

    @classmethod
    def of(cls, parameter: Tensor, cast: Tensor) -> "Weight":
        return cls(parameter, cast.detach().requires_grad_(parameter.requires_grad))


def add_gradients(
    totals: Sequence[Tensor | None], parts: Sequence[Tensor | None], weights: Sequence[Weight]
) -> list[Tensor | None]:
    """Running sums of gradients of leaves, in the dtypes of their parameters; sums of before are overwritten."""

    def added(total: Tensor | None, part: Tensor | None, weight: Weight) -> Tensor | None:
        if total is None or part is None:
            return total if part is None else part.to(weight.parameter.dtype)
        few = max(1, ADDED_AT_ONCE // max(1, part[:1].numel())) if part.ndim else 1
        for own, more in zip(torch.atleast_1d(total).split(few), torch.atleast_1d(part).split(few), strict=True):
            own.add_(more)  # of two dtypes: makes a copy in the wider one, here of a few rows
        return total

    return [added(*three) for three in zip(totals, parts, weights, strict=True)]


class _WeightedTiles(torch.autograd.Function):
    """`over_tiles` of work that depends on weights alone: tiles are done again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, work: Callable[..., Tensor], tiles: list[Tile], weights: list[Weight], *parameters: Tensor
    ) -> Tensor:
        del parameters  # the weights', which autograd has to see
        ctx.work, ctx.tiles, ctx.weights = work, tiles, weights
        return torch.cat([work(tile, *(w.leaf.detach() for w in weights)) for tile in tiles], 1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        weights, start = [w for w in ctx.weights if w.leaf.requires_grad], 0
        totals: list[Tensor | None] = [None] * len(weights)
        for tile in ctx.tiles:
            with torch.enable_grad():
                out = ctx.work(tile, *(w.leaf for w in ctx.weights))
            stop = start + out.shape[1]
            parts = torch.autograd.grad(out, [w.leaf for w in weights], upstream[0][:, start:stop], allow_unused=True)
            totals, start = add_gradients(totals, parts, weights), stop
        found = iter(totals)
        return (None, None, None, *(next(found) if w.leaf.requires_grad else None for w in ctx.weights))


def over_tiles(
    work: Callable[..., Shaped[Tensor, "_ n d"]],
    shape: tuple[int, int, int],
    numbers: int,
    weights: Sequence[tuple[Tensor, Tensor]] = (),
) -> Shaped[Tensor, "b l d"]:
    """Joins narrow results of vocabulary-sized work. With gradients each tile is done again in the backward pass.

    Args:
        work: (tile, *weights or *casts) -> the tile's results.
        shape: (B, L, V).
        numbers: Size of a tile.
        weights: (weight, its cast) of all that gradients are wanted of; if there are none, of whatever `work` sees.
    """
    tiles = list(split(*shape, numbers))
    given = [weight for weight, _ in weights]
    if len(tiles) == 1:
        return work(tiles[0], *given)

    def forgetful(tile: Tile, *leaves: Tensor) -> Tensor:
        return work(replace(tile, memory={}), *leaves)  # what a tile remembers would else live until the backward pass

    if not torch.is_grad_enabled():
        joined = torch.cat([forgetful(tile, *(cast for _, cast in weights)) for tile in tiles], 1)
    elif weights:
        joined = _WeightedTiles.apply(forgetful, tiles, [Weight.of(*weight) for weight in weights], *given)
        assert isinstance(joined, Tensor)
    else:
        parts = [checkpoint(forgetful, tile, use_reentrant=False, preserve_rng_state=False) for tile in tiles]
        joined = torch.cat(parts, 1)
    return joined.unflatten(1, shape[:2])[0]


class Projection(NamedTuple):
    """A linear map of V numbers to d, as what lives at a position is asked to apply it (`project`)."""

    weight: Float[Tensor, "d v"]
    """W'."""
    factor: Float[Tensor, "d d"]
    """C with C C' = W' W: n C' has the law of x_0 W for standard normal n and x_0."""
    cast: Float[Tensor, "d v"]
    """W' for products with endpoints, in the precision of the run, without gradient; noise and tokens stay in fp32."""


class Readout(NamedTuple):
    """What logits are made of at some positions: context + log prior + gain x, divided by a temperature."""

    context: Float[Tensor, "b l v"]
    """Of the precision of matrix products."""
    log_prior: Float[Tensor, "v"] | None = None
    gain: Float[Tensor, "b #l"] | None = None
    x: Float[Tensor, "b l v"] | None = None
    temperature: float = 1.0

    def logits(self) -> Float[Tensor, "b l v"]:
        """fp32, or fp64 where the context is. Inside a fused kernel they are never written out."""
        total = self.context.to(torch.promote_types(self.context.dtype, torch.float32))
        if self.log_prior is not None:
            total = total + self.log_prior
        if self.gain is not None and self.x is not None:
            total = total + self.gain[..., None] * self.x
        return total if self.temperature == 1 else total / self.temperature


class MovingReadout(NamedTuple):
    """A readout and its derivative along a direction in (x, s, t)."""

    now: Readout
    rate: Readout
    """What the derivative of the logits is made of while x is held."""
    dx: Float[Tensor, "b l v"] | None = None
    """Where x moves; seen through the gain of `now`."""

    def logits(self) -> tuple[Float[Tensor, "b l v"], Float[Tensor, "b l v"]]:
        """Logits and their derivative."""
        rate = self.rate.logits()
        if self.dx is not None and self.now.gain is not None:
            rate = rate + self.now.gain[..., None] * self.dx / self.now.temperature
        return self.now.logits(), rate

    def divided(self, temperature: float) -> "MovingReadout":
        """At a temperature."""
        now, rate = (part._replace(temperature=temperature) for part in (self.now, self.rate))
        return MovingReadout(now, rate, self.dx)


P = ParamSpec("P")
R = TypeVar("R")


class Fusion:
    """Whether `fused` kernels are compiled; off at first: compiling takes some ten seconds, longer than a short job."""

    on = False


def fused(kernel: Callable[P, R]) -> Callable[P, R]:
    """Compiles an elementwise or rowwise kernel while `Fusion.on`; its results are the same up to rounding."""
    compiled: list[Callable[P, R]] = []  # made when it is first wanted: the compiler is slow to import

    @wraps(kernel)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not Fusion.on:
            return kernel(*args, **kwargs)
        if not compiled:
            compiled.append(torch.compile(kernel, dynamic=True))
        return compiled[0](*args, **kwargs)

    return call
