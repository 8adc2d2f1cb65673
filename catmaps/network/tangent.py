"""Elementary maps on (value, tangent) pairs, in the order y = f(x), dy = f'(x) dx. Tested against torch.func.jvp."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def linear(layer: nn.Linear, x: Float[Tensor, "*b i"], dx: Float[Tensor, "*b i"]) -> tuple[Tensor, Tensor]:
    """A linear layer once on the stacked pair: one matrix product instead of three, and hooks of the layer see it."""
    y, dy = layer(torch.stack([x, dx.to(x.dtype)])).unbind(0)
    return y, dy if layer.bias is None else dy - layer.bias.to(dy.dtype)


def rms_norm(
    x: Float[Tensor, "*b n"], dx: Float[Tensor, "*b n"], weight: Float[Tensor, "n"] | None, eps: float
) -> tuple[Float[Tensor, "*b n"], Float[Tensor, "*b n"]]:
    """RMS norm over the last axis, in fp32 inside."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    dwide = dx.to(wide.dtype)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * scale
    dy = scale * (dwide - y * (y * dwide).mean(-1, keepdim=True))
    if weight is not None:
        y, dy = y * weight, dy * weight
    return y.to(x.dtype), dy.to(x.dtype)


def silu(x: Float[Tensor, "*b"], dx: Float[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    gate = torch.sigmoid(x)
    return x * gate, gate * (1 + x * (1 - gate)) * dx


def squared_relu(x: Float[Tensor, "*b"], dx: Float[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    y = F.relu(x)
    return y.square(), 2 * y * dx


def softmax(z: Float[Tensor, "*b v"], dz: Float[Tensor, "*b v"]) -> tuple[Tensor, Tensor]:
    p = z.softmax(-1)
    return p, p * (dz - (p * dz).sum(-1, keepdim=True))


def attention(
    qkv: tuple[Tensor, Tensor, Tensor], dqkv: tuple[Tensor, Tensor, Tensor]
) -> tuple[Float[Tensor, "b h l e"], Float[Tensor, "b h l e"]]:
    """Dense softmax attention (B, H, L, E); fused kernels have no tangent, so L x L weights are formed."""
    (q, k, v), (dq, dk, dv) = qkv, dqkv
    scale = 1 / math.sqrt(q.shape[-1])
    score = (q @ k.mT).float() if q.dtype != torch.float64 else q @ k.mT
    dscore = (dq @ k.mT + q @ dk.mT).to(score.dtype)
    p, dp = softmax(score * scale, dscore * scale)
    p, dp = p.to(v.dtype), dp.to(v.dtype)
    return p @ v, dp @ v + p @ dv
