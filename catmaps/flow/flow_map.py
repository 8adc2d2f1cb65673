"""The flow map over a denoiser: endpoint, jump, velocity, and the endpoint's derivative along time.

    mu_{s,t}(x) = softmax(net(x, s, t))           endpoint, in the simplex
    X_{s,t}(x)  = x + gamma (mu_{s,t}(x) - x)     flow map, gamma = (t - s) / (1 - s)                            (2)
    v_t(x)      = (mu_{t,t}(x) - x) / (1 - t)     velocity                                                       (3)

Source: Roos et al. 2026, arXiv:2602.12233; docs/maths.md eqs. (2), (3), (5).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from catmaps.flow.interpolant import State, advance, step_fraction


@runtime_checkable
class Denoiser(Protocol):
    """What the mathematics asks of a network. Hidden vectors are its own business; times are (B, 1) or (B, L)."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, state: State, s: Tensor, t: Tensor) -> Tensor:
        """Hidden vectors of every position."""
        ...

    def encode_with_tangent(
        self, state: State, s: Tensor, t: Tensor, ds: Tensor, dt: Tensor, dx: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden vectors and their derivative along (dx, ds, dt)."""
        ...

    def logits(self, hidden: Tensor, state: State, s: Tensor, t: Tensor) -> Tensor:
        """Logits (B, L, V) of the endpoint mu_{s,t}."""
        ...

    def logits_with_tangent(
        self,
        hidden: tuple[Tensor, Tensor],
        state: State,
        times: tuple[Tensor, Tensor, Tensor, Tensor],
        dx: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits and their derivative; times = (s, t, ds, dt)."""
        ...


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


@dataclass(frozen=True)
class FlowMap:
    """The two-time map of a denoiser. `temperature` divides the logits; 1 is the model itself."""

    denoiser: Denoiser
    temperature: float = 1.0

    def logits(self, state: State, s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]) -> Float[Tensor, "b l v"]:
        hidden = self.denoiser.encode(state, s, t)
        return self.denoiser.logits(hidden, state, s, t) / self.temperature

    def log_endpoint(self, state: State, s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]) -> Float[Tensor, "b l v"]:
        """log mu_{s,t}(x) for a state x at time s."""
        return self.logits(state, s, t).log_softmax(-1)

    def endpoint(self, state: State, s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]) -> Float[Tensor, "b l v"]:
        """mu_{s,t}(x) for a state x at time s."""
        return self.logits(state, s, t).softmax(-1)

    def jump(self, state: State, s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]) -> State:
        """X_{s,t}(x): one network call."""
        return advance(state, self.endpoint(state, s, t), step_fraction(s, t))

    def velocity(self, state: State, t: Float[Tensor, "b #l"]) -> Float[Tensor, "b l v"]:
        """v_t(x); t < 1."""
        return (self.endpoint(state, t, t) - state.x) / (1 - t)[..., None]

    def endpoint_with_tangent(
        self, state: State, s: Tensor, t: Tensor, *, ds: Tensor, dt: Tensor, dx: Tensor | None = None
    ) -> Tangent:
        """mu_{s,t}(x) and its derivative along (dx, ds, dt), by the network's hand-written tangents."""
        hidden = self.denoiser.encode_with_tangent(state, s, t, ds, dt, dx)
        logits, rate = self.denoiser.logits_with_tangent(hidden, state, (s, t, ds, dt), dx)
        log_mu = (logits / self.temperature).log_softmax(-1)
        mu, rate = log_mu.exp(), rate / self.temperature
        return Tangent(log_mu, mu, rate - (mu * rate).sum(-1, keepdim=True))


def kl_divergence(target: Float[Tensor, "b l v"], log_model: Float[Tensor, "b l v"]) -> Float[Tensor, "b l"]:
    """KL(target || model) per position, nats; no gradient reaches the target."""
    target = target.detach()
    return -(torch.special.entr(target) + target * log_model).sum(-1)
