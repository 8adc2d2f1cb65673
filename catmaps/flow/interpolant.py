"""The path from noise to text, x_t = (1 - t) x_0 + t x_1, and the algebra of one jump along it.

x_0 ~ N(0, I_V) at every position, x_1 is the one-hot of its token. Only this module and the network's embedding look
inside a `State`.

Source: Roos et al. 2026, arXiv:2602.12233; docs/maths.md eqs. (1)-(3).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, overload, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.flow.noise import Noise
from catmaps.tiles import Projection, Tile


@dataclass(frozen=True)
class State:
    """Noisy text x at some time per position: fp32 (fp64 in tests), shape (B, L, V)."""

    x: Float[Tensor, "b l v"]

    @property
    def batch_size(self) -> int:
        return self.x.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, length, vocab_size = self.x.shape
        return batch, length, vocab_size

    @property
    def requires_grad(self) -> bool:
        return self.x.requires_grad

    def __getitem__(self, rows: slice | Tensor) -> "State":
        """The state of some sequences of the batch."""
        return State(self.x[rows])

    def cut(self, tile: Tile) -> "State":
        return State(tile(self.x))

    def project(self, projection: Projection) -> Float[Tensor, "b l d"]:
        """x W."""
        return F.linear(self.x, projection.weight.to(self.x.dtype))


@runtime_checkable
class Source(Protocol):
    """V numbers at every position that can be made for any tile: noise, one-hots, endpoints."""

    if TYPE_CHECKING:  # a check at run time would ask for it, and asking makes it

        @property
        def x(self) -> Tensor: ...

    def cut(self, tile: Tile) -> "Source": ...
    def project(self, projection: Projection) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class OneHot:
    """The one-hots of tokens."""

    tokens: Int[Tensor, "b l"]
    vocab_size: int

    @property
    def x(self) -> Float[Tensor, "b l v"]:
        return F.one_hot(self.tokens, self.vocab_size).float()

    def cut(self, tile: Tile) -> "OneHot":
        return OneHot(tile(self.tokens), self.vocab_size)

    def project(self, projection: Projection) -> Float[Tensor, "b l d"]:
        return projection.columns(self.tokens)


def _when_added(term: tuple[Tensor, Source]) -> int:
    """Noise first: it is drawn into the sum itself. One-hots last: they touch one number a position."""
    return 0 if isinstance(term[1], Noise) else 2 if isinstance(term[1], OneHot) else 1


@dataclass(frozen=True, eq=False)
class Combination:
    """Noisy text that is not held: a sum over terms of a factor per position times a source.

    Along a trajectory x is always such a sum, of noises, one-hots and endpoints; a tile makes its share of x when it
    needs it, and a `linear` network sees x W without any x.
    """

    terms: tuple[tuple[Float[Tensor, "b l"], Source], ...]
    shape: tuple[int, int, int]
    requires_grad = False

    @property
    def batch_size(self) -> int:
        return self.shape[0]

    @property
    def x(self) -> Float[Tensor, "b l v"]:
        return self._made

    @cached_property
    def _made(self) -> Tensor:
        total = None
        for factor, source in sorted(self.terms, key=_when_added):
            if isinstance(source, OneHot) and total is not None:
                total.scatter_add_(-1, source.tokens[..., None], factor[..., None])
            elif total is None:
                total = source.x.mul_(factor[..., None]) if isinstance(source, Noise) else factor[..., None] * source.x
            else:
                total.add_(factor[..., None] * source.x)
        assert total is not None
        return total

    def cut(self, tile: Tile) -> "Combination":
        terms = tuple((tile(factor), tile(source)) for factor, source in self.terms)
        return self if tile.whole else Combination(terms, (1, tile.stop - tile.start, self.shape[2]))

    def project(self, projection: Projection) -> Float[Tensor, "b l d"]:
        """x W, or for noise its equal in law."""
        return sum((f[..., None] * source.project(projection) for f, source in self.terms), torch.zeros(()))

    def scaled(self, factor: Float[Tensor, "b l"], *more: tuple[Float[Tensor, "b l"], Source]) -> "Combination":
        """factor x + the sum of more terms; terms with factor 0 everywhere stay."""
        return Combination((*((factor * own, source) for own, source in self.terms), *more), self.shape)

    def pruned(self) -> "Combination":
        """Without terms that are 0 everywhere. Looks at the factors' values, which stalls an accelerator once."""
        return Combination(tuple(term for term in self.terms if bool((term[0] != 0).any())), self.shape)


AnyState = State | Combination


@overload
def combine(state: State, factor: Tensor, *more: tuple[Tensor, Tensor | Source]) -> State: ...
@overload
def combine(state: AnyState, factor: Tensor, *more: tuple[Tensor, Tensor | Source]) -> AnyState: ...
def combine(
    state: AnyState, factor: Float[Tensor, "b #l"], *more: tuple[Float[Tensor, "b #l"], Float[Tensor, "b l v"] | Source]
) -> AnyState:
    """factor x + the sum of factor x source over `more`."""
    terms = [(f, State(source) if isinstance(source, Tensor) else source) for f, source in more]
    if isinstance(state, Combination):
        wide = [(f.expand(state.shape[:2]), source) for f, source in terms]
        return state.scaled(factor.expand(state.shape[:2]), *wide)
    return State(sum((f[..., None] * source.x for f, source in terms), factor[..., None] * state.x))


def step_fraction(s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]) -> Float[Tensor, "b #l"]:
    """gamma = (t - s) / (1 - s) in [0, 1], the share of the remaining way that the jump s -> t covers; 0 where s = 1.

    Source: docs/maths.md eq. (2).
    """
    rest = 1 - s
    clean = rest <= 0
    return torch.where(clean, torch.zeros_like(rest), (t - s) / torch.where(clean, torch.ones_like(rest), rest))


def root_snr(t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """u = t / (1 - t), the square root of the signal-to-noise ratio; infinite at t = 1."""
    return t / (1 - t)


def gaussian(
    shape: tuple[int, int, int], generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> State:
    """A state of pure noise x_0 ~ N(0, I_V), shape (B, L, V), on the generator's device."""
    device = generator.device if generator is not None else None
    return State(torch.randn(shape, generator=generator, device=device, dtype=dtype))


@overload
def interpolate(tokens: Tensor, noise: Tensor, t: Tensor) -> State: ...
@overload
def interpolate(tokens: Tensor, noise: Noise, t: Tensor) -> Combination: ...
@overload
def interpolate(tokens: Tensor, noise: Tensor | Noise, t: Tensor) -> AnyState: ...
def interpolate(
    tokens: Int[Tensor, "b l"], noise: Float[Tensor, "b l v"] | Noise, t: Float[Tensor, "b #l"]
) -> AnyState:
    """x_t = (1 - t) noise + t onehot(tokens), at one time per position; held where the noise is.

    Source: docs/maths.md eq. (1).
    """
    if isinstance(noise, Noise):
        t = t.expand(tokens.shape)
        return Combination(((1 - t, noise), (t, OneHot(tokens, noise.vocab_size))), noise.shape)
    x = (1 - t)[..., None] * noise
    return State(x.scatter_add(-1, tokens[..., None], t.to(noise.dtype).expand(tokens.shape)[..., None]))


@overload
def advance(state: State, endpoint: Tensor | Source, gamma: Tensor) -> State: ...
@overload
def advance(state: AnyState, endpoint: Tensor | Source, gamma: Tensor) -> AnyState: ...
def advance(state: AnyState, endpoint: Float[Tensor, "b l v"] | Source, gamma: Float[Tensor, "b #l"]) -> AnyState:
    """The jump x + gamma (endpoint - x) with gamma = `step_fraction(s, t)`: eq. (2)."""
    if isinstance(state, Combination):
        return combine(state, 1 - gamma, (gamma, endpoint))
    end = endpoint if isinstance(endpoint, Tensor) else endpoint.x
    return State(torch.lerp(state.x, end.to(state.x.dtype), gamma[..., None].to(state.x.dtype)))


@overload
def move(state: State, endpoint: Tensor | Source, scale: Tensor) -> State: ...
@overload
def move(state: AnyState, endpoint: Tensor | Source, scale: Tensor) -> AnyState: ...
def move(state: AnyState, endpoint: Float[Tensor, "b l v"] | Source, scale: Float[Tensor, "b #l"]) -> AnyState:
    """scale (endpoint - x): the velocity of the state towards an endpoint, eq. (3) with scale = 1 / (1 - t)."""
    if isinstance(state, Combination):
        return combine(state, -scale, (scale, endpoint))
    return State(scale[..., None] * ((endpoint if isinstance(endpoint, Tensor) else endpoint.x) - state.x))


@overload
def renoise(state: State, t: Tensor, t_new: Tensor, noise: Tensor | Noise, variance: float = 1.0) -> State: ...
@overload
def renoise(state: AnyState, t: Tensor, t_new: Tensor, noise: Tensor | Noise, variance: float = 1.0) -> AnyState: ...
def renoise(
    state: AnyState,
    t: Float[Tensor, "b #l"],
    t_new: Float[Tensor, "b #l"],
    noise: Float[Tensor, "b l v"] | Noise,
    variance: float = 1.0,
) -> AnyState:
    """Carries a state back from time t to an earlier t_new by adding fresh noise; its marginal law stays the path's.

    x_{t'} = (t'/t) x_t + sqrt((1 - t')^2 - (t'/t)^2 (1 - t)^2) noise; positions with t_new = t do not change. Another
    `variance` than 1 multiplies that of the noise, and leaves the path.

    Source: docs/maths.md eq. (13).
    """
    ratio = torch.where(t > 0, t_new / torch.where(t > 0, t, torch.ones_like(t)), torch.ones_like(t))
    deviation = (variance * ((1 - t_new).square() - (ratio * (1 - t)).square()).clamp_min(0)).sqrt()
    return combine(state, ratio, (deviation, noise))


@overload
def clamp_known(state: State, tokens: Tensor | None, known: Tensor | None) -> State: ...
@overload
def clamp_known(state: AnyState, tokens: Tensor | None, known: Tensor | None) -> AnyState: ...
def clamp_known(state: AnyState, tokens: Int[Tensor, "b l"] | None, known: Bool[Tensor, "b l"] | None) -> AnyState:
    """Replaces the known positions by their clean one-hot: time 1. Others are untouched."""
    if known is None or tokens is None:
        return state
    if isinstance(state, Combination):
        clean = known.to(state.terms[0][0].dtype)
        return state.scaled(1 - clean, (clean, OneHot(tokens, state.shape[2])))
    onehot = torch.zeros_like(state.x).scatter_(-1, tokens[..., None], 1.0)
    return State(torch.where(known[..., None], onehot, state.x))
