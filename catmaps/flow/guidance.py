"""Denoisers made of flow maps: two in one (guidance), one without its prompt, one cut to its likeliest tokens.

Each is a `Denoiser` whose hidden vectors are its log endpoints, so that `FlowMap(Guided(strong, weak, 2.0))` goes
wherever a flow map goes: samplers, steering, refinement.

Source: docs/steering.md.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import AnyState, State
from catmaps.flow.noise import Noise
from catmaps.tiles import MovingReadout, Readout
from catmaps.weights import Weight


class Derived(ABC):
    """A denoiser by its log endpoints, normalised or not, and by their rates."""

    @abstractmethod
    def model(self) -> FlowMap:
        """The map that it is made of, or one of them."""

    @property
    def vocab_size(self) -> int:
        return self.model().denoiser.vocab_size

    @property
    def tile(self) -> int:
        return self.model().denoiser.tile

    @property
    def projects(self) -> bool:
        return False  # two networks do not see one projection

    @abstractmethod
    def encode(self, state: AnyState, s: Tensor, t: Tensor) -> Tensor:
        """Log endpoints (B, L, V)."""

    @abstractmethod
    def encode_with_tangent(
        self, state: AnyState, s: Tensor, t: Tensor, ds: Tensor, dt: Tensor, dx: AnyState | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log endpoints and their derivative along (dx, ds, dt)."""

    @abstractmethod
    def rows(self, rows: slice) -> "Derived":
        """The same for some rows of the batch: one of its maps may hold something of every text."""

    def readout(self, hidden: Tensor, state: AnyState, s: Tensor, t: Tensor) -> Readout:
        return Readout(hidden)

    def readout_with_tangent(
        self,
        hidden: tuple[Tensor, Tensor],
        state: AnyState,
        times: tuple[Tensor, Tensor, Tensor, Tensor],
        dx: AnyState | None = None,
    ) -> MovingReadout:
        return MovingReadout(Readout(hidden[0]), Readout(hidden[1]))

    def readout_weights(self) -> AbstractContextManager[list[Weight]]:
        return nullcontext([])


@dataclass(frozen=True)
class Guided(Derived):
    """Guidance: mu proportional to weak (strong / weak)^weight, position by position. Two calls.

    weight 0 is the weak map, 1 the strong one, above 1 goes beyond it. With a weak model of the same data this is
    autoguidance; with `Unprompted` it is guidance towards a prompt, as classifier-free guidance is. On the diagonal a
    position's own evidence is the same in both and passes unchanged, eq. (6): what is guided is the context's word.
    """

    strong: FlowMap
    weak: FlowMap
    weight: float

    def model(self) -> FlowMap:
        return self.strong

    def rows(self, rows: slice) -> "Guided":
        return Guided(self.strong.rows(rows), self.weak.rows(rows), self.weight)

    def encode(self, state: AnyState, s: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(self.weak.log_endpoint(state, s, t), self.strong.log_endpoint(state, s, t), self.weight)

    def encode_with_tangent(
        self, state: AnyState, s: Tensor, t: Tensor, ds: Tensor, dt: Tensor, dx: AnyState | None = None
    ) -> tuple[Tensor, Tensor]:
        maps = (self.strong, self.weak)
        strong, weak = (m.read_with_tangent(state, s, t, ds=ds, dt=dt, dx=dx).tangent for m in maps)
        log_mu = torch.lerp(weak.log_endpoint, strong.log_endpoint, self.weight)
        return log_mu, torch.lerp(weak.logit_rate, strong.logit_rate, self.weight)


@dataclass(frozen=True)
class Unprompted(Derived):
    """The map that sees given text only as noisy as the rest: clean positions are carried back to the others' time.

    Every position then stands at one time, which is what the map was trained on. Its endpoints at clean positions mean
    nothing; steps leave those alone.

    Args:
        flow_map: The map.
        noise: x_0 of the given text, (B, L, V), or (1, L, V) for all texts; held, or made when needed. The same at all
            times, so that it follows one path.
    """

    flow_map: FlowMap
    noise: Float[Tensor, "#b l v"] | Noise

    def model(self) -> FlowMap:
        return self.flow_map

    def rows(self, rows: slice) -> "Unprompted":
        own = self.noise if self.noise.shape[0] == 1 else self.noise[rows]
        return Unprompted(self.flow_map.rows(rows), own)

    def _x_0(self, dtype: torch.dtype) -> Tensor:
        return (self.noise.x if isinstance(self.noise, Noise) else self.noise).to(dtype)

    def _hide(self, state: AnyState, s: Tensor, t: Tensor) -> tuple[State, Tensor, Tensor, Tensor]:
        """(state, s, t) with given text at its row's earliest time, and where text is given."""
        clean = s >= 1
        s_row, t_row = s.amin(1, keepdim=True), t.amin(1, keepdim=True)
        hidden = torch.lerp(self._x_0(state.x.dtype), state.x, s_row[..., None].to(state.x.dtype))
        return State(torch.where(clean[..., None], hidden, state.x)), s_row, t_row, clean

    def encode(self, state: AnyState, s: Tensor, t: Tensor) -> Tensor:
        state, s, t, _ = self._hide(state, s, t)
        return self.flow_map.log_endpoint(state, s, t)

    def encode_with_tangent(
        self, state: AnyState, s: Tensor, t: Tensor, ds: Tensor, dt: Tensor, dx: AnyState | None = None
    ) -> tuple[Tensor, Tensor]:
        row = s.argmin(1, keepdim=True)
        apart = state.x - self._x_0(state.x.dtype)
        state, s, t, clean = self._hide(state, s, t)
        ds, dt = ds.expand(len(ds), clean.shape[1]).gather(1, row), dt.expand(len(dt), clean.shape[1]).gather(1, row)
        own = torch.zeros_like(state.x) if dx is None else dx.x
        path = ds[..., None] * apart
        along = State(torch.where(clean[..., None], path, own))
        moved = self.flow_map.read_with_tangent(state, s, t, ds=ds, dt=dt, dx=along).tangent
        return moved.log_endpoint, moved.logit_rate


@dataclass(frozen=True)
class Nucleus(Derived):
    """Top-p: of every endpoint the likeliest tokens whose mass reaches `mass`, at least one; the others get none.

    Changes the flow as temperature does: less diverse, and no longer a sampler of the model. Outermost: its log
    endpoints hold -inf.
    """

    flow_map: FlowMap
    mass: float

    def model(self) -> FlowMap:
        return self.flow_map

    def rows(self, rows: slice) -> "Nucleus":
        return Nucleus(self.flow_map.rows(rows), self.mass)

    def encode(self, state: AnyState, s: Tensor, t: Tensor) -> Tensor:
        return nucleus(self.flow_map.log_endpoint(state, s, t), self.mass)

    def encode_with_tangent(
        self, state: AnyState, s: Tensor, t: Tensor, ds: Tensor, dt: Tensor, dx: AnyState | None = None
    ) -> tuple[Tensor, Tensor]:
        moved = self.flow_map.read_with_tangent(state, s, t, ds=ds, dt=dt, dx=dx).tangent
        return nucleus(moved.log_endpoint, self.mass), moved.logit_rate


def nucleus(log_mu: Float[Tensor, "b l v"], mass: float) -> Float[Tensor, "b l v"]:
    """log endpoints, -inf outside the smallest set of likeliest tokens that holds `mass`; not normalised."""
    ordered, index = log_mu.sort(-1, descending=True)
    p = ordered.softmax(-1)
    beyond = p.cumsum(-1) - p >= mass
    beyond[..., 0] = False  # one token always stays, whatever rounding says
    return log_mu.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), -torch.inf)
