"""What the time and the state tell about a token on their own: gains, clock and log-SNR features.

On the diagonal, Bayes' rule separates a position's own evidence from its context:

    log mu_{t,t}(x)_k = log p(x_l = k | context) + lambda(t) x_k + const,   lambda(t) = t / (1 - t)^2.          (6)

Off the diagonal no exact rule is known; the gain gets a learned part that vanishes at s = t, so that a map from
s = 0 still sees its noise. Every function here also returns its derivative along (ds, dt): losses need it.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from catmaps.flow.times import Law

GAIN_CLAMP = 0.95  # beyond it a token is decided for every vocabulary, and fp32 would lose the noise
LOG_SNR_CLAMP = 8.0


def bayes_gain(t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """lambda(t) = t / (1 - t)^2, the exact weight of a position's own noisy one-hot; constant beyond t = 0.95.

    Source: docs/maths.md eq. (6).
    """
    t = t.clamp_max(GAIN_CLAMP)
    return t / (1 - t).square()


def bayes_gain_tangent(t: Float[Tensor, "*shape"], dt: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The derivative of `bayes_gain` along dt: (1 + t) / (1 - t)^3 dt, and 0 beyond the clamp."""
    return torch.where(t < GAIN_CLAMP, (1 + t) / (1 - t.clamp_max(GAIN_CLAMP)).pow(3) * dt, torch.zeros_like(dt))


class OffDiagonalGain(nn.Module):
    """lambda(s, t) = bayes_gain(s) + (t - s) slope(s, t), slope = softplus of a small function of (s, t) > 0.

    At the start the slope is 0.5 at small gaps and `initial` at (0, 1). Exactly Bayes on the diagonal, always.
    """

    def __init__(self, initial: float = 2.5, width: int = 16) -> None:
        super().__init__()
        self.initial = initial
        self.inner = nn.Linear(2, width)
        self.outer = nn.Linear(width, 1, bias=False)
        self.bias = nn.Parameter(torch.empty(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        near, far = (math.log(math.expm1(v)) for v in (0.5, self.initial))
        with torch.no_grad():
            self.bias.copy_(torch.tensor([near, far - near]))
        nn.init.normal_(self.inner.weight)
        nn.init.zeros_(self.inner.bias)
        nn.init.zeros_(self.outer.weight)

    def forward(self, s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]) -> Float[Tensor, "b #l"]:
        s, t = torch.broadcast_tensors(s, t)
        gap = t - s
        hidden = torch.tanh(self.inner(torch.stack([s, gap], -1)))
        return bayes_gain(s) + gap * F.softplus(self.bias[0] + self.bias[1] * gap + self.outer(hidden)[..., 0])

    def tangent(
        self,
        s: Float[Tensor, "b #l"],
        t: Float[Tensor, "b #l"],
        ds: Float[Tensor, "b #l"],
        dt: Float[Tensor, "b #l"],
    ) -> tuple[Float[Tensor, "b #l"], Float[Tensor, "b #l"]]:
        """The gain and its derivative along (ds, dt)."""
        s, t, ds, dt = torch.broadcast_tensors(s, t, ds, dt)
        gap, dgap = t - s, dt - ds
        hidden = torch.tanh(self.inner(torch.stack([s, gap], -1)))
        dhidden = (1 - hidden.square()) * F.linear(torch.stack([ds, dgap], -1), self.inner.weight)
        a = self.bias[0] + self.bias[1] * gap + self.outer(hidden)[..., 0]
        da = self.bias[1] * dgap + self.outer(dhidden)[..., 0]
        gain = bayes_gain(s) + gap * F.softplus(a)
        return gain, bayes_gain_tangent(s, ds) + dgap * F.softplus(a) + gap * torch.sigmoid(a) * da


class TimeFeatures(nn.Module):
    """Features of one time per position: the clock tau, log-SNR / 8 clamped to [-1, 1], and waves of both.

    Frequencies are moderate (at most `waves`/2 periods over the clock): d/dt scales with them and must stay tame.
    The clock's table is a buffer, hence it is stored with the weights and conditions a loaded network exactly as it
    was trained.
    """

    def __init__(self, clock: Law, waves: int = 8) -> None:
        super().__init__()
        self.register_buffer("clock_t", clock.t.float())
        self.register_buffer("clock_table", clock.table.float())
        self.register_buffer("frequency", math.pi * torch.arange(1, waves + 1))
        self.size = 2 + 4 * waves

    clock_t: Tensor
    clock_table: Tensor
    frequency: Tensor

    def _inputs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(tau, log-SNR / 8) and their derivatives by t, stacked on the last axis: both (..., 2)."""
        i = (torch.searchsorted(self.clock_t, t.contiguous()) - 1).clamp(0, len(self.clock_t) - 2)
        slope = (self.clock_table[i + 1] - self.clock_table[i]) / (self.clock_t[i + 1] - self.clock_t[i])
        tau = self.clock_table[i] + slope * (t - self.clock_t[i])
        inside = t.clamp(1e-6, 1 - 1e-6)
        log_snr = 2 * (inside.log() - torch.log1p(-inside)) / LOG_SNR_CLAMP
        rate = 2 / (inside * (1 - inside)) / LOG_SNR_CLAMP
        free = log_snr.abs() < 1
        values = torch.stack([tau, log_snr.clamp(-1, 1)], -1)
        return values, torch.stack([slope, torch.where(free, rate, torch.zeros_like(rate))], -1)

    def forward(self, t: Float[Tensor, "b l"]) -> Float[Tensor, "b l f"]:
        values, _ = self._inputs(t.to(self.clock_t.dtype))
        phase = values[..., None] * self.frequency
        return torch.cat([values, phase.sin().flatten(-2), phase.cos().flatten(-2)], -1)

    def tangent(
        self, t: Float[Tensor, "b l"], dt: Float[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b l f"], Float[Tensor, "b l f"]]:
        """The features and their derivative along dt."""
        values, rates = self._inputs(t.to(self.clock_t.dtype))
        rates = rates * dt[..., None]
        phase, dphase = values[..., None] * self.frequency, rates[..., None] * self.frequency
        features = torch.cat([values, phase.sin().flatten(-2), phase.cos().flatten(-2)], -1)
        dfeatures = [rates, (phase.cos() * dphase).flatten(-2), (-phase.sin() * dphase).flatten(-2)]
        return features, torch.cat(dfeatures, -1)


class Evidence(nn.Module):
    """All that the network is told about time: features, and the gains of its input and of its output skip."""

    def __init__(self, clock: Law, initial_gain: float = 2.5) -> None:
        super().__init__()
        self.features = TimeFeatures(clock)
        self.gain_in = OffDiagonalGain(initial_gain)
        self.gain_out = OffDiagonalGain(initial_gain)
