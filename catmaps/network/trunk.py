"""The transformer: pre-RMSNorm blocks, full attention with RoPE and QK-norm, squared ReLU, adaptive modulation.

Before attention and MLP a position may mix with its nearest neighbours, channel by channel (`Neighbours`). Residual
projections start at zero and gates at one, so a new block is the identity and learns from its first step. A causal
trunk lets no position see a later one; it serves autoregressive baselines and has no tangents.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from catmaps.network import tangent

EPS = 1e-6
DENSE_LENGTH = 512


def select(
    values: Float[Tensor, "b k n"], index: Int[Tensor, "b l"] | None
) -> Float[Tensor, "b l n"] | Float[Tensor, "b 1 n"]:
    """The value of every position out of its sequence's k distinct ones; (B, 1, n) where all share one."""
    if index is None:
        return values
    if values.shape[1] == 2:  # noisy and clean: a select fuses into what follows, a gather does not
        return torch.where((index == 1)[..., None], values[:, 1:], values[:, :1])
    return torch.take_along_dim(values, index[..., None], dim=1)


def rotate(x: Float[Tensor, "b h l e"], wave: Float[Tensor, "2 l half"]) -> Float[Tensor, "b h l e"]:
    """Rotary position embedding with the tables of `rope_waves`."""
    cos, sin = wave.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rope_waves(
    length: int, head_dim: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "2 {length} half"]:
    """cos and sin of position x frequency, base 10,000."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim
    angle = torch.outer(torch.arange(length, device=device, dtype=dtype), 10_000.0**-exponent)
    return torch.stack([angle.cos(), angle.sin()])


def head_norm(norm: nn.RMSNorm, x: Float[Tensor, "b h l e"]) -> Float[Tensor, "b h l e"]:
    """The norm in x's dtype: a weight of another one would keep the fused kernel out, with a warning."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def attention(
    q: Float[Tensor, "b h l e"], k: Float[Tensor, "b h l e"], v: Float[Tensor, "b h l e"], causal: bool = False
) -> Float[Tensor, "b h l e"]:
    """Full or causal attention by the fastest kernel: plain matrix products on CPUs at moderate lengths."""
    if q.device.type != "cpu" or q.shape[-2] > DENSE_LENGTH:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    score = (q * q.shape[-1] ** -0.5) @ k.mT
    if causal:
        later = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        score = score.masked_fill(later, -math.inf)
    return score.float().softmax(-1).to(v.dtype) @ v if score.dtype == torch.bfloat16 else score.softmax(-1) @ v


def modulated(
    x: Tensor, dx: Tensor, shift: tuple[Tensor, Tensor], scale: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The adaptive norm and its tangent."""
    y, dy = tangent.rms_norm(x, dx, None, EPS)
    return y * (1 + scale[0]) + shift[0], dy * (1 + scale[0]) + y * scale[1] + shift[1]


def gated(x: Tensor, dx: Tensor, gate: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The gated residual sum and its tangent."""
    return x + (1 + gate[0]) * y[0], dx + (1 + gate[0]) * y[1] + gate[1] * y[0]


Pair = tuple[Tensor, Tensor]


class Neighbours(nn.Module):
    """y_l + sum_j weight_j * y_{l+j} over |j| <= reach, or -reach <= j <= 0 where causal; nothing beyond the ends.

    Weights are per channel and start at zero, hence it starts as the identity.

    Source: the depthwise convolutions of Primer, So et al. 2021, arXiv:2109.08668; docs/log.md, 2026-11-26.
    """

    def __init__(self, width: int, reach: int, causal: bool = False) -> None:
        super().__init__()
        self.reach = (reach, 0 if causal else reach)
        self.weight = nn.Parameter(torch.zeros(sum(self.reach) + 1, width))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, y: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        padded, length = F.pad(y, (0, 0, *self.reach)), y.shape[1]
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            # Passes over y one by one are slower than a convolution, but its backward pass is slower than theirs, and
            # a compiler makes one pass of them all.
            kernel = self.weight.mT[:, None, None].to(y.dtype)
            mixed = F.conv2d(padded.mT[:, :, None], kernel, groups=y.shape[2])
            return y + mixed[:, :, 0].mT
        for j, weight in enumerate(self.weight.to(y.dtype)):
            y = y + weight * padded[:, j : j + length]
        return y


class Block(nn.Module):
    """One transformer block of width d; `modulation` holds shift, scale, gate of both halves, (B, K, 6 d)."""

    def __init__(
        self, width: int, heads: int, conditioning: int, mlp_ratio: int, neighbours: int = 0, causal: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.near_attention, self.near_mlp = (
            Neighbours(width, neighbours, causal) if neighbours else nn.Identity() for _ in range(2)
        )
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = nn.RMSNorm(width // heads, eps=EPS)
        self.key_norm = nn.RMSNorm(width // heads, eps=EPS)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, mlp_ratio * width, bias=False)
        self.down = nn.Linear(mlp_ratio * width, width, bias=False)
        self.modulation = nn.Linear(conditioning, 6 * width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.qkv, self.up):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        for layer in (self.attention_out, self.down, self.modulation):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.modulation.bias)
        for layer in (self.query_norm, self.key_norm, self.near_attention, self.near_mlp):
            if not isinstance(layer, nn.Identity):
                layer.reset_parameters()

    def _split_heads(self, qkv: Float[Tensor, "b l e"]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(
        self,
        x: Float[Tensor, "b l d"] | Pair,
        condition: Float[Tensor, "b k c"] | Pair,
        index: Int[Tensor, "b l"] | None,
        wave: Float[Tensor, "2 l half"],
    ) -> Float[Tensor, "b l d"] | Pair:
        """The block, or of pairs (value, tangent) `with_tangent`: compilers and hooks see calls of the module alone."""
        if isinstance(x, tuple):
            assert isinstance(condition, tuple)
            return self.with_tangent(x, condition, index, wave)
        assert isinstance(condition, Tensor)
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            select(m, index) for m in self.modulation(condition).chunk(6, -1)
        )
        y = F.rms_norm(x, x.shape[-1:], eps=EPS) * (1 + scale1) + shift1
        q, k, v = self._split_heads(self.qkv(self.near_attention(y)))
        q, k = rotate(head_norm(self.query_norm, q), wave), rotate(head_norm(self.key_norm, k), wave)
        y = attention(q, k, v, self.causal)
        z = x + (1 + gate1) * self.attention_out(y.transpose(1, 2).flatten(2))
        y = F.rms_norm(z, z.shape[-1:], eps=EPS) * (1 + scale2) + shift2
        return z + (1 + gate2) * self.down(F.relu(self.up(self.near_mlp(y))).square())

    def with_tangent(
        self,
        x: tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]],
        condition: tuple[Float[Tensor, "b k c"], Float[Tensor, "b k c"]],
        index: Int[Tensor, "b l"] | None,
        wave: Float[Tensor, "2 l half"],
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]:
        """`forward` and its derivative along a tangent of (x, condition); of full attention only."""
        assert not self.causal
        m, dm = tangent.linear(self.modulation, *condition)
        parts = [(select(a, index), select(b, index)) for a, b in zip(m.chunk(6, -1), dm.chunk(6, -1), strict=True)]
        near = [self.near_attention(y) for y in modulated(*x, parts[0], parts[1])]
        z, dz = tangent.linear(self.qkv, *near)
        (q, k, v), (dq, dk, dv) = self._split_heads(z), self._split_heads(dz)
        q, dq = tangent.rms_norm(q, dq, self.query_norm.weight, EPS)
        k, dk = tangent.rms_norm(k, dk, self.key_norm.weight, EPS)
        rotated = [rotate(y, wave).to(v.dtype) for y in (q, k, dq, dk)]
        y, dy = tangent.attention((rotated[0], rotated[1], v), (rotated[2], rotated[3], dv))
        y, dy = y.transpose(1, 2).flatten(2), dy.transpose(1, 2).flatten(2)
        x = gated(*x, parts[2], tangent.linear(self.attention_out, y, dy))
        near = [self.near_mlp(y) for y in modulated(*x, parts[3], parts[4])]
        hidden = tangent.squared_relu(*tangent.linear(self.up, *near))
        return gated(*x, parts[5], tangent.linear(self.down, *hidden))


class FinalNorm(nn.Module):
    """Adaptive RMS norm in front of the head."""

    def __init__(self, width: int, conditioning: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(conditioning, 2 * width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        x: Float[Tensor, "b l d"] | Pair,
        condition: Float[Tensor, "b k c"] | Pair,
        index: Int[Tensor, "b l"] | None,
    ) -> Float[Tensor, "b l d"] | Pair:
        """As `Block.forward`."""
        if isinstance(x, tuple):
            assert isinstance(condition, tuple)
            return self.with_tangent(x, condition, index)
        assert isinstance(condition, Tensor)
        shift, scale = (select(m, index) for m in self.modulation(condition).chunk(2, -1))
        return F.rms_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift

    def with_tangent(self, x: Pair, condition: Pair, index: Int[Tensor, "b l"] | None) -> Pair:
        """`forward` and its derivative along a tangent of (x, condition)."""
        m, dm = tangent.linear(self.modulation, *condition)
        (shift, scale), (dshift, dscale) = m.chunk(2, -1), dm.chunk(2, -1)
        return modulated(
            *x, (select(shift, index), select(dshift, index)), (select(scale, index), select(dscale, index))
        )


class Trunk(nn.Module):
    """Blocks and a final adaptive norm: (B, L, d) -> (B, L, d).

    With `checkpointing` a block keeps its input alone, and is done again in the backward pass.
    """

    checkpointing: bool = False

    def __init__(
        self,
        width: int,
        blocks: int,
        heads: int,
        conditioning: int,
        mlp_ratio: int,
        neighbours: int = 0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = width // heads
        shape = (width, heads, conditioning, mlp_ratio, neighbours, causal)
        self.blocks = nn.ModuleList(Block(*shape) for _ in range(blocks))
        self.final_norm = FinalNorm(width, conditioning)

    def _waves(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return rope_waves(x.shape[1], self.head_dim, x.device, dtype)

    def _run(self, call: Callable[..., Any], *args: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False)
        return call(*args)

    def forward(
        self, x: Float[Tensor, "b l d"], condition: Float[Tensor, "b k c"], index: Int[Tensor, "b l"] | None
    ) -> Float[Tensor, "b l d"]:
        wave = self._waves(x)
        for block in self.blocks:
            x = self._run(block, x, condition, index, wave)
        return self.final_norm(x, condition, index)

    def forward_with_tangent(
        self,
        x: tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]],
        condition: tuple[Float[Tensor, "b k c"], Float[Tensor, "b k c"]],
        index: Int[Tensor, "b l"] | None,
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]:
        """`forward` and its derivative along a tangent of (x, condition)."""
        wave = self._waves(x[0])
        for block in self.blocks:
            x = self._run(block, x, condition, index, wave)
        return self.final_norm(x, condition, index)
