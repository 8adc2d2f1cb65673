"""Vocabulary-sized work in tiles of positions, so that no (B, L, V) tensor need exist; torch only.

A tile is a run of positions of the flattened batch. What lives at every position, tensors, states, noise, endpoints,
can be cut to it; a cut has one row of n positions, so code for (B, L, ...) serves whole batches and tiles alike.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, overload, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

NUMBERS = 2**25
"""Default size of a tile: positions x vocabulary, 128 MiB of fp32. A few such tensors live at a time."""


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


def over_tiles(
    work: Callable[[Tile], Shaped[Tensor, "_ n d"]], batch: int, length: int, vocab_size: int, numbers: int
) -> Shaped[Tensor, "b l d"]:
    """Joins narrow results of vocabulary-sized work. With gradients each tile is done again in the backward pass."""
    tiles = list(split(batch, length, vocab_size, numbers))
    if len(tiles) == 1:
        return work(tiles[0])

    def forgetful(tile: Tile) -> Tensor:
        return work(replace(tile, memory={}))  # what a tile remembers would else live until the backward pass

    if torch.is_grad_enabled():
        parts = [checkpoint(forgetful, tile, use_reentrant=False, preserve_rng_state=False) for tile in tiles]
    else:
        parts = [forgetful(tile) for tile in tiles]
    return torch.cat(parts, 1).unflatten(1, (batch, length))[0]


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
