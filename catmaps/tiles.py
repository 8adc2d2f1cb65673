"""Vocabulary-sized work in tiles of positions, so that no (B, L, V) tensor need exist; torch only.

A tile is a run of positions of the flattened batch. What lives at every position, tensors, states, noise, endpoints,
can be cut to it; a cut has one row of n positions, so code for (B, L, ...) serves whole batches and tiles alike.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, overload, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from catmaps.weights import Weight, add_gradients

NUMBERS = 25 * 2**18
"""Default size of a tile: positions x vocabulary, 25 MiB of fp32 or a text of 128 tokens at V = 50k. A few such tensors
live at a time."""


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

    def put(self, part: Shaped[Tensor, "_ n *d"], whole: Tensor | None) -> Shaped[Tensor, "_ m *d"]:
        """Copies a tile's values to their place among those of all positions; None: these are made."""
        if whole is None:
            whole = part.new_empty(1, self.batch * self.length, *part.shape[2:])
        whole[:, self.start : self.stop] = part
        return whole


def split(batch: int, length: int, vocab_size: int, numbers: int) -> Iterator[Tile]:
    """Tiles of at most `numbers` numbers each (one position at least), of nearly equal size."""
    positions = batch * length
    parts = -(-positions // max(1, numbers // vocab_size))
    each = -(-positions // parts)
    for start in range(0, positions, each):
        yield Tile(batch, length, start, min(start + each, positions))


def _joined(tiles: Sequence[Tile], part: Callable[[Tile], Tensor]) -> Tensor:
    """Results of tiles, each copied to its place at once: kept one by one between the tiles' large tensors they would
    cut up freed memory, so that the next large tensor finds no room there and memory grows with every tile."""
    joined = None
    for tile in tiles:
        joined = tile.put(part(tile), joined)
    assert joined is not None
    return joined


class _WeightedTiles(torch.autograd.Function):
    """`over_tiles` of work that depends on weights alone: tiles are done again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, work: Callable[..., Tensor], tiles: list[Tile], weights: list[Weight], *parameters: Tensor
    ) -> Tensor:
        del parameters  # the weights', which autograd has to see
        ctx.work, ctx.tiles, ctx.weights = work, tiles, weights
        still = [Weight.plain(w.leaf.detach()) for w in weights]
        return _joined(tiles, lambda tile: work(tile, *still))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        weights, start = [w for w in ctx.weights if w.leaf.requires_grad], 0
        for weight in weights:
            weight.valued = False
        for tile in ctx.tiles:
            with torch.enable_grad():
                out = ctx.work(tile, *ctx.weights)
            stop = start + out.shape[1]
            add_gradients(weights, out, upstream[0][:, start:stop])
            start = stop
        return (None, None, None, *(w.take() for w in ctx.weights))


def over_tiles(
    work: Callable[..., Shaped[Tensor, "_ n d"]],
    shape: tuple[int, int, int],
    numbers: int,
    weights: Sequence[tuple[Tensor, Tensor]] = (),
) -> Shaped[Tensor, "b l d"]:
    """Joins narrow results of vocabulary-sized work. With gradients each tile is done again in the backward pass.

    Args:
        work: (tile, *`Weight`s, as many as are given) -> the tile's results. A `Weight.product` is its last step: for
            the backward pass its values are not made again.
        shape: (B, L, V).
        numbers: Size of a tile.
        weights: (weight, its cast) of all that gradients are wanted of; if there are none, of whatever `work` sees.
    """
    tiles = list(split(*shape, numbers))
    given = [weight for weight, _ in weights]
    if len(tiles) == 1:
        seen = given if torch.is_grad_enabled() else [cast for _, cast in weights]
        return work(tiles[0], *map(Weight.plain, seen))

    def forgetful(tile: Tile, *some: Weight) -> Tensor:
        return work(replace(tile, memory={}), *some)  # what a tile remembers would else live until the backward pass

    if not torch.is_grad_enabled():
        still = [Weight.plain(cast) for _, cast in weights]
        joined = _joined(tiles, lambda tile: forgetful(tile, *still))
    elif weights:
        joined = _WeightedTiles.apply(forgetful, tiles, [Weight.of(*weight) for weight in weights], *given)
        assert isinstance(joined, Tensor)
    else:
        parts = [checkpoint(forgetful, tile, use_reentrant=False, preserve_rng_state=False) for tile in tiles]
        joined = torch.cat(parts, 1)
    return joined.unflatten(1, shape[:2])[0]


Looked = list[tuple[Tensor, Tensor]]
"""Tokens that were looked up in a table, and the gradients of their vectors."""


class Projection(NamedTuple):
    """A linear map of V numbers to d, as what lives at a position is asked to apply it (`project`)."""

    weight: Float[Tensor, "d v"]
    """W'."""
    factor: Float[Tensor, "d d"]
    """C with C C' = W' W: n C' has the law of x_0 W for standard normal n and x_0."""
    cast: Float[Tensor, "d v"]
    """W' for products with endpoints, in the precision of the run, without gradient; noise and tokens stay in fp32."""
    found: Looked | None = None
    """Where W learns: what the backward pass of looking up leaves for that of the factor to add."""

    def columns(self, tokens: Int[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        """The vectors of tokens."""
        if self.found is None:
            return self.weight[:, tokens].movedim(0, -1)
        return _Columns.apply(self.weight, tokens, self.found)  # pyright: ignore[reportReturnType]


class _Columns(torch.autograd.Function):
    """Columns of W. A tensor of W's size for the few that were looked up is not made: their gradients are kept."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, found: Looked) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.found = found
        return weight[:, tokens].movedim(0, -1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None, None]:
        ctx.found.append((*ctx.saved_tensors, upstream[0]))
        return None, None, None


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


TILE = "tile: "  # begins a kernel's name in profiles


def fused(kernel: Callable[P, R]) -> Callable[P, R]:
    """Compiles an elementwise or rowwise kernel while `Fusion.on`; its results are the same up to rounding."""
    compiled: list[Callable[P, R]] = []  # made when it is first wanted: the compiler is slow to import

    @wraps(kernel)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not Fusion.on:
            return kernel(*args, **kwargs)
        if not compiled:
            compiled.append(torch.compile(kernel, dynamic=True))
        with torch.profiler.record_function(f"{TILE}{kernel.__name__}"):
            return compiled[0](*args, **kwargs)

    return call
