"""The flow map over a denoiser: endpoint, jump, velocity, and the endpoint's derivative along time.

    mu_{s,t}(x) = softmax(net(x, s, t))           endpoint, in the simplex
    X_{s,t}(x)  = x + gamma (mu_{s,t}(x) - x)     flow map, gamma = (t - s) / (1 - s)                            (2)
    v_t(x)      = (mu_{t,t}(x) - x) / (1 - t)     velocity                                                       (3)

Source: Roos et al. 2026, arXiv:2602.12233; docs/maths.md eqs. (2), (3), (5).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol, overload, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from catmaps.flow.interpolant import AnyState, Combination, State, advance, step_fraction
from catmaps.flow.noise import Key, Noise, Randomness, Streams, random_key
from catmaps.tiles import MovingReadout, Projection, Readout, Tile, fused, over_tiles
from catmaps.weights import Weight


@runtime_checkable
class Denoiser(Protocol):
    """What the mathematics asks of a network. Hidden vectors are its own business; times are (B, 1) or (B, L)."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def tile(self) -> int:
        """Numbers of a tile of vocabulary-sized work."""
        ...

    @property
    def projects(self) -> bool:
        """Whether it sees no more of x than a projection to fewer dimensions."""
        ...

    def encode(self, state: AnyState, s: Tensor, t: Tensor) -> Tensor:
        """Hidden vectors of every position."""
        ...

    def encode_with_tangent(
        self, state: AnyState, s: Tensor, t: Tensor, ds: Tensor, dt: Tensor, dx: AnyState | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden vectors and their derivative along (dx, ds, dt)."""
        ...

    def readout(self, hidden: Tensor, state: AnyState, s: Tensor, t: Tensor) -> Readout:
        """Logits (B, L, V) of the endpoint mu_{s,t}, in parts; position by position: a tile is a batch of one row."""
        ...

    def readout_with_tangent(
        self,
        hidden: tuple[Tensor, Tensor],
        state: AnyState,
        times: tuple[Tensor, Tensor, Tensor, Tensor],
        dx: AnyState | None = None,
    ) -> MovingReadout:
        """`readout` and its derivative; times = (s, t, ds, dt)."""
        ...

    def readout_weights(self) -> AbstractContextManager[list[Weight]]:
        """What `readout` depends on besides its arguments; while this is open it is made of their leaves."""
        ...


@runtime_checkable
class ByRow(Protocol):
    """A denoiser that holds something of every text."""

    def rows(self, rows: slice) -> Denoiser:
        """The same for some rows of the batch."""
        ...


@fused
def _softmax(readout: Readout) -> Tensor:
    return readout.logits().softmax(-1)


@fused
def _unnormalised(readout: Readout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """mu times a factor, and that factor: one exponential an entry."""
    logits = readout.logits()
    weight = (logits - logits.amax(-1, keepdim=True)).exp()
    return weight.to(dtype), weight.sum(-1, keepdim=True)


@fused
def _argmax(readout: Readout) -> Tensor:
    """The first of the largest; two sweeps that vectorise, where a compiled argmax does not."""
    logits = readout.logits()
    index = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(logits == logits.amax(-1, keepdim=True), index, logits.shape[-1]).amin(-1)


@fused
def _log_softmax(readout: Readout) -> Tensor:
    return readout.logits().log_softmax(-1)


class Tangent(NamedTuple):
    """An endpoint and its derivative along a direction in (x, s, t), each (B, L, V)."""

    log_endpoint: Float[Tensor, "b l v"]
    endpoint: Float[Tensor, "b l v"]
    logit_rate: Float[Tensor, "b l v"]
    """dz - <mu, dz>: the derivative of log mu."""

    @property
    def endpoint_rate(self) -> Float[Tensor, "b l v"]:
        """d mu = mu (dz - <mu, dz>)."""
        return self.endpoint * self.logit_rate


@dataclass(frozen=True, eq=False)
class Endpoint:
    """mu_{s,t}(x) at every position, from hidden vectors: made when asked for, whole or in a tile's share."""

    flow_map: "FlowMap"
    hidden: Tensor
    state: AnyState
    s: Float[Tensor, "b #l"]
    t: Float[Tensor, "b #l"]
    learns: bool
    """Read under no_grad it stays without gradient wherever it is looked at."""

    @cached_property
    def readout(self) -> Readout:
        """What its logits are made of."""
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            readout = self.flow_map.denoiser.readout(self.hidden, self.state, self.s, self.t)
            return readout._replace(temperature=self.flow_map.temperature)

    @cached_property
    def log(self) -> Float[Tensor, "b l v"]:
        """log mu."""
        return _log_softmax(self.readout)

    @property
    def x(self) -> Float[Tensor, "b l v"]:
        """mu itself."""
        return self._made

    @cached_property
    def _made(self) -> Tensor:
        return _softmax(self.readout)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.state.shape

    def cut(self, tile: Tile) -> "Endpoint":
        s, t = tile(self.s), tile(self.t)
        return Endpoint(self.flow_map, tile(self.hidden), tile(self.state), s, t, self.learns)

    def likeliest(self) -> Int[Tensor, "b l"]:
        """The most probable token at every position."""
        tile = self.flow_map.denoiser.tile
        return over_tiles(lambda part: _argmax(part(self).readout)[..., None], self.shape, tile)[..., 0]

    def project(self, projection: Projection) -> Float[Tensor, "b l d"]:
        """mu W, without gradient; remembered, since every later state asks for it again."""
        own = projection.weight.data_ptr()
        if own not in self._projected:
            weight = projection.cast

            def work(tile: Tile) -> Tensor:
                mu, factor = _unnormalised(tile(self).readout, weight.dtype)
                return F.linear(mu, weight) / factor

            with torch.no_grad():
                self._projected[own] = over_tiles(work, self.state.shape, self.flow_map.denoiser.tile)
        return self._projected[own]

    @cached_property
    def _projected(self) -> dict[int, Tensor]:
        return {}

    def leaf(self) -> tuple["Endpoint", list[Weight]]:
        """The same from a leaf of the graph in place of what it was made of."""
        hidden = Weight.of(self.hidden, self.hidden)
        return Endpoint(self.flow_map, hidden.leaf, self.state, self.s, self.t, self.learns), [hidden]


@dataclass(frozen=True, eq=False)
class MovingEndpoint:
    """An endpoint and its derivative along (dx, ds, dt), as `Endpoint`."""

    flow_map: "FlowMap"
    hidden: tuple[Tensor, Tensor]
    state: AnyState
    times: tuple[Tensor, Tensor, Tensor, Tensor]
    dx: AnyState | None
    learns: bool

    @cached_property
    def readout(self) -> MovingReadout:
        """What its logits and their derivative are made of."""
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            readout = self.flow_map.denoiser.readout_with_tangent(self.hidden, self.state, self.times, self.dx)
            return readout.divided(self.flow_map.temperature)

    @property
    def tangent(self) -> Tangent:
        logits, rate = self.readout.logits()
        log_mu = logits.log_softmax(-1)
        mu = log_mu.exp()
        return Tangent(log_mu, mu, rate - (mu * rate).sum(-1, keepdim=True))

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.state.shape

    def cut(self, tile: Tile) -> "MovingEndpoint":
        hidden = (tile(self.hidden[0]), tile(self.hidden[1]))
        s, t, ds, dt = (tile(time) for time in self.times)
        dx = None if self.dx is None else tile(self.dx)
        return MovingEndpoint(self.flow_map, hidden, tile(self.state), (s, t, ds, dt), dx, self.learns)

    def still(self) -> Endpoint:
        """The endpoint alone, without gradient."""
        return Endpoint(self.flow_map, self.hidden[0].detach(), self.state, self.times[0], self.times[1], False)

    def leaf(self) -> tuple["MovingEndpoint", list[Weight]]:
        """As `Endpoint.leaf`."""
        hidden = [Weight.of(h, h) for h in self.hidden]
        pair = (hidden[0].leaf, hidden[1].leaf)
        return MovingEndpoint(self.flow_map, pair, self.state, self.times, self.dx, self.learns), hidden


@dataclass(frozen=True)
class FlowMap:
    """The two-time map of a denoiser. `temperature` divides the logits; 1 is the model itself."""

    denoiser: Denoiser
    temperature: float = 1.0

    def holds(self, batch: int, length: int) -> bool:
        """Whether x of so many positions is held: it fits in a tile, and the network looks at all of it."""
        return not self.denoiser.projects and batch * length * self.denoiser.vocab_size <= self.denoiser.tile

    def rows(self, rows: slice) -> "FlowMap":
        """The same map for some rows of a batch."""
        return replace(self, denoiser=self.denoiser.rows(rows)) if isinstance(self.denoiser, ByRow) else self

    def noise(self, key: Key, sample: Int[Tensor, "b"], length: int) -> Float[Tensor, "b l v"] | Noise:
        """x_0 of samples by their global index; held or made when needed, the same numbers."""
        noise = Noise.of(key, sample, length, self.denoiser.vocab_size)
        return noise.x if self.holds(len(sample), length) else noise

    def random_noise(
        self,
        shape: tuple[int, ...],
        generator: Randomness | None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        common: bool = False,
    ) -> Float[Tensor, "b l v"] | Noise:
        """x_0 of texts of shape (B, L) from a generator, on its device or `device`; one for all rows if `common`.

        Rows with streams of their own get the same numbers held and not held, in fp32.
        """
        batch, length = shape
        if isinstance(generator, Streams):
            noise = generator.noise(length, self.denoiser.vocab_size)
            return noise.x.to(dtype) if self.holds(batch, length) else noise
        device = generator.device if generator is not None else device
        if self.holds(batch, length):
            whole = (1 if common else batch, length, self.denoiser.vocab_size)
            return torch.randn(whole, generator=generator, dtype=dtype, device=device).expand(batch, -1, -1)
        sample = torch.arange(batch, device=device) * (not common)
        return Noise.of(random_key(generator), sample, length, self.denoiser.vocab_size)

    def read(self, state: AnyState, s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]) -> Endpoint:
        """mu_{s,t}(x) for a state x at time s, by one network call; its V numbers a position are made on demand."""
        return Endpoint(self, self.denoiser.encode(state, s, t), state, s, t, torch.is_grad_enabled())

    def read_with_tangent(
        self, state: AnyState, s: Tensor, t: Tensor, *, ds: Tensor, dt: Tensor, dx: AnyState | None = None
    ) -> MovingEndpoint:
        """mu_{s,t}(x) and its derivative along (dx, ds, dt), by the network's hand-written tangents."""
        hidden = self.denoiser.encode_with_tangent(state, s, t, ds, dt, dx)
        return MovingEndpoint(self, hidden, state, (s, t, ds, dt), dx, torch.is_grad_enabled())

    def logits(self, state: AnyState, s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]) -> Float[Tensor, "b l v"]:
        return self.read(state, s, t).readout.logits()

    def log_endpoint(
        self, state: AnyState, s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]
    ) -> Float[Tensor, "b l v"]:
        """log mu_{s,t}(x) for a state x at time s."""
        return self.read(state, s, t).log

    @overload
    def endpoint(self, state: State, s: Tensor, t: Tensor) -> Tensor: ...
    @overload
    def endpoint(self, state: AnyState, s: Tensor, t: Tensor) -> Tensor | Endpoint: ...
    def endpoint(self, state: AnyState, s: Tensor, t: Tensor) -> Tensor | Endpoint:
        """mu_{s,t}(x) for a state x at time s: (B, L, V), or where the state is not held itself unmade as well."""
        endpoint = self.read(state, s, t)
        return endpoint if isinstance(state, Combination) else endpoint.x

    def jump(self, state: State, s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]) -> State:
        """X_{s,t}(x): one network call."""
        return advance(state, self.endpoint(state, s, t), step_fraction(s, t))

    def velocity(self, state: State, t: Float[Tensor, "b #l"]) -> Float[Tensor, "b l v"]:
        """v_t(x); t < 1."""
        return (self.endpoint(state, t, t) - state.x) / (1 - t)[..., None]

    def endpoint_with_tangent(
        self, state: State, s: Tensor, t: Tensor, *, ds: Tensor, dt: Tensor, dx: Tensor | None = None
    ) -> Tangent:
        """`read_with_tangent`, made whole."""
        direction = None if dx is None else State(dx)
        return self.read_with_tangent(state, s, t, ds=ds, dt=dt, dx=direction).tangent


def positionwise(endpoint: Endpoint, work: Callable[[Tensor, Tile], Shaped[Tensor, "_ n"]]) -> Shaped[Tensor, "b l"]:
    """A number per position from log mu there, tile by tile."""
    tile = endpoint.flow_map.denoiser.tile
    return over_tiles(lambda tile: work(tile(endpoint).log, tile)[..., None], endpoint.shape, tile)[..., 0]
