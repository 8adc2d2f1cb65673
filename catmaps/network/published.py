"""The transformer of published checkpoints: FLM and FMLM ("flm"), and CFM's text models ("semicat").

One block serves both: LayerNorm, rotary attention without norms of queries and keys, GELU, adaptive modulation whose
gates start from zero. They differ in how noise enters, how time does, and in caps of logits (`PublishedConfig`). Both
see x through x W alone, hence as `linear` networks do. Derivatives are forward-mode AD's: these networks are read, not
trained.

Source: the layouts in docs/hub.md; Lee et al. 2026, arXiv:2602.16813; Roos et al. 2026, arXiv:2602.12233.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from catmaps.network.denoiser import NetworkConfig, NoisyText, project
from catmaps.network.embedding import KeptCast, LinearEmbedding, distinct
from catmaps.network.trunk import attention, rope_waves, rotate, select
from catmaps.tiles import NUMBERS, MovingReadout, Readout
from catmaps.weights import Weight

FREQUENCIES = 128
ATTENTION_CAP = 50.0
SCORES = 2**26  # numbers of attention scores held at a time, where they have to be capped


@dataclass(frozen=True, kw_only=True)
class PublishedConfig:
    """Which published network; its sizes stand in `NetworkConfig`."""

    kind: Literal["flm", "semicat"]
    embedding: Literal["plain", "naive", "rms"]
    """plain: x E (flm); naive: x / sqrt(V); rms: x over its root mean square norm, and a small MLP (semicat)."""
    arrival: bool
    """Whether it is told where to jump to: a flow map rather than a base."""
    logit_cap: float = 0.0
    """Logits are cap tanh(logits / cap); 0: as they are. Some revisions of flm's code capped at 30."""

    def __post_init__(self) -> None:
        if (self.kind == "flm") != (self.embedding == "plain") or (self.kind == "semicat" and not self.arrival):
            raise ValueError(f"published: no {self.kind} has a {self.embedding} embedding and arrival {self.arrival}")
        if self.logit_cap < 0:
            raise ValueError(f"published.logit_cap must not be negative, but is {self.logit_cap}")


class TimeEmbedder(nn.Module):
    """cos and sin of time x frequency, at 128 frequencies from 1 down to about 1e-4, through an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * FREQUENCIES, width)
        self.outer = nn.Linear(width, width)

    def forward(self, time: Float[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
        phase = time[..., None] * time_frequencies().to(time)
        return self.outer(F.silu(self.inner(torch.cat([phase.cos(), phase.sin()], -1))))


def time_frequencies() -> Float[Tensor, "f"]:
    """10,000^(-i / 128)."""
    return torch.exp(-math.log(10_000) * torch.arange(FREQUENCIES) / FREQUENCIES)


class PublishedEmbedding(LinearEmbedding):
    """What enters the trunk, from x W: the table is `LinearEmbedding`'s, so noise is drawn in its d dimensions."""

    def __init__(self, vocab_size: int, width: int, conditioning: int, kind: str) -> None:
        super().__init__(vocab_size, width)
        self.kind = kind
        self.bias = nn.Parameter(torch.zeros(width)) if kind != "plain" else None
        if kind == "rms":
            self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            self.gamma, self.beta = nn.Linear(conditioning, width), nn.Linear(conditioning, width)
            self.norm = nn.RMSNorm(width, eps=1e-8)

    def forward(
        self,
        projected: Float[Tensor, "b l d"],
        s: Float[Tensor, "b k"],
        condition: Float[Tensor, "b k c"],
        index: Int[Tensor, "b l"] | None,
    ) -> Float[Tensor, "b l d"]:
        """From x W, the distinct start times and their conditioning."""
        if self.bias is None:
            return projected
        size = self.table.in_features
        if self.kind == "naive":
            return projected * size**-0.5 + self.bias
        norm = select((s.square() + (1 - s).square() * size + 1e-6).sqrt()[..., None], index)
        h = projected / norm + self.bias
        h = h + 0.1 * self.outer(F.gelu(self.inner(h), approximate="tanh"))
        return self.norm((1 + select(self.gamma(condition), index)) * h + select(self.beta(condition), index))


class PublishedBlock(nn.Module):
    """One block of width d; `cap` bounds attention's scores, 0: not at all."""

    def __init__(self, config: NetworkConfig, affine_bias: bool, cap: float) -> None:
        super().__init__()
        width, self.heads, self.cap = config.width, config.heads, cap
        self.norm1 = nn.LayerNorm(width, bias=affine_bias)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=affine_bias)
        self.up = nn.Linear(width, config.mlp_ratio * width)
        self.down = nn.Linear(config.mlp_ratio * width, width)
        self.modulation = nn.Linear(config.conditioning, 6 * width)

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        condition: Float[Tensor, "b k c"],
        index: Int[Tensor, "b l"] | None,
        wave: Float[Tensor, "2 l half"],
    ) -> Float[Tensor, "b l d"]:
        parts = (select(part, index) for part in self.modulation(condition).chunk(6, -1))
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, wave), rotate(k, wave)
        y = capped_attention(q, k, v, self.cap) if self.cap else attention(q, k, v)
        x = x + gate1 * self.attention_out(y.transpose(1, 2).flatten(2))
        y = self.up(self.norm2(x) * (1 + scale2) + shift2)
        return x + gate2 * self.down(F.gelu(y, approximate="tanh"))


def capped_attention(
    q: Float[Tensor, "b h l e"], k: Float[Tensor, "b h l e"], v: Float[Tensor, "b h l e"], cap: float
) -> Float[Tensor, "b h l e"]:
    """Attention with scores cap tanh(score / cap), a few texts at a time: fused kernels of torch have no cap."""
    rows = max(1, SCORES // (q.shape[1] * q.shape[2] ** 2))
    done = []
    for q_, k_, v_ in zip(q.split(rows), k.split(rows), v.split(rows), strict=True):
        score = ((q_ * q.shape[-1] ** -0.5) @ k_.mT).to(torch.promote_types(q.dtype, torch.float32))
        done.append((cap * torch.tanh(score / cap)).softmax(-1).to(v.dtype) @ v_)
    return torch.cat(done)


class PublishedNorm(nn.Module):
    """The modulated LayerNorm in front of the head."""

    def __init__(self, config: NetworkConfig, affine_bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, bias=affine_bias)
        self.modulation = nn.Linear(config.conditioning, 2 * config.width)

    def forward(
        self, x: Float[Tensor, "b l d"], condition: Float[Tensor, "b k c"], index: Int[Tensor, "b l"] | None
    ) -> Float[Tensor, "b l d"]:
        shift, scale = (select(part, index) for part in self.modulation(condition).chunk(2, -1))
        return self.norm(x) * (1 + scale) + shift


class PublishedTrunk(nn.Module):
    """Blocks and the last norm."""

    def __init__(self, config: NetworkConfig, kind: str) -> None:
        super().__init__()
        semicat, self.head_dim = kind == "semicat", config.width // config.heads
        cap = 0.0 if semicat else ATTENTION_CAP
        self.blocks = nn.ModuleList(PublishedBlock(config, semicat, cap) for _ in range(config.blocks))
        self.final_norm = PublishedNorm(config, semicat)

    def forward(
        self, x: Float[Tensor, "b l d"], condition: Float[Tensor, "b k c"], index: Int[Tensor, "b l"] | None
    ) -> Float[Tensor, "b l d"]:
        wave = rope_waves(x.shape[1], self.head_dim, x.device, torch.promote_types(x.dtype, torch.float32))
        for block in self.blocks:
            x = block(x, condition, index, wave)
        return self.final_norm(x, condition, index)


class PublishedNetwork(nn.Module):
    """A denoiser as `FlowNetwork`, of a published architecture.

    Args:
        config: Sizes.
        published: Which architecture.
        vocab_size: V.
        clock: What a time is told as; flm is told its decoding-error warp, semicat the time itself.
    """

    def __init__(
        self, config: NetworkConfig, published: PublishedConfig, vocab_size: int, clock: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.config, self.published, self.clock = config, published, clock
        self.precision, self.tile, self._cast = torch.float32, NUMBERS, KeptCast()
        self.embedding = PublishedEmbedding(vocab_size, config.width, config.conditioning, published.embedding)
        self.start = TimeEmbedder(config.conditioning)
        self.arrival = TimeEmbedder(config.conditioning) if published.arrival else None
        self.trunk = PublishedTrunk(config, published.kind)
        self.head = nn.Linear(config.width, vocab_size)

    @property
    def vocab_size(self) -> int:
        return self.head.out_features

    @property
    def log_prior(self) -> Float[Tensor, "v"]:
        """The logits' bias, as `FlowNetwork`'s; here it was learned."""
        return self.head.bias

    @property
    def projects(self) -> bool:
        """Whether x W has fewer dimensions than x."""
        return self.embedding.projects

    def _autocast(self) -> torch.autocast:
        device = self.head.weight.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def _condition(self, s: Float[Tensor, "b k"], t: Float[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
        if self.published.kind == "semicat":
            assert self.arrival is not None
            return F.silu(self.start(s)) + F.silu(self.arrival(t - s))
        start = self.start(self.clock(s))
        return F.silu(start if self.arrival is None else start + self.arrival(self.clock(t)))

    def _hidden(self, projected: Tensor, s: Tensor, t: Tensor, index: Tensor | None) -> Tensor:
        """Hidden vectors from x W and the distinct times; embedding and conditioning in fp32, as published."""
        condition = self._condition(s, t)
        x = self.embedding(projected, s, condition, index)
        with self._autocast():
            return self.trunk(x, condition, index)

    def encode(self, state: NoisyText, s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]) -> Float[Tensor, "b l d"]:
        """Hidden vectors of every position."""
        (s_k, t_k), index = distinct(s, t)
        return self._hidden(project(self, state), s_k, t_k, index)

    def encode_with_tangent(
        self,
        state: NoisyText,
        s: Float[Tensor, "b #l"],
        t: Float[Tensor, "b #l"],
        ds: Float[Tensor, "b #l"],
        dt: Float[Tensor, "b #l"],
        dx: NoisyText | None = None,
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]:
        """`encode` and its derivative along (dx, ds, dt); dx = None means the state is held."""
        (s_k, t_k, ds_k, dt_k), index = distinct(s, t, ds, dt)
        z = project(self, state)
        dz = torch.zeros_like(z) if dx is None else project(self, dx)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward mode
            y, dy, *_ = torch.func.jvp(partial(self._hidden, index=index), (z, s_k, t_k), (dz, ds_k, dt_k))
        return y, dy

    def readout(
        self, hidden: Float[Tensor, "b l d"], state: NoisyText, s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]
    ) -> Readout:
        """What the endpoint's logits are made of; position by position."""
        cap, bias, context = self.published.logit_cap, self.head.bias, self._context(hidden)
        return Readout(cap * torch.tanh((context + bias) / cap)) if cap else Readout(context, bias)

    def _context(self, hidden: Float[Tensor, "*b l d"]) -> Float[Tensor, "*b l v"]:
        weight = self.head.weight
        if not torch.is_grad_enabled():
            weight = self._cast(weight, self.precision)
        with self._autocast():
            return F.linear(hidden.to(weight.dtype), weight)

    def readout_with_tangent(
        self,
        hidden: tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]],
        state: NoisyText,
        times: tuple[Tensor, Tensor, Tensor, Tensor],
        dx: NoisyText | None = None,
    ) -> MovingReadout:
        """`readout` and its derivative; `times` = (s, t, ds, dt)."""
        context, rate = self._context(torch.stack(hidden)).unbind(0)
        cap, bias = self.published.logit_cap, self.head.bias
        if not cap:
            return MovingReadout(Readout(context, bias), Readout(rate))
        y = torch.tanh((context + bias) / cap)
        return MovingReadout(Readout(cap * y), Readout(rate * (1 - y.square())))

    def readout_weights(self) -> AbstractContextManager[list[Weight]]:
        """What readouts depend on besides their arguments."""
        return nullcontext([Weight(p, p) for p in self.head.parameters()])

    def num_parameters(self) -> tuple[int, int]:
        """(body, vocabulary): parameters outside and inside the two vocabulary tables."""
        vocabulary = self.embedding.table.weight.numel() + self.head.weight.numel()
        return sum(p.numel() for p in self.parameters()) - vocabulary, vocabulary
